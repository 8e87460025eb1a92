"""Scenes: what is drawn, what is said, and whether truth is told from falsehood."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from blip2_export.scenes import dataset, drawing, truths


def many(n: int, unseen: bool = False) -> list[drawing.Scene]:
    rng = random.Random("tests")
    return [drawing.sample_scene(rng, unseen=unseen) for _ in range(n)]


def test_every_caption_is_true_of_its_scene_and_no_edited_one_is() -> None:
    rng = random.Random(1)
    for scene in many(1500) + many(300, unseen=True):
        caption = drawing.caption(scene, rng)
        assert drawing.is_true(caption, scene), (caption, scene)
        edited = drawing.one_word_edit(caption, scene, rng)
        assert edited is not None and edited != caption
        assert not drawing.is_true(edited, scene), (edited, scene)


def test_truths_of_a_scene_are_all_that_captions_say_of_it_and_nothing_false() -> None:
    rng = random.Random(2)
    for scene in many(200):
        true = truths.captions(scene)
        assert len(set(true)) == len(true) and all(drawing.is_true(text, scene) for text in true)
        drawn = {drawing.caption(scene, rng) for _ in range(50)}
        assert drawn <= set(true), drawn - set(true)


def test_a_dataset_says_what_is_true_of_every_picture(tmp_path: Path) -> None:
    dataset.write_dataset(tmp_path, 4, 11, 64)
    true = json.loads((tmp_path / "truths.json").read_text())
    captions = json.loads((tmp_path / "annotations.json").read_text())["annotations"]
    assert all(row["caption"] in true[f"{row['image_id']:06}.png"] for row in captions)
    for row in json.loads((tmp_path / "questions.json").read_text()):
        assert true[f"{row['image_id']:06}.png: {row['question']}"] == [row["answer"]]
    assert all(f"{i:06}.png: {question}" in true for i in range(4) for question in truths.COUNT_QUESTIONS)


def test_the_sample_pictures_have_their_truths_beside_them() -> None:
    samples, rng = Path(__file__).parents[2] / "models" / "samples", random.Random(11)
    expected: dict[str, list[str]] = {}
    for i in range(6):
        scene = drawing.sample_scene(rng)
        with Image.open(samples / f"{i}.png") as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(drawing.draw(scene, 256)))
        expected |= truths.of_scene(f"{i}.png", scene)
    assert json.loads((samples / "truths.json").read_text()) == expected


def test_text_that_is_no_caption_is_not_true() -> None:
    scene = many(1)[0]
    for text in ("", "a", "a red", "there is a dog", drawing.caption(scene, random.Random(0)) + " and more"):
        assert not drawing.is_true(text, scene)


def test_unseen_pairs_occur_only_where_asked_for() -> None:
    def pairs(found: list[drawing.Scene]) -> list[set[tuple[str, str]]]:
        return [{(t.shape, t.colour) for t in s.things} for s in found]

    assert all(not p & drawing.UNSEEN_PAIRS for p in pairs(many(1500)))
    assert all(p & drawing.UNSEEN_PAIRS for p in pairs(many(300, unseen=True)))


def test_objects_differ_in_shape_and_colour_and_do_not_touch() -> None:
    for scene in many(500):
        assert len({t.shape for t in scene.things}) == len({t.colour for t in scene.things}) == len(scene.things)
        for i, a in enumerate(scene.things):
            for b in scene.things[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_relations_hold_in_the_picture_with_a_margin() -> None:
    for scene in many(500):
        for a in scene.things:
            for b in scene.things:
                if a.column < b.column:
                    assert b.x - a.x > 0.08, (a, b)
                if a.row < b.row:
                    assert b.y - a.y > 0.08, (a, b)


def test_a_picture_shows_each_object_in_its_colour_at_its_place() -> None:
    for scene in many(60):
        picture = np.asarray(drawing.draw(scene, 192)).astype(int)
        for t in scene.things:
            left, top, alpha = drawing.coverage(t, 192)
            box = picture[top : top + alpha.shape[0], left : left + alpha.shape[1]]
            seen = box[alpha > 0.99].mean(0)
            assert np.abs(seen - drawing.COLOURS[t.colour]).max() < 14, (t, seen)


def test_the_same_seed_gives_the_same_picture() -> None:
    first, second = (drawing.draw(drawing.sample_scene(random.Random(5))) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_answers_fit_their_questions() -> None:
    rng = random.Random(2)
    said = {kind: set[str]() for kind in drawing.QUESTION_KINDS}
    for scene in many(2000):
        kind, question, answer = drawing.question(scene, rng)
        said[kind].add(answer)
        assert question.endswith("?")
        if kind == "yes/no":
            noun = question.removeprefix("is there ").removesuffix("?")
            if any(c in noun for c in drawing.COLOURS) and noun.split()[-1] in drawing.SHAPES and noun.startswith("a"):
                assert (answer == "yes") == drawing.is_true(noun, scene)
    assert said["colour"] == set(drawing.COLOURS)
    assert said["shape"] == set(drawing.SHAPES)
    assert said["count"] == set(drawing.NUMBERS[1:])
    assert said["where"] == {drawing.place_name(r, c) for r in range(3) for c in range(3)}
    assert said["yes/no"] == {"yes", "no"}
    assert said["size"] == set(drawing.SIZES)
