"""What `evaluate` counts: known figures from a scripted engine, and the engine itself on tiny bundles."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine import ENGINE, ROOT

from blip2_export.scenes import drawing, evaluate, retrieval, texts
from blip2_export.scenes.held_out import HeldOut

STAGE1 = ROOT / "tests" / "bundles" / "stage1"
N, GROUP = 45, 20
ITM = ["edits", "itm_edit_told", "itm_edit_right"]


class Scripted:
    """Knows the scenes and the captions that are drawn of them; pictures are named by their number.

    `itc` is `right`, `reversed`, or `decoyed`: true pictures come close behind some false ones.
    `itm` gives the probability of a true and of a false text.
    """

    def __init__(self, itc: str = "right", itm: tuple[float, float] = (0.9, 0.1)) -> None:
        rng = random.Random("scenes")
        self.scenes = [drawing.sample_scene(rng) for _ in range(N)]
        captions = random.Random("texts")
        self.axes = {text: i for i, text in enumerate(dict.fromkeys(drawing.caption(s, captions) for s in self.scenes))}
        self.itc, self.itm = itc, itm
        self.calls: Counter[str] = Counter()

    def held_out(self) -> HeldOut:
        return HeldOut(self, self.scenes, [str(i) for i in range(N)], random.Random("texts"))  # type: ignore[arg-type]

    def pairs(self, command: str, _: str, pairs: list[tuple[str, list[str]]]) -> list[list[dict[str, Any]]]:
        self.calls[command] += len(pairs)
        return [self.matched(picture, texts) for picture, texts in pairs]

    def matched(self, picture: str, texts: list[str]) -> list[dict[str, Any]]:
        assert len(texts) == len(set(texts)), "a text is asked about twice"
        scene = self.scenes[int(picture)]
        found = [(text, self.itm[not drawing.is_true(text, scene)]) for text in texts]
        return [{"text": text, "itm_probability": p, "itm_logit": 9 * p - 4} for text, p in found]

    def vectors(self, kind: str, *items: str) -> np.ndarray:
        """Each text has its own axis. A picture's second query lies along the axes of texts, the first one far from all."""
        self.calls[f"embed {kind}"] += 1
        if kind == "text":
            return np.eye(len(self.axes))[[self.axes[text] for text in items]]
        return np.array([[[-1] * len(self.axes), [self.cosine(t, int(i)) for t in self.axes]] for i in items])

    def cosine(self, text: str, picture: int) -> float:
        true = drawing.is_true(text, self.scenes[picture])
        if self.itc == "decoyed":
            return 0.9 if true else float(picture % GROUP < 10)
        return float(true == (self.itc == "right"))


@pytest.mark.parametrize(
    ("itc", "itm", "expected"),
    [
        ("right", (0.9, 0.1), {"told": 1, "right": 1, "itc": 1, "itm": 1}),
        ("right", (0.1, 0.9), {"told": 0, "right": 0, "itc": 1, "itm": 0}),
        ("reversed", (0.1, 0.9), {"told": 0, "right": 0, "itc": 0, "itm": 0}),
        ("reversed", (0.9, 0.1), {"told": 1, "right": 1, "itc": 0, "itm": 0}),  # no true picture is on a shortlist
        ("decoyed", (0.9, 0.1), {"told": 1, "right": 1, "itc": 0, "itm": 1}),
        ("decoyed", (0.1, 0.9), {"told": 0, "right": 0, "itc": 0, "itm": 0}),
        ("decoyed", (0.5, 0.5), {"told": 0, "right": 0.5, "itc": 0, "itm": 0}),  # the cosine decides
        ("decoyed", (0.9, 0.6), {"told": 1, "right": 0.5, "itc": 0, "itm": 1}),
        ("right", (1.0, 1.0), {"told": 0, "right": 0.5, "itc": 1, "itm": 1}),
    ],
)
def test_a_model_that_is_known_has_known_figures(
    itc: str, itm: tuple[float, float], expected: dict[str, float]
) -> None:
    engine = Scripted(itc, itm)
    found = retrieval.figures(engine.held_out(), ["match", "embed"], GROUP)
    assert found == {
        "edits": N,
        "itm_edit_told": expected["told"],
        "itm_edit_right": expected["right"],
        "itc_recall_at_1": expected["itc"],
        "itm_recall_at_1": expected["itm"],
    }
    assert engine.calls == {"match": N, "embed image": 1, "embed text": 1}


def test_re_ranking_keeps_to_the_shortlist_and_adds_the_cosine() -> None:
    n = retrieval.TOP + 1
    cosines = np.linspace(0.9, 0.1, n)[None]
    group = retrieval.Group(3, cosines, np.zeros((1, n), bool))
    matches = [{"other": {"itm_logit": 9.0}}] * 3 + [
        {"a": {"itm_logit": x}} for x in [0.5, 1.5, 1.5, *[-2.0] * (n - 3)]
    ]
    scores = retrieval._reranked(group, ["?", "?", "?", "a"], matches)
    assert scores.argsort()[0, ::-1][:3].tolist() == [1, 2, 0]
    assert scores[0, -1] == -np.inf and np.isfinite(scores[0, :-1]).all()
    np.testing.assert_allclose(scores[0, 1], 1.5 + cosines[0, 1])


def test_what_a_bundle_lacks_is_left_out() -> None:
    engine = Scripted()
    assert list(retrieval.figures(engine.held_out(), ["embed"], GROUP)) == ["itc_recall_at_1"]
    assert "match" not in engine.calls
    assert list(retrieval.figures(Scripted().held_out(), ["match"], GROUP)) == ITM
    assert list(retrieval.figures(Scripted().held_out(), ["match", "embed"], N + 1)) == ITM


def test_scenes_without_an_edit_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    edit = drawing.one_word_edit
    monkeypatch.setattr(drawing, "one_word_edit", lambda c, s, rng: edit(c, s, rng) if "small" in c else None)
    engine = Scripted()
    found = retrieval.figures(engine.held_out(), ["match"], GROUP)
    assert 0 < found["edits"] < N and found["itm_edit_told"] == found["itm_edit_right"] == 1
    monkeypatch.setattr(drawing, "one_word_edit", lambda *_: None)
    assert retrieval.figures(engine.held_out(), ["match"], GROUP) == {"edits": 0}


def test_wrong_decisions_are_kept() -> None:
    held = Scripted("reversed", (0.1, 0.9)).held_out()
    retrieval.figures(held, ["match", "embed"], GROUP)
    kinds = Counter(row.get("by", "edit") for row in held.wrong)
    assert kinds == {"edit": N, "itc": 2 * GROUP, "itm": 2 * GROUP}
    assert json.loads(json.dumps(held.wrong)) == held.wrong


def test_captions_count_when_all_they_say_is_so() -> None:
    held = Scripted().held_out()
    written = [drawing.caption(s, random.Random(0)) if i % 3 else "a red dog" for i, s in enumerate(held.scenes)]
    held.engine.rows = lambda *_: [{"text": text} for text in written]  # type: ignore[attr-defined, method-assign]
    assert texts.captions(held) == round(2 / 3, 4)
    assert [row["caption"] for row in held.wrong] == ["a red dog"] * (N // 3)


def printed(capsys: pytest.CaptureFixture[str], model: Path, *typed: str) -> list[dict[str, Any]]:
    """The lines that the command prints."""
    assert ENGINE.exists(), f"{ENGINE} is not there; build it first (cargo build)"
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args(["--model", str(model), "--engine", str(ENGINE), "--side", "64", *typed]))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def evaluated(capsys: pytest.CaptureFixture[str], model: Path, *typed: str) -> list[dict[str, Any]]:
    """What the lines that the command prints say of the two kinds of scenes."""
    lines = printed(capsys, model, *typed)
    assert [line.pop("on") for line in lines] == ["held-out scenes", "unseen shape-colour pairs"]
    assert {line.pop("model") for line in lines} == {str(model)}
    return lines


def with_tasks(folder: Path, tasks: list[str]) -> Path:
    """The tiny stage-1 bundle, made to offer less."""
    shutil.copytree(STAGE1, folder / "bundle")
    facts = json.loads((STAGE1 / "bundle.json").read_text())
    (folder / "bundle" / "bundle.json").write_text(json.dumps({**facts, "tasks": tasks}))
    return folder / "bundle"


def test_a_stage_1_bundle_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.jsonl"
    for line in evaluated(capsys, STAGE1, "--count", "7", "--group", "3", "--wrong", str(wrong)):
        assert list(line) == ["scenes", "itg_true", *ITM, "itc_recall_at_1", "itm_recall_at_1"]
        assert line["scenes"] == line["edits"] == 7
        assert all(0 <= line[key] <= 1 for key in line if key not in ("scenes", "edits")), line
    assert wrong.read_text().count('"caption"') == 14, "random weights write no true caption"


def test_a_bundle_that_only_embeds_has_the_figure_of_itc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in evaluated(capsys, with_tasks(tmp_path, ["embed"]), "--count", "4", "--group", "4"):
        assert list(line) == ["scenes", "itc_recall_at_1"]


def test_tasks_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    for line in evaluated(capsys, STAGE1, "--count", "2", "--tasks", "match"):
        assert list(line) == ["scenes", *ITM]
    for line in evaluated(capsys, ROOT / "models" / "demo-opt", "--count", "2", "--tasks", "caption"):
        assert list(line) == ["scenes", "captions_true"]


def test_a_task_that_the_bundle_lacks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="cannot ask; it can caption, match, embed"):
        evaluated(capsys, STAGE1, "--tasks", "caption", "ask")
    with pytest.raises(SystemExit, match=r"no bundle\.json there"):
        evaluated(capsys, STAGE1 / "golden")


def test_the_shares_of_fewer_bits_and_of_float32_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = tmp_path / "bundle"
    shutil.copytree(ROOT / "tests" / "bundles" / "int8-stage1", narrow)
    before = json.loads((narrow / "bundle.json").read_text())
    lines = printed(capsys, narrow, "--count", "6", "--tasks", "match", "--against", str(STAGE1))
    facts = json.loads((narrow / "bundle.json").read_text())
    tasks = facts["loss"].pop("tasks")
    assert facts == before, "nothing else changes"
    assert tasks == {name: {"bundle": lines[0][name], "float32": lines[1][name]} for name in ITM if name != "edits"}
    assert len(lines) == 3, "unseen pairs are asked of the bundle alone"
    shown = subprocess.run(
        [str(ENGINE), "inspect", str(narrow)], capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert "itm_edit_told" in shown and "%, in float32" in shown


def test_figures_without_a_place_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    narrow = ROOT / "tests" / "bundles" / "int8-stage1"
    with pytest.raises(SystemExit, match="not all of its graphs are float32"):
        evaluated(capsys, narrow, "--against", str(narrow))
    with pytest.raises(SystemExit, match=r"has no `loss`"):
        evaluated(capsys, STAGE1, "--against", str(STAGE1))
