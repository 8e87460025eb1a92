"""Looking on while own pictures are learnt: measures, samples, the best checkpoint, log, event files, page, and when it ends."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from test_page import Browser, browser  # noqa: F401, a fixture
from torch import distributed, nn

from blip2_export.check import random_checkpoint
from blip2_export.scenes import dataset
from blip2_export.train.own import board, language, log, loop, measures, page, plots, records, stages, together, writing
from blip2_export.train.own.answers import accuracy, plain
from blip2_export.train.own.base import Base, open_base
from blip2_export.train.own.batches import Part, Sizes, captioned
from blip2_export.train.own.captions import clean
from blip2_export.train.own.held_out import HeldOut
from blip2_export.train.own.loop import Fit, Run, Schedule, Task
from blip2_export.train.own.pace import Pace
from blip2_export.train.own.pictures import Sight
from blip2_export.train.own.progress import Progress, Screen
from blip2_export.train.own.sources import DataError, File
from blip2_export.train.own.stage1 import Captions, Stage1
from blip2_export.train.own.stage2 import Stage2, Written
from blip2_export.train.own.start import Start, qformer, tokenizer

FAMILIES = {"opt": "odd-3", "t5": "t5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looking")
    for family, shape in FAMILIES.items():
        random_checkpoint.write(folder / family, shape, seed=4)
    dataset.write_dataset(folder / "data", 24, 0, 64)
    return folder


@pytest.fixture(scope="module")
def bases(folder: Path) -> dict[str, Base]:
    return {family: open_base(folder / family) for family in FAMILIES}


def setup(folder: Path, work: str, **more: Any) -> stages.Setup:
    places = {"data": [(folder / "data", 1.0)], "base": folder / "opt", "work": folder / work}
    usual = {"schedule": Schedule(4, warmup=1), "sizes": Sizes(4), "workers": 0, "measure_every": 2, "held_out": 0.2}
    return stages.Setup(**{**places, **usual, **more})


def rows(work: Path, phase: str) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (work / f"{phase}.jsonl").read_text().splitlines()]


# Measures


def stage1(base: Base, work: Path) -> Stage1:
    words = tokenizer(work, Start(), ["a red ring", "a blue star", "two boxes", "a small green disc near it"] * 9)
    return Stage1(qformer(base, Start(), len(words)), words, max_length=8).double().eval()


class Pixels:
    """Of a held-out part whose pictures are noise; the record's key tells which."""

    side = 4

    def pixels(self, data: bytes, _: Any) -> Any:
        return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(data[0])).numpy()


class Bytes:
    def __init__(self, n: int) -> None:
        self.n = n

    def read(self) -> bytes:
        return bytes([self.n])

    def size(self) -> int | None:
        return 1


SAID = [
    ["a red ring", "a ring"],
    ["a blue star"],
    ["two boxes", "boxes near it", "a red ring"],
    ["a green disc"],
    ["a small disc", "a disc"],
    ["a star near a box"],
    ["A blue star!"],
]


def known(size: int = 3) -> HeldOut:
    found = [records.Record(f"{n}.png", Bytes(n), said) for n, said in enumerate(SAID)]
    return HeldOut(found, Sight(Pixels()), size)  # type: ignore[arg-type]


def seen(model: Stage1, part: Part) -> Captions:
    width = model.qformer.cfg.encoder_hidden_size
    torch.manual_seed(3)
    features = part.pixels.flatten(1).double() @ torch.randn(48, 5 * width, dtype=torch.float64)
    said = part.said
    return Captions(features.reshape(-1, 5, width), said.ids, said.mask, said.picture, said.chances.double())


def said_of(model: Stage1) -> Callable[..., measures.Known]:
    say = captioned(model.encode)
    return lambda found, rng, chances: measures.Known(say(found, rng, chances), found)


def similarity(model: Stage1, features: torch.Tensor, text: str) -> float:
    """Of one picture and one text."""
    ids, mask = model.encode([text])
    image, vector = model.vectors(model.qformer.queries(features[None]), ids, mask)
    return max(float(query @ vector[0]) for query in image[0])


def match(model: Stage1, features: torch.Tensor, text: str) -> tuple[float, float]:
    no, yes = model.qformer.matching_logits(features[None], *model.encode([text]))[0].tolist()
    return no, yes


def features_of(model: Stage1, held_out: HeldOut) -> dict[str, torch.Tensor]:
    found = {}
    for part in held_out.parts(said_of(model)):
        batch = seen(model, replace(part, said=part.said.said))
        found |= dict(zip((record.key for record in part.said.records), batch.features, strict=True))
    return found


def recall(scores: dict[tuple[str, str], float], side: int, k: int) -> float:
    """R@k of the other side for each of one, from pairs of a picture's key and a text, one query after another."""
    true = {(f"{n}.png", clean(text)) for n, said in enumerate(SAID) for text in said}
    right = []
    for query in {pair[side] for pair in scores}:
        mine = {pair: score for pair, score in scores.items() if pair[side] == query}
        best = max(score for pair, score in mine.items() if pair in true)
        right.append(sum(score >= best for pair, score in mine.items() if pair not in true) < k)
    return sum(right) / len(right)


@torch.no_grad()
def test_retrieval_is_that_of_pairs_one_by_one(
    bases: dict[str, Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_TOGETHER", 20)  # of more texts and pairs
    model, held_out = stage1(bases["opt"], tmp_path), known()
    found = measures.of_stage1(model, held_out.parts(said_of(model)), lambda part: seen(model, part))
    features, texts = features_of(model, held_out), {clean(text) for said in SAID for text in said}
    scores = {(key, text): similarity(model, features[key], text) for key in features for text in texts}
    for side, name in enumerate(("text", "image")):
        for k in (1, 5):
            assert found[f"{name}_r{k}"] == pytest.approx(recall(scores, side, k)), (name, k)
    assert found["r1"] == pytest.approx((found["text_r1"] + found["image_r1"]) / 2)
    assert 0 < found["text_r5"] < 1 or 0 < found["image_r5"] < 1, (
        "a measure that is always right or wrong tells nothing"
    )
    # Matching comes on top of the eight most similar of each query.
    for side, name in enumerate(("text", "image")):
        again = dict(scores)
        for query in {pair[side] for pair in scores}:
            mine = sorted((pair for pair in scores if pair[side] == query), key=scores.__getitem__)
            for pair in mine[-8:]:
                again[pair] = scores[pair] + match(model, features[pair[0]], pair[1])[1]
            for pair in mine[:-8]:
                again[pair] = scores[pair] - 1e4
        assert found[f"reranked_{name}_r1"] == pytest.approx(recall(again, side, 1)), name
    alike = HeldOut([replace(record, key="a.png") for record in held_out.records], Sight(Pixels()), 3)  # type: ignore[arg-type]
    of_sets = measures.of_stage1(model, alike.parts(said_of(model)), lambda part: seen(model, part))
    assert all(of_sets[name] == pytest.approx(found[name]) for name in found if name.endswith(("r1", "r5"))), (
        "pictures of one name in several sets are several"
    )


@torch.no_grad()
def test_losses_and_matching_are_those_of_the_parts(bases: dict[str, Base], tmp_path: Path) -> None:
    model, held_out = stage1(bases["opt"], tmp_path), known()
    features = features_of(model, held_out)
    # A head that takes about half of all pairs for true ones.
    torch.manual_seed(1)
    nn.init.normal_(model.qformer.itm_head.weight, 0, 30)
    logits = [match(model, picture, text) for picture in features.values() for said in SAID for text in said]
    margins = sorted(yes - no for no, yes in logits)
    model.qformer.itm_head.bias[0] += sum(margins[len(margins) // 2 :][:2]) / 2
    found = measures.of_stage1(model, held_out.parts(said_of(model)), lambda part: seen(model, part))
    parts = [part.said.said for part in held_out.parts(said_of(model))]
    assert [len(said.captions) for said in parts] == [3, 4], "every record is in a part"
    right: dict[str, list[float]] = {"true": [], "drawn": [], "hard": []}
    itc, itg, n_tokens = 0.0, 0.0, 0
    for part in held_out.parts(said_of(model)):
        said, keys = part.said.said, [record.key for record in part.said.records]
        losses = model(seen(model, replace(part, said=said)))
        itc += float(losses["itc"]) * len(keys) / len(SAID)
        tokens = int(said.mask[:, 1:].sum())
        itg, n_tokens = itg + float(losses["itg"]) * tokens, n_tokens + tokens
        n = len(keys)
        similar = [[similarity(model, features[key], text) for text in said.captions] for key in keys]
        for i, key in enumerate(keys):
            others = [j for j in range(n) if j != i]
            no, yes = match(model, features[key], said.captions[i])
            right["true"].append(float(yes > no))
            drawn = others[int(float(said.chances[i, 0]) * len(others))]
            no, yes = match(model, features[key], said.captions[drawn])
            right["drawn"].append(float(yes <= no))
            text = max(others, key=lambda j: similar[i][j])
            image = max(others, key=lambda j: similar[j][i])
            for other, caption in ((key, said.captions[text]), (keys[image], said.captions[i])):
                no, yes = match(model, features[other], caption)
                right["hard"].append(float(yes <= no))
    share = {name: sum(told) / len(told) for name, told in right.items()}
    assert all(0 < value < 1 for value in share.values())
    assert sum(right["hard"][::2]) != sum(right["hard"][1::2]), (
        "the two kinds of hard pairs are to be told from each other"
    )
    assert found["itm_accuracy"] == pytest.approx((share["true"] + share["drawn"]) / 2)
    assert found["itm_hard_accuracy"] == pytest.approx((share["true"] + share["hard"]) / 2)
    assert found["itc"] == pytest.approx(itc) and found["itg"] == pytest.approx(itg / n_tokens)
    assert found["loss"] == pytest.approx(found["itc"] + found["itm"] + found["itg"])


def test_ranks_count_ties_against_the_model() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.2, 0.3, 0.4], [5.0, 1.0, 1.0]])
    true = torch.eye(3, dtype=torch.bool)
    assert measures.ranks(scores, true).tolist() == [1, 1, 2]
    assert measures.share(measures.ranks(scores, true), 1) == 0.0
    assert measures.share(measures.ranks(torch.ones(3, 3), true), 1) == 0.0, (
        "a model that says the same of all is not right"
    )
    for broken in (torch.full((3, 3), math.nan), torch.where(true, math.nan, 0.5), torch.where(true, 0.5, math.nan)):
        assert measures.share(measures.ranks(broken, true), 1) == 0.0, "nor is one that says nothing"


def test_what_is_held_out_may_be_smaller_than_a_part() -> None:
    say = lambda found, rng, chances: [record.key for record in found]  # noqa: E731
    for size, wanted in ((64, [7]), (4, [7]), (3, [3, 4]), (1, [2, 2, 3])):
        parts = [part.said for part in known(size).parts(say)]
        assert [len(keys) for keys in parts] == wanted, size
        assert sorted(itertools.chain(*parts)) == [f"{n}.png" for n in range(7)]
    assert [part.said for part in known().parts(say)] == [part.said for part in known().parts(say)]


def test_a_card_of_the_page_is_of_one_picture(folder: Path) -> None:
    """Though several sets have pictures of its name."""
    files = sorted((folder / "data").glob("*.png"))[:2]
    alike = HeldOut([records.Record("a.png", File(file), ["it"]) for file in files], Sight(Pixels()), 2)  # type: ignore[arg-type]
    found, thumbnails = alike.shown(2)
    assert len(alike) == 2 and len(found) == 1 == len(thumbnails)


def speaking(base: Base) -> Stage2:
    family = base.family
    speaks = language.of_family(family, base.model.language_model, base.tokenizer())
    model = Stage2(base.model.qformer, base.model.query_tokens, speaks)
    model.language_projection.load_state_dict(base.model.language_projection.state_dict())
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_perplexity_is_that_of_all_tokens(bases: dict[str, Base], family: str) -> None:
    model = speaking(bases[family])
    torch.manual_seed(1)
    width = bases[family].config.qformer_config.encoder_hidden_size
    said = [["a red ring", "two large blue stars near it"], ["a box"]]
    batches = []
    for captions in said:
        texts = model.language.texts([language.Text(i, "a photo of", text) for i, text in enumerate(captions)])
        batches.append(Written(torch.randn(len(captions), 5, width), texts))
    found = measures.of_language(model, [Part(torch.empty(0), batch) for batch in batches], lambda part: part.said)
    logs = []
    for batch in batches:
        logits = model.language.logits(model.prefix(batch), batch.texts).double().log_softmax(-1)
        for row, labels in enumerate(batch.texts.labels.tolist()):
            logs += [float(logits[row, place, token]) for place, token in enumerate(labels) if token != -100]
    assert found["lm"] == pytest.approx(-sum(logs) / len(logs), rel=1e-5) == found["loss"]
    assert found["perplexity"] == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-4)


# Questions


def left_out(answer: str, given: list[str]) -> float:
    """Every choice of nine, one after another."""
    found = []
    for one in range(len(given)):
        others = [text for n, text in enumerate(given) if n != one]
        found.append(min(sum(text == answer for text in others) / 3, 1.0))
    return sum(found) / len(found)


@pytest.mark.parametrize("n", range(11))
def test_the_accuracy_of_answers_leaves_each_person_out(n: int) -> None:
    given = ["red"] * n + ["blue"] * (10 - n)
    assert accuracy("red", given) == pytest.approx(left_out("red", given))
    assert accuracy("red", given) == pytest.approx(min(1.0, n * 0.3)), "the known values: 0, 0.3, 0.6, 0.9, 1"


def test_few_people_are_enough_for_an_accuracy() -> None:
    assert accuracy("Red.", ["red"]) == 1.0 and accuracy("blue", ["red"]) == 0.0
    assert accuracy("red", ["red", "red"]) == 1.0 and accuracy("red", ["red", "blue"]) == 0.5
    given = records.Question("what colour", records.weighted(["red", "red", "blue", "red"]), 4).given
    assert sorted(given) == ["blue", "red", "red", "red"]


def test_answers_are_compared_by_what_they_say() -> None:
    same = [
        ("The car", "car"),
        ("two", "2"),
        ("1,000", "1000"),
        ("Don't know!", "dont know"),
        ("3.5 m", "3.5 m"),
        ("a  b\n", "b"),
    ]
    for one, other in same:
        assert plain(one) == plain(other), one
    assert plain("12:30") == "12:30" and plain("yes.") == "yes" and plain("black/white") == "black white"
    assert plain("35") != plain("3.5")


# Texts


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_texts_are_those_of_the_reference(bases: dict[str, Base], family: str) -> None:
    """`transformers` writes them one by one; here they have different lengths in one batch."""
    base, model = bases[family], speaking(bases[family])
    side = base.config.vision_config.image_size
    torch.manual_seed(2)
    pixels = torch.randn(3, 3, side, side)
    reads = ["", "a photo of", "Question: what is it? Answer:"]
    picture = model.language.so_far(reads, [[]] * 3).texts
    prefix = model.prefix(Written(base.vision(pixels).last_hidden_state, picture))
    mine = writing.texts(model.language, prefix, reads, 7)
    assert len(set(mine)) > 1, "random models must say different things of different prompts"
    start = [base.model.config.text_config.bos_token_id] if family == "opt" else []
    for row, read in enumerate(reads):
        words = (
            model.language.tokenizer(read, add_special_tokens=family == "t5").input_ids
            if read or family == "t5"
            else []
        )
        ids = torch.tensor([[base.config.image_token_index] * base.config.num_query_tokens + start + words])
        found = base.model.generate(
            pixel_values=pixels[row : row + 1],
            input_ids=ids,
            max_new_tokens=7,
            do_sample=False,
            num_beams=1,
            min_length=0,
            eos_token_id=sorted(model.language.ends),
        )
        new = found[0, ids.shape[1] :] if family == "opt" else found[0]
        assert mine[row] == base.tokenizer().decode(new, skip_special_tokens=True).strip(), (row, read)


@torch.no_grad()
def test_captions_of_stage_1_are_the_likeliest_words(bases: dict[str, Base], tmp_path: Path) -> None:
    model = stage1(bases["opt"], tmp_path)
    torch.manual_seed(0)
    # Distinct words for distinct pictures.
    nn.init.normal_(model.qformer.query_tokens, 0, 2)
    nn.init.normal_(model.qformer.head_bias, 0, 0.1)
    features = torch.randn(3, 5, model.qformer.cfg.encoder_hidden_size, dtype=torch.float64) * 3
    mine = writing.captions(model, features)
    words = model.tokenizer
    for row, caption in enumerate(mine):
        ids = [words.bos_token_id]
        while len(ids) < model.max_length and ids[-1] != words.sep_token_id:
            now = torch.tensor([ids])
            logits = model.qformer.captioning(features[row : row + 1], now, torch.ones_like(now))[1]
            ids.append(int(logits[0, -1].argmax()))
        assert caption == words.decode([i for i in ids if i != words.sep_token_id], skip_special_tokens=True).strip()
        whole = torch.tensor([ids])
        logits = model.qformer.captioning(features[row : row + 1], whole, torch.ones_like(whole))[1]
        assert logits[0, :-1].argmax(-1).tolist() == ids[1:], "one pass over the whole caption says the same"


# The loop


class Line(nn.Module):
    """y = w x, with noise, and a part that is not to be in training."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.noise = nn.Dropout(0.5)
        self.still = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"square": (self.still(self.noise(x)) @ self.w - x.sum(1)).square().mean(), "_bias": self.w.mean()}


def fitted(work: Path, steps: int = 6, measure: Any = None, sample: Any = None, **more: Any) -> Fit:
    from accelerate import Accelerator

    facts = {"steps": steps}
    better = more.pop("better", ("loss", False))
    run = Run(
        "line",
        work,
        Schedule(steps, 0.1, warmup=1),
        workers=0,
        facts=facts,
        **{"measure_every": 2, "log_every": 2, **more},
    )
    torch.manual_seed(0)
    model = Line()
    parts = lambda step: [torch.randn(4, 3, generator=torch.Generator().manual_seed(step))]  # noqa: E731
    task = Task(model, parts, lambda m, x: m(x), measure, better, sample, notes=lambda _: {})
    return Fit(run, task, Accelerator(cpu=True))


def test_what_a_killed_run_left_half_written_is_removed_with_the_next(tmp_path: Path) -> None:
    """Of its own files alone."""
    names = ["line.pt.part", "line_best.pt.part", "line.jsonl.part", "line.html.part", "other.pt.part", "line.pt.parts"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    fitted(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names[4:])


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Neither the random state, nor which modules are in training."""
    modes = []

    def measure(model: Line) -> dict[str, float]:
        assert not model.training and not model.noise.training and not torch.is_grad_enabled()
        modes.append(model)
        return {"loss": float(torch.rand(()))}

    def sample(model: Line) -> list[dict[str, Any]]:
        torch.manual_seed(99)
        return [{"picture": "a", "said": str(float(torch.rand(()))), "true": []}]

    # The noise of a step is drawn anew at its start; this is what a step draws after it was looked at.
    plain_run = fitted(tmp_path / "one")
    looked = fitted(tmp_path / "other", measure=measure, sample=sample, sample_every=1)
    state = []
    update = looked._update

    def after(step: int, parts: list[Any]) -> dict[str, float]:
        looked.task.model.still.eval()
        found = update(step, parts)
        state.append(torch.random.get_rng_state())
        return found

    looked._update = after  # type: ignore[method-assign]
    still = plain_run._update
    plain_run._update = lambda *given: (plain_run.task.model.still.eval(), still(*given))[1]  # type: ignore[method-assign]
    plain_run.go()
    looked.go()
    assert torch.equal(plain_run.trained["w"], looked.trained["w"]) and modes
    assert torch.equal(torch.random.get_rng_state(), state[-1])
    model = looked.task.model
    assert model.training and model.noise.training and not model.still.training


def values(*given: float) -> Callable[[Any], dict[str, float]]:
    left = iter(given)
    return lambda _: {"loss": next(left), "accuracy": 0.5}


def test_the_best_weights_are_those_of_the_best_measurement(tmp_path: Path) -> None:
    found: list[torch.Tensor] = []

    def measure(model: Line) -> dict[str, float]:
        found.append(model.w.detach().clone())
        return {"loss": [3.0, 1.0, 2.0][len(found) - 1]}

    fit = fitted(tmp_path, measure=measure)
    fit.go()
    last = fit.trained["w"].detach().clone()
    assert "the last weights, of step 6" in fit.take(best=False) and torch.equal(fit.trained["w"], last)
    assert "the best weights by loss (1), of step 4; the last step was 6" in fit.take(best=True)
    assert torch.equal(fit.trained["w"], found[1]) and not torch.equal(last, found[1])
    again = fitted(tmp_path, measure=measure)
    again.go()
    again.take(best=True)
    assert torch.equal(again.trained["w"], found[1]), "a finished run that is called again gives the same"
    better = [row["better"] for row in rows(tmp_path, "line") if "held_out" in row]
    assert better == [True, True, False] and rows(tmp_path, "line")[-1]["best_step"] == 4


def test_more_can_be_better_and_what_is_no_number_never_is(tmp_path: Path) -> None:
    left = iter([math.nan, 0.25, 0.75])
    fit = fitted(tmp_path, measure=lambda _: {"accuracy": next(left)}, better=("accuracy", True))
    fit.go()
    assert fit.best.step == 6 and fit.best.value == 0.75
    assert [row["held_out"]["accuracy"] for row in rows(tmp_path, "line") if "held_out" in row] == [None, 0.25, 0.75]


def test_of_equal_measurements_the_one_of_a_lower_loss_is_better(tmp_path: Path) -> None:
    """Else a model that has no answer right yet would be written as it was at its first measurement."""
    left = iter([(0.0, 3.0), (0.0, 2.0), (0.0, 2.5)])

    def measure(_: Line) -> dict[str, float]:
        return dict(zip(("accuracy", "loss"), next(left), strict=True))

    fit = fitted(tmp_path, measure=measure, better=("accuracy", True))
    fit.go()
    assert fit.best.step == 4 and fit.best.since == 1
    assert not fit.best.is_less_than(-0.1, 0.0, True) and fit.best.is_less_than(0.1, 9.0, True)


def test_nothing_measured_gives_the_last_weights(tmp_path: Path) -> None:
    fit = fitted(tmp_path)
    fit.go()
    assert "nothing was measured" in fit.take(best=True)


def test_patience_ends_a_run_and_more_of_it_goes_on(tmp_path: Path) -> None:
    fit = fitted(tmp_path, 20, values(2.0, 1.0, 1.5, 1.2, 1.1), patience=2)
    fit.go()
    assert fit.step == 8 and fit.best.step == 4 and loop.read(fit.run.checkpoint)["step"] == 8
    ended = rows(tmp_path, "line")[-1]
    assert (ended["step"], ended["ended"], ended["best_step"]) == (8, "not better for 2 measurements", 4)
    again = fitted(tmp_path, 20, values(), patience=2)
    again.go()
    assert again.step == 8, "it is over"
    more = fitted(tmp_path, 20, values(1.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), patience=4)
    more.go()
    assert more.step == 20 and more.best.step == 12


def test_a_measure_that_is_unknown_is_refused() -> None:
    with pytest.raises(DataError, match=r"--best-by wer: stage2 is measured by loss, cider, bleu4$"):
        measures.better("stage2", "wer")
    assert measures.better("vqa", "accuracy") == ("accuracy", True) and measures.better("stage1") == ("loss", False)
    assert measures.better("stage1", "r1") == ("r1", True)


def killed(fit: Fit, at: int) -> None:
    """After that step's update; at the end of the step it would have been saved."""
    update = fit._update

    def dies(step: int, parts: list[Any]) -> dict[str, float]:
        if step == at:
            raise KeyboardInterrupt
        return update(step, parts)

    fit._update = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit.go()


def of_weights(model: Line) -> dict[str, float]:
    return {"loss": abs(float(model.w.mean()) - 0.2)}


@pytest.mark.parametrize("at", range(1, 8))
def test_a_run_that_was_killed_has_the_log_and_the_best_of_one_that_was_not(tmp_path: Path, at: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fitted(whole, 8, of_weights).go()
    killed(fitted(broken, 8, of_weights), at)
    with (broken / "line.jsonl").open("a") as torn:
        torn.write('{"step": 3, "squ')
    fit = fitted(broken, 8, of_weights)
    fit.go()
    said = [
        [(row["step"], row["held_out"], row["better"]) for row in rows(work, "line") if "held_out" in row]
        for work in (whole, broken)
    ]
    assert said[0] == said[1] and len(said[0]) == 4
    steps = [row["step"] for row in rows(broken, "line") if "rate" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    best = [loop.read(work / "line_best.pt") for work in (whole, broken)]
    assert best[0]["step"] == best[1]["step"] and torch.equal(best[0]["model"]["w"], best[1]["model"]["w"])
    assert fit.take(best=True)


def test_a_run_that_begins_anew_has_no_best_weights_of_another(tmp_path: Path) -> None:
    """Whose checkpoint is gone: what goes on from this folder would take them for its own."""
    fitted(tmp_path, measure=of_weights).go()
    (tmp_path / "line.pt").unlink()
    fitted(tmp_path).go()
    assert not (tmp_path / "line_best.pt").exists()


def test_best_weights_that_were_not_written_in_time_are_written_on_going_on(tmp_path: Path) -> None:
    fit = fitted(tmp_path, 8, of_weights)

    def dies() -> None:
        raise KeyboardInterrupt

    fit._save_best = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit.go()
    assert not fit.run.best.exists() and loop.read(fit.run.checkpoint)["best"]["step"] == 2
    again = fitted(tmp_path, 8, of_weights)
    again._resume()
    assert loop.read(again.run.best)["step"] == 2


# The whole chain


def test_all_phases_are_looked_at(folder: Path) -> None:
    said = setup(folder, "all", tensorboard=True, samples=2)
    stages.train_stage1(said, None)
    first = rows(said.work, "stage1")
    assert {"settings", "machine"} <= first[0].keys() and first[0]["settings"]["batch"] == 4
    assert {"itc", "itm", "itg", "rate", "gradient_norm", "pictures_per_s", "step_s", "left_s"} <= next(
        row for row in first if "rate" in row
    ).keys()
    held_out = [row["held_out"] for row in first if "held_out" in row]
    assert len(held_out) == 3 and measures.MORE_IS_BETTER["stage1"].keys() <= held_out[-1].keys()
    samples = [row["samples"] for row in first if "samples" in row]
    assert len(samples) == 2 and [one["picture"] for one in samples[0]] == [one["picture"] for one in samples[1]]
    assert len(samples[0]) == 2 and samples[0][0]["true"]
    stages.train_stage2(said, folder / "spoken")
    measured = [row["held_out"] for row in rows(said.work, "stage2") if "held_out" in row]
    assert measured[-1]["perplexity"] == pytest.approx(math.exp(measured[-1]["lm"]), rel=1e-6)
    for phase in ("stage1", "stage2"):
        text = (said.work / f"{phase}.html").read_text()
        assert text.count("<img ") == 2 and "all steps are done" in text and "Held out" in text
        assert list((said.work / "tensorboard" / phase).glob("events.out.tfevents.*"))


def test_questions_are_answered_and_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = sorted((folder / "data").rglob("*.png"))[:12]
    asked = [
        {
            "image": str(p.relative_to(folder / "data")),
            "question": f"what is it {n}?",
            "answers": ["ring"] * 3 + ["box"],
        }
        for n, p in enumerate(pictures)
    ]
    (folder / "data" / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    said = setup(folder, "asked", data=[(folder / "data" / "asked.jsonl", 1.0)], qformer=folder / "opt", held_out=0.4)
    stages.train_questions(said, tmp_path / "answers", 42, 1)
    found = rows(said.work, "vqa")
    measured = [row["held_out"]["accuracy"] for row in found if "held_out" in row]
    assert len(measured) == 3 and all(0 <= accuracy <= 1 for accuracy in measured)
    samples = next(row["samples"] for row in found if "samples" in row)
    assert samples[0]["asked"].startswith("what is it") and samples[0]["true"] == ["ring", "box"]
    assert found[0]["settings"]["better"] == "accuracy"
    assert f"  {samples[0]['picture']}: {samples[0]['asked']} " in capsys.readouterr().err


# Several processes


def _measures(rank: int, port: int, folder: Path, work: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, held_out = stage1(open_base(folder / "opt"), work), known(64)
    with torch.no_grad(), together.alone():
        assert together.size() == 1
        found = measures.of_stage1(model, held_out.parts(said_of(model)), lambda part: seen(model, part))
        told = together.agreed({**found, "who": rank})
    assert together.size() == 2 and told["who"] == 0
    (work / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def test_every_process_measures_the_same(folder: Path, bases: dict[str, Base], tmp_path: Path) -> None:
    model, held_out = stage1(bases["opt"], tmp_path), known(64)
    with torch.no_grad():
        wanted = measures.of_stage1(model, held_out.parts(said_of(model)), lambda part: seen(model, part))
    processes.two(_measures, folder, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(wanted, rel=1e-9)


# The log


def test_a_log_has_whole_lines_of_numbers_that_json_knows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    kept = log.Log(file, 0)
    kept.add({"step": 1, "loss": math.nan, "more": {"norm": [math.inf, 1.0]}, "text": "ä\u2028\n"})
    assert file.read_bytes().count(b"\n") == 1 and b"NaN" not in file.read_bytes()
    assert (
        log.read(file) == [{"step": 1, "loss": None, "more": {"norm": [None, 1.0]}, "text": "ä\u2028\n"}] == kept.rows
    )
    for step in (2, 3, 4):
        kept.add({"step": step})
    with file.open("ab") as torn:
        torn.write(b'{"step": 5, "lo')
    assert [row["step"] for row in log.read(file)] == [1, 2, 3, 4]
    assert [row["step"] for row in log.Log(file, 3).rows] == [1, 2, 3] == [row["step"] for row in log.read(file)]
    for row in ({"step": 2, "held_out": {}}, {"step": 3, "samples": []}):
        kept.add(row)
    assert log.read(file)[-2:] == [{"step": 2, "held_out": {}}, {"step": 3, "samples": []}]
    rows_ = log.Log(file, 3, 2).rows
    assert rows_[-1] == {"step": 2, "held_out": {}} and len(rows_) == 4, "stopped in front of a measurement"
    assert log.Log(file, 0).rows == [] == log.read(file), "a run that begins anew has no lines of another"


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    kept = log.Log(tmp_path / "a.jsonl", 0)
    kept.file = Path("/dev/full")
    with pytest.raises(DataError, match="it cannot be written"):
        kept.add({"step": 1})


# TensorBoard


def _messages() -> type:
    """Of tensorflow's `event.proto`, as far as it is used, by the names that stand there."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str | None, bool]) -> None:
        made = file.message_type.add(name=name)
        for label, number, kind, of, many in fields:
            made.field.add(name=label, number=number, type=kind, type_name=of, label=3 if many else 1)

    nested, text = field.TYPE_MESSAGE, field.TYPE_STRING
    message("Dim", ("size", 1, field.TYPE_INT64, None, False))
    message("Shape", ("dim", 2, nested, ".t.Dim", True))
    message(
        "Tensor",
        ("dtype", 1, field.TYPE_INT32, None, False),
        ("tensor_shape", 2, nested, ".t.Shape", False),
        ("string_val", 8, field.TYPE_BYTES, None, True),
    )
    message("Plugin", ("plugin_name", 1, text, None, False))
    message("Metadata", ("plugin_data", 1, nested, ".t.Plugin", False))
    message(
        "Value",
        ("tag", 1, text, None, False),
        ("simple_value", 2, field.TYPE_FLOAT, None, False),
        ("tensor", 8, nested, ".t.Tensor", False),
        ("metadata", 9, nested, ".t.Metadata", False),
    )
    message("Summary", ("value", 1, nested, ".t.Value", True))
    message(
        "Event",
        ("wall_time", 1, field.TYPE_DOUBLE, None, False),
        ("step", 2, field.TYPE_INT64, None, False),
        ("file_version", 3, text, None, False),
        ("summary", 5, nested, ".t.Summary", False),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def crc32c(content: bytes) -> int:
    """Bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        for bit in range(8):
            carry = (crc ^ byte >> bit) & 1
            crc = crc >> 1 ^ (0x82F63B78 if carry else 0)
    return crc ^ 0xFFFFFFFF


def events(folder: Path) -> list[Any]:
    (file,) = folder.glob("events.out.tfevents.*")
    content, found, kind = file.read_bytes(), [], _messages()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        for covered, at in ((content[:8], 8), (content[12 : 12 + length], 12 + length)):
            crc = crc32c(covered)
            masked = ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32
            assert struct.unpack("<I", content[at : at + 4]) == (masked,)
        found.append(kind.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_an_event_file_says_what_the_log_does(tmp_path: Path) -> None:
    assert board.crc32c(b"123456789") == 0xE3069283 == crc32c(b"123456789"), "the known value of CRC-32C"
    logged: list[log.Row] = [
        {"step": 0, "settings": {"steps": 9}},
        {"step": 300, "steps": 50, "itc": 1.5, "rate": 1e-5, "bad": None, "at": 1700000000.5},
        {"step": 300, "held_out": {"loss": 2.25, "r1": None, "perplexity": 1e300}, "better": True, "at": 1700000001.0},
    ]
    (tmp_path / "events.out.tfevents.1.1").write_bytes(b"of a run that was killed")
    kept = board.Board(tmp_path, logged)
    kept.add({"step": 70_000, "samples": [{"picture": "a.jpg", "said": "a dög"}], "at": 1.0})
    first, *others = events(tmp_path)
    assert first.file_version == "brain.Event:2"
    said = [(e.step, v.tag, v.simple_value) for e in others[:2] for v in e.summary.value]
    assert said[:3] == [(300, "train/itc", 1.5), (300, "train/rate", pytest.approx(1e-5)), (300, "held_out/loss", 2.25)]
    assert said[3:] == [(300, "held_out/perplexity", math.inf)], "more than its 32 bits hold"
    assert others[0].wall_time == 1700000000.5
    text = others[2].summary.value[0]
    assert (others[2].step, text.tag, text.metadata.plugin_data.plugin_name) == (70_000, "samples/0", "text")
    assert text.tensor.dtype == 7 and text.tensor.tensor_shape.dim[0].size == 1
    assert text.tensor.string_val[0].decode() == "a.jpg: a dög"


# How long it takes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lasted(clock: Clock, pace: Pace, steps: int, jitter: Callable[[int], float]) -> list[tuple[float, float]]:
    """For every step when it was done, and what was said to be left."""
    found, saved = [], clock.now
    for step in range(steps):
        clock.now += (30 if step == 0 else 1) * jitter(step)
        pace.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            with pace.aside("measure"):
                clock.now += 25
        if clock.now - saved > 60:
            with pace.aside("save"):
                clock.now += 6
            saved = clock.now
        found.append((clock.now, pace.left(step + 1, steps)))
    return found


def test_a_change_of_speed_is_noticed() -> None:
    clock = Clock()
    pace = Pace({"measure": 100}, {"save": 60}, clock)
    found = lasted(clock, pace, 1000, lambda step: 1 if step < 500 else 2)
    assert found[620][1] == pytest.approx(clock.now - found[620][0], rel=0.1)
    assert found[-1][1] == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_and_a_file_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        clock = Clock()
        run = Run("line", tmp_path, Schedule(10), log_every=5, pictures=8)
        progress = Progress(run, 0, True, screen=Screen(stream, clock))
        for step in range(10):
            clock.now += 2
            progress.add({"square": 1 / (step + 1), "_rate": 1e-5}, [{"b\x1b[2Jd.png": "why"}] if step == 2 else [])
        progress.close()
        shown[type(stream)] = stream.getvalue()
    drawn = shown[Terminal].split("\r\x1b[K")
    assert len(drawn) > 8 and all("\n" not in line or "warning" in line for line in drawn[:-1])
    assert all(len(line.split("\n")[-1]) < 60 for line in drawn) and shown[Terminal].endswith("\n")
    lines = shown[io.StringIO].splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning", "line 5 of 10", "line 10 of 10"]
    assert "4 pictures/s" in lines[1] and "10 s left" in lines[1] and "\x1b" not in shown[io.StringIO]


def test_means_are_over_the_steps_since_the_last_line(tmp_path: Path) -> None:
    clock = Clock()
    run = Run("line", tmp_path, Schedule(4), log_every=2, pictures=6)
    progress = Progress(run, 0, True, screen=Screen(io.StringIO(), clock))
    for loss in (1.0, 3.0, 5.0, 6.0):
        clock.now += 3
        progress.add({"square": loss, **({"_gradient_norm": 1.0} if loss > 1 else {})}, [])
    found = [row for row in rows(tmp_path, "line") if "square" in row]
    assert [(row["step"], row["steps"], row["square"]) for row in found] == [(2, 2, 2.0), (4, 2, 5.5)]
    assert found[0]["gradient_norm"] == 1.0, "it was not finite once"
    assert found[0]["step_s"] == 3 and found[0]["pictures_per_s"] == 2 and found[0]["left_s"] == 6


# The page

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def hostile() -> list[log.Row]:
    made: list[log.Row] = [{"step": 0, "settings": {HOSTILE: HOSTILE}, "machine": {"device": HOSTILE}}]
    for step in range(50, 2001, 50):
        numbers = {
            "itc": 5 / step**0.3,
            "itm": 0.6,
            "itm_right": 0.7,
            "rate": 1e-4,
            "gradient_norm": 1.0,
            "temperature": 0.07,
        }
        made.append({"step": step, "steps": 50, **numbers, "pictures_per_s": 40.0, "step_s": 1.6, "left_s": 9000.0})
        if step % 500 == 0:
            measured = {"loss": 2 - step / 2000, "itc": 1.0, "itm": None, "r1": step / 4000, HOSTILE: 1.0}
            made.append({"step": step, "held_out": measured, "better": True, "took_s": 2.0})
            sample = {"picture": HOSTILE, "asked": HOSTILE, "said": HOSTILE, "true": [HOSTILE]}
            made.append({"step": step, "samples": [sample, {"picture": "b.jpg", "said": "", "true": []}]})
    return [*made, {"step": 2000, "bad": {HOSTILE: HOSTILE}}, {"step": 2000, "ended": HOSTILE, "best_step": 2000}]


def test_texts_on_the_page_are_only_texts() -> None:
    text = page.document(HOSTILE, hostile(), {HOSTILE: b"\xff\xd8jpeg"})
    assert "<script" not in text and "<img src" not in text and text.count("&lt;script&gt;") > 10
    assert 'src="data:image/jpeg;base64,/9hqcGVn"' in text
    assert "http" not in text.replace("http-equiv", ""), "nothing is asked for elsewhere"


def test_a_page_of_nothing_is_a_page() -> None:
    assert "no step is logged yet" in page.document("stage1", [], {})
    assert "under way" in page.document("stage1", [{"step": 1, "rate": 1e-4, "itc": None, "left_s": None}], {})
    overflowed = [{"step": 1, "rate": 1e-4, "itc": 2.5}, {"step": 2, "rate": 1e-4}]
    assert "itc: loss" in page.document("stage1", overflowed, {}), "though its last step has none"
    assert plots.short(1e300) == "1e+300" and plots.short(123456) == "123456"


def test_long_lines_are_thinned_to_means() -> None:
    points = [(float(n), float(n % 2)) for n in range(5000)]
    found = plots.thinned(points)
    assert len(found) <= 400 and found[3][1] == pytest.approx(0.5, abs=0.05)
    assert plots.thinned(points[:400]) == points[:400]
    drawn = plots.figure("one", [plots.Line("a", [(1.0, 2.0)])])
    assert "<circle" in drawn and "nan" not in drawn and plots.figure("none", [plots.Line("a", [])]) == ""


def test_the_page_is_drawn_without_a_script_on_any_screen(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    page.write(tmp_path / "stage1.html", "stage1", hostile(), {})
    for size, dark in (((1280, 900), False), ((360, 740), True)):
        with browser.tab() as tab:
            tab.open((tmp_path / "stage1.html").as_uri(), size, dark)
            assert tab.see("document.documentElement.scrollWidth") <= size[0], "nothing sticks out"
            assert tab.see("document.scripts.length") == 0 and tab.see("document.images.length") == 0
            assert tab.see("document.querySelectorAll('svg path').length") >= 8
            assert tab.see("getComputedStyle(document.body).backgroundColor") == (
                "rgb(22, 24, 26)" if dark else "rgb(251, 251, 250)"
            )
            assert HOSTILE in tab.see("document.body.innerText") and tab.faults() == []
            requests = tab.see("performance.getEntriesByType('resource').length")
            assert requests == 0, "nothing is asked for elsewhere"
