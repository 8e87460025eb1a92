"""`train stage1`, `stage2` and `vqa` as a person types them: what they leave, and what they say of what cannot be."""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, Blip2ForConditionalGeneration, PreTrainedTokenizerFast

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.reference.load import load
from blip2_export.scenes import dataset
from blip2_export.scenes.held_out import Engine
from blip2_export.train import cli, text
from blip2_export.train.own import (
    chain,
    estimate,
    evaluation,
    folders,
    language,
    length,
    loop,
    options,
    pace,
    questions,
    records,
    sources,
    split,
    start,
    together,
)
from blip2_export.train.own.base import open_base
from blip2_export.train.own.batches import Sizes
from blip2_export.train.own.captions import clean
from blip2_export.train.own.length import Length
from blip2_export.train.own.loop import Schedule

SHORT = (
    "--steps",
    "3",
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--held-out",
    "0.2",
    "--measure-every",
    "3",
    "--samples",
    "1",
)
UNMEASURED = (*SHORT, "--held-out", "0")
FAMILIES = {"opt": "odd-3", "t5": "t5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    for family, shape in FAMILIES.items():
        random_checkpoint.write(folder / family, shape, seed=4)
    dataset.write_dataset(folder / "data", 24, 0, 64)
    asked = json.loads((folder / "data" / "questions.json").read_text())
    (folder / "data" / "plain.json").write_text(
        json.dumps([{**row, "image": f"{row['image_id']:06}.png"} for row in asked])
    )
    return folder


def train(*typed: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in typed]))


def places(folder: Path, family: str, work: Path, data: str = "data") -> list[object]:
    return ["--data", folder / data, "--base", folder / family, "--work", work]


def refused(capsys: pytest.CaptureFixture[str], *typed: object) -> str:
    """The one sentence."""
    capsys.readouterr()
    assert train(*typed) == 1
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    assert len(said) == 1 and said[0] == lines[-1] and not any("Traceback" in line for line in lines), lines
    return said[0]


# What they leave


def test_a_stage_is_a_program_that_tells_how_long_it_will_take(folder: Path, tmp_path: Path) -> None:
    typed = [sys.executable, "-m", "blip2_export", "train", "stage1", *places(folder, "opt", tmp_path / "work"), *SHORT]
    command = [str(word) for word in typed]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"stage1: 3 steps of about \S+ s are .*; \S+ GiB of memory were needed so far", done.stderr)
    assert "0 s left" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "work" / "stage1.jsonl").read_text().splitlines()]
    assert any({"itc", "itm", "itg"} <= row.keys() for row in rows)


def test_the_q_former_starts_from_bert(folder: Path, tmp_path: Path) -> None:
    width = json.loads((folder / "opt" / "config.json").read_text())["qformer_config"]
    tokenizer = text.train_qformer_tokenizer(text.corpus(50, "bert"), 300)
    torch.manual_seed(3)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    bert = BertModel(
        BertConfig(vocab_size=len(tokenizer) - 1, max_position_embeddings=40, **{key: width[key] for key in sizes})
    )
    bert.save_pretrained(tmp_path / "bert")
    named = {key: value for key, value in tokenizer.special_tokens_map.items() if key != "bos_token"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **named).save_pretrained(tmp_path / "bert")
    begins = start.Start(tmp_path / "bert")
    made = start.qformer(open_base(folder / "opt"), begins, len(start.tokenizer(tmp_path / "work", begins, [])))
    own, theirs = made.qformer.state_dict(), bert.state_dict()
    same = {
        "encoder.layer.0.attention.attention.query.weight": "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.1.intermediate_query.dense.weight": "encoder.layer.1.intermediate.dense.weight",
        "encoder.layer.1.intermediate.dense.weight": "encoder.layer.1.intermediate.dense.weight",
        "encoder.layer.1.output_query.LayerNorm.weight": "encoder.layer.1.output.LayerNorm.weight",
    }
    for mine, theirs_name in same.items():
        assert torch.equal(own[mine], theirs[theirs_name]), mine
    words = theirs["embeddings.word_embeddings.weight"]
    assert torch.equal(made.embeddings.word_embeddings.weight[: len(words)], words)


def test_captions_are_cleaned_as_in_lavis() -> None:
    assert clean("What's the time? 5:30") == "what's the time? 5 30"


def test_a_length_is_steps_or_epochs_and_warms_up_a_tenth_at_most() -> None:
    def length(**said: int) -> tuple[int, int]:
        found = Length(**said).schedule(Schedule(1), 5000, 64)
        return found.steps, found.warmup

    assert length() == (782, 78)
    assert length(epochs=1000) == (78_125, 2000)
    assert length(steps=100, warmup=90) == (100, 90)


def test_ten_measurements_in_a_run_or_one_an_epoch_but_few_of_a_tiny_set() -> None:
    cases = {
        (782, 5000, 64): 79,
        (300, 320, 32): 10,
        (250_000, 129_000_000, 1680): 25_000,
        (1000, 24, 64): 20,
        (3, 9, 4): 1,
    }
    assert {case: length.measure_every(*case) for case in cases} == cases


def test_defaults_are_those_that_the_help_tells() -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    must = ["--data", "d", "--base", "b", "--work", "w", "--out", "o"]
    first, second, third = (
        options.setup(parser.parse_args([stage, *must]), stage) for stage in ("stage1", "stage2", "vqa")
    )
    ends = [setup.schedule.learning_rate * setup.schedule.floor for setup in (first, second, third)]
    assert ends == pytest.approx([1e-5, 5e-5, 0])  # LAVIS, paper, LAVIS
    assert [setup.schedule.betas[1] for setup in (first, second, third)] == [0.98, 0.98, 0.999]
    assert first.held_out == 0.02 and third.schedule.learning_rate == 1e-5
    assert first.length is not None and first.length.epochs == 10
    kept = parser.parse_args(["vqa", *must, "--lora", "both", "--cache-features", "c"])
    assert options.setup(kept, "vqa").features == Path("c")


def test_what_one_stage_alone_is_measured_by_is_for_that_one() -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)

    def better(name: str) -> list[str]:
        args = parser.parse_args(["all", "--data", "d", "--base", "b", "--work", "w", "--out", "o", "--best-by", name])
        return [cli._plan(args, stage, stage).setup.better for stage in ("stage1", "stage2")]

    assert [better(name) for name in ("cider", "r1", "loss")] == [["", "cider"], ["r1", ""], ["loss", "loss"]]
    assert better("beauty") == ["beauty", "beauty"], "which is refused"


def test_a_set_has_a_weight_unless_its_name_does(tmp_path: Path) -> None:
    (tmp_path / "a=2").mkdir()
    assert options.weighted(f"{tmp_path}/a=2") == (tmp_path / "a=2", 1.0)
    assert options.weighted(f"{tmp_path}/a=2=0.5") == (tmp_path / "a=2", 0.5)
    assert options.weighted("b=half") == (Path("b=half"), 1.0)
    assert options.share_or_path("0.1") == 0.1 and options.share_or_path("c") == Path("c")


# Questions


@pytest.fixture(scope="module")
def second(folder: Path) -> dict[str, Path]:
    """What stage 2 leaves, of each family, beside the work folder of stage 1."""
    found = {}
    for family in FAMILIES:
        work = folder / f"work-{family}"
        assert train("stage1", *places(folder, family, work), *SHORT) == 0
        found[family] = folder / f"second-{family}"
        assert train("stage2", *places(folder, family, work), *SHORT, "--out", found[family]) == 0
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_train_what_sees_and_reads_and_leave_what_writes(
    folder: Path, second: dict[str, Path], family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = folder / f"work-{family}", folder / f"answers-{family}"
    typed = ["--data", folder / "data" / "plain.json", "--base", second[family], "--work", work]
    assert train("vqa", *typed, *SHORT, "--learning-rate", "1e-3", "--image-size", "42", "--out", out) == 0
    told = capsys.readouterr().err
    assert f"the Q-Former is that of {work / 'stage1_best.pt'}, step 3 of 3" in told and "reads no texts" not in told
    before = Blip2ForConditionalGeneration.from_pretrained(second[family])
    after = Blip2ForConditionalGeneration.from_pretrained(out)
    assert after.config.vision_config.image_size == 42
    kept, now = before.language_model.state_dict(), after.language_model.state_dict()
    assert all(torch.equal(kept[name], now[name]) for name in kept)
    trained = loop.read(work / "vqa.pt")["model"]
    for part in ("eye.", "qformer.", "embeddings.", "query_tokens", "language_projection."):
        assert any(name.startswith(part) for name in trained), part
    for name in (
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "qformer.encoder.layer.0.attention.attention.key.weight",
    ):
        assert not torch.equal(before.state_dict()[name], after.state_dict()[name]), name
    words = json.loads((out / "qformer_tokenizer" / "tokenizer.json").read_text())
    assert words["truncation"] is None and words["padding"] is None, "lengths are of training alone"
    convert(out, folder / f"bundle-{family}", Choices("answers", golden=True))
    facts = json.loads((folder / f"bundle-{family}" / "bundle.json").read_text())
    assert facts["image"]["size"] == 42 and "ask" in facts["tasks"]


def test_vqav2_comes_in_two_files_and_its_answers_count_by_their_shares(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind a Q-Former that read no texts so far, which is told: questions are what its words come from."""
    data = tmp_path / "vqa"
    data.mkdir()
    asked, notes = [], []
    for i in range(8):
        shutil.copyfile(folder / "data" / f"{i:06}.png", data / f"COCO_train2014_{i:012}.jpg")
        asked.append({"image_id": i, "question": "how many rings are there?", "question_id": 10 * i})
        said = ["2"] * 6 + ["two"] * 3 + ["a few"]
        notes.append(
            {"question_id": 10 * i, "answers": [{"answer": one, "answer_id": n} for n, one in enumerate(said)]}
        )
    (data / "q.json").write_text(json.dumps({"data_subtype": "train2014", "questions": asked}))
    (data / "a.json").write_text(json.dumps({"annotations": notes}))
    found = records.read(data / "q.json", answers=data / "a.json")
    assert found[0].questions[0].answers == (("2", 0.6), ("two", 0.3), ("a few", 0.1))
    typed = [
        "--data",
        data / "q.json",
        "--answers",
        data / "a.json",
        "--base",
        folder / "opt",
        "--work",
        tmp_path / "work",
    ]
    more = ["--qformer", folder / "opt", "--image-size", "28", "--out", tmp_path / "out"]
    assert train("vqa", *typed, *SHORT, *more) == 0
    words = json.loads((tmp_path / "out" / "qformer_tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"how", "many", "rings"} <= set(words)
    assert "its Q-Former reads no texts, as stage 2 leaves it" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_counts_by_its_weight_in_the_loss(folder: Path, family: str) -> None:
    """The loss of all rows is the weighted sum of the losses of each alone, over the weighted count of their tokens."""
    base = open_base(folder / family)
    speaks = language.of_family(family, base.model.language_model, base.tokenizer())
    words = text.train_qformer_tokenizer(text.corpus(50, "questions"), 300)
    answers = (("2", 0.6), ("two rings and one star", 0.3), ("a few", 0.1))
    record = records.Record("a", sources.File(Path("a")), questions=[records.Question("how many?", answers)])
    asked = questions.asked(questions.Asking(speaks, words, 4))([record], [random.Random(0)], torch.zeros(1, 2))
    assert asked.texts.weights.tolist() == pytest.approx([0.6, 0.3, 0.1]) and asked.texts.picture.tolist() == [0, 0, 0]
    torch.manual_seed(1)
    prefix = torch.randn(1, 3, speaks.width).expand(3, -1, -1)
    whole = float(language.loss(speaks, prefix, asked.texts) / asked.texts.mass)
    total, mass = 0.0, 0.0
    for answer, weight in answers:
        alone = speaks.texts([language.Text(0, "Question: how many? Answer:", answer)])
        total += weight * float(language.loss(speaks, prefix[:1], alone))
        mass += weight * int((alone.labels != -100).sum())
    assert whole == pytest.approx(total / mass, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_another_size_the_model_sees_with_interpolated_positions(folder: Path, family: str) -> None:
    base = open_base(folder / family)
    begins = start.Start()
    first = start.qformer(base, begins, 99)
    speaks = language.of_family(family, base.model.language_model, base.tokenizer())
    made = questions.model(base, first, 56, speaks)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    wanted = load(base.checkpoint, Blip2ForConditionalGeneration, 56).vision_model
    with torch.no_grad():
        mine = made.eye(pixels).last_hidden_state
        theirs = wanted(pixels, interpolate_pos_encoding=False).last_hidden_state
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(sources.DataError, match="whole number of patches of 14; 56 would be"):
        questions.check_side(base, 55)


# Bundles


@pytest.fixture
def engine() -> Path:
    found = Path(os.environ.get("BLIP2_ENGINE", Path(__file__).parents[2] / "target" / "debug" / "blip2"))
    assert found.exists(), f"{found} is not there; build it first (cargo build)"
    return found


def test_one_command_trains_converts_verifies_and_evaluates(
    folder: Path, tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = [
        *places(folder, "opt", tmp_path / "work"),
        *SHORT,
        "--out",
        tmp_path / "out",
        "--convert",
        tmp_path / "bundle",
    ]
    assert train("all", *typed, "--engine", engine) == 0
    told = capsys.readouterr()
    said = [json.loads(line) for line in told.out.splitlines() if line.startswith("{")]
    assert [Path(row["bundle"]).name for row in said] == ["stage1", "stage2"]
    assert said[0]["pictures"] == said[1]["pictures"] > 1
    assert said[0].keys() >= {"images_recalled_at_1", "texts_recalled_at_1", "itm_right"}
    assert 0 <= said[1]["caption_words_f1"] <= 1 and told.err.count("is verified") == 2
    kept = json.loads((tmp_path / "work" / "stage2_evaluation.json").read_text())
    assert kept["caption_words_f1"] == said[1]["caption_words_f1"]
    assert len((tmp_path / "work" / "stage2_written.jsonl").read_text().splitlines()) == kept["pictures"]
    assert "it exists; name another --convert" in refused(capsys, "all", *typed, "--engine", engine)
    monkeypatch.setenv("BLIP2_ENGINE", str(tmp_path / "gone"))
    assert "gone: there is no such engine" in refused(capsys, "all", *typed, "--force")
    assert "it goes with stage2 or vqa" in refused(capsys, "all", *typed, "--lora", "language")


def test_a_picture_that_json_cannot_name_is_shown_under_another(folder: Path, tmp_path: Path, engine: Path) -> None:
    picture = next((folder / "data").rglob("*.png"))
    odd = tmp_path / os.fsdecode(b"\xff.png")
    try:
        shutil.copy(picture, odd)
    except OSError:
        pytest.skip("names are Unicode on this file system")
    shown = [records.Record(str(i), sources.File(path), ["a star"]) for i, path in enumerate((picture, odd))]
    bundle = Path(__file__).parents[2] / "models" / "demo-itm"
    found = evaluation.evaluate(Engine(engine, bundle), shown, 2, tmp_path / "written.jsonl")
    assert found["pictures"] == 2 and found["itm_pairs"] == 2
    written = [json.loads(line) for line in (tmp_path / "written.jsonl").read_text().splitlines()]
    assert len(written) == 2 and written[0]["written"] == written[1]["written"]


def test_questions_are_answered_through_the_engine_as_they_were_trained(
    folder: Path, second: dict[str, Path], tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["--data", folder / "data" / "plain.json", "--base", second["t5"], "--work", tmp_path / "work", *SHORT]
    more = ["--qformer", second["t5"], "--image-size", "28"]
    out = ["--out", tmp_path / "out", "--convert", tmp_path / "bundle", "--engine", engine, "--evaluate-on", "2"]
    assert train("vqa", *typed, *more, *out) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["questions"] >= 2 and 0 <= said["answers_right"] <= 1
    facts = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert questions.PROMPT in json.dumps(facts)


def test_without_an_engine_the_bundle_is_made_and_that_is_said(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chain.Chain, "found_engine", lambda _: None)
    chain.follow(chain.Chain(tmp_path / "bundle"), chain.Trained("stage2", folder / "opt", [], tmp_path))
    assert (tmp_path / "bundle" / "bundle.json").is_file()
    assert "neither verified nor evaluated: no engine here" in capsys.readouterr().err


def test_captions_share_words_with_what_people_say() -> None:
    assert evaluation.overlap("a red ring", "the red ring") == pytest.approx(2 / 3)
    assert evaluation.overlap("ring ring", "a ring") == 0.5 and evaluation.overlap("a", "b") == 0


# What it will take


def test_the_end_that_is_foreseen_holds() -> None:
    """The first step is slow, measurements and checkpoints lie between: within 15 %, and 4 % once a checkpoint was written."""
    now, steps, every, save = 0.0, 400, 50, 60.0
    seen = pace.Pace({"measure": every}, {"save": save}, clock=lambda: now)
    with seen.aside("measure"):
        now += 11.0
    seen.expect(1.1)
    rng, saved, foreseen = random.Random(3), 0.0, {0: now + seen.left(0, steps)}
    for step in range(1, steps + 1):
        now += 9.0 if step == 1 else rng.uniform(0.8, 1.2)
        seen.step()
        foreseen[step] = now + seen.left(step, steps)
        if step % every == 0:
            with seen.aside("measure"):
                now += 12.0
        if step == steps or now - saved > save:
            with seen.aside("save"):
                now += 3.0
            saved = now
    off = {step: abs(end - now) / now for step, end in foreseen.items()}
    assert max(off.values()) < 0.15 and max(share for step, share in off.items() if step >= 70) < 0.04, off


def test_a_rehearsal_changes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("stage1", *places(folder, "opt", tmp_path / "with"), *SHORT) == 0
    monkeypatch.setattr(loop.Fit, "_foretell", lambda *_: None)
    assert train("stage1", *places(folder, "opt", tmp_path / "without"), *SHORT) == 0
    one, other = (loop.read(tmp_path / name / "stage1.pt")["model"] for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_processes_agree_on_how_often_they_rehearse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step waits for all of them."""
    for first, times in ((0.1, 2), (99.0, 1)):
        monkeypatch.setattr(together, "agreed", lambda _, first=first: first)
        seen: list[int] = []
        estimate.rehearse(lambda: [1], seen.append, 0)
        assert len(seen) == times


def test_what_a_checkpoint_takes_is_told_before_it_is_written(folder: Path, second: dict[str, Path]) -> None:
    base = open_base(folder / "opt")
    made = start.qformer(base, start.Start(), len(start.tokenizer(folder / "work-opt", start.Start(), [])))
    told = estimate.of(made, base.vision)
    assert told.checkpoint == pytest.approx((folder / "work-opt" / "stage1.pt").stat().st_size, rel=0.2)
    assert told.frozen == sum(p.numel() * 4 for p in base.vision.parameters())


def test_a_disk_that_is_too_small_is_told_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    said = refused(capsys, "stage1", *places(folder, "opt", tmp_path / "work"), *SHORT)
    assert "GiB are free, checkpoints and models will take" in said
    assert not list((tmp_path / "work").glob("*.pt"))


# What cannot be


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--batch-size", "0"], "--batch-size 0: 1 is the least"),
        (["--batch-size", "-4"], "--batch-size -4: 1 is the least"),
        (["--batch-size", "6", "--accumulate", "4"], "--batch-size must be a multiple of 4"),
        (["--batch-size", "4", "--accumulate", "4"], "of a batch of 4 in 4 parts each has one"),
        (["--steps", "0"], "--steps 0: 1 is the least"),
        (["--epochs", "nan"], "--epochs nan: it must be a number above 0"),
        (["--learning-rate", "0"], "--learning-rate 0.0: it must be a number above 0"),
        (["--least-rate", "1", "--learning-rate", "0.1"], "from 0 to --learning-rate"),
        (["--held-out", "1.5"], "at least 0 and less than 1"),
        (["--held-out", "nowhere"], "nowhere: there is no such file or folder"),
        (["--queries", "0"], "--queries 0: 1 is the least"),
        (["--workers", "-1"], "--workers -1: 0 is the least"),
        (["--bert", "nowhere"], "nowhere"),
        (["--qformer", "nowhere"], "nowhere"),
        (["--base", "nowhere"], "nowhere"),
        (["--data", "nowhere=2"], "nowhere: there is no such file or folder"),
        (["--lora", "qformer"], "stage 1 trains the whole Q-Former"),
        (["--convert", "bundle"], "--convert makes a bundle of the folder that --out names"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: list[str], said: str
) -> None:
    assert said in refused(capsys, "stage1", *places(folder, "opt", tmp_path / "work"), *SHORT, *typed)


def test_one_picture_is_nothing_to_be_told_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is it if it comes with two captions. Two pictures are."""
    for n, outcome in ((1, 1), (2, 0)):
        Image.new("L", (4, 4), 9 * n).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("a ring\na star")
        typed = ["--data", tmp_path, "--base", folder / "opt", "--work", tmp_path / "work", *SHORT, "--held-out", "0"]
        assert train("stage1", *typed) == outcome
    assert "stage 1 tells pictures from one another, and there is but one to learn from" in capsys.readouterr().err


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "size", lambda: 3)
    Sizes(12, 2).check()
    with pytest.raises(
        sources.DataError, match=r"2 parts for each of 3 processes; --batch-size must be a multiple of 6$"
    ):
        Sizes(16, 2).check()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("{", "not valid JSON"),
        ('{"a": 1}', "neither COCO"),
        ("[]", "no picture"),
        (
            '[{"image": "x.png", "caption": "y"}]',
            "1 of 1 pictures are not there, or empty; the first is x.png; name the folder",
        ),
        ('[{"image": "a.png", "caption": 3}]', "1 not text"),
        ('[{"image": "a.png", "caption": "  ...  "}]', "it has nothing to learn from"),
        (json.dumps([{"image": "a.png", "caption": "x" * 3000}]), "it has nothing to learn from"),
        ('[{"image": "a.png"}]', "has no caption"),
        ('["a.png"]', "not an object that names a picture"),
    ],
)
def test_unusable_data_is_said_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, said: str
) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(rows)
    typed = ["--data", tmp_path / "a.json", "--base", folder / "opt", "--work", tmp_path / "work", *SHORT]
    assert said in refused(capsys, "stage1", *typed)


def test_some_captions_and_pictures_that_cannot_be_used_are_told_and_passed_over(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(folder / "data", tmp_path / "data")
    rows = [{"image": f"{i:06}.png", "caption": ["a ring", "a star", "y" * 3000 if i else ""]} for i in range(24)]
    (data / "rows.json").write_text(json.dumps([*rows, {"image": "gone.png", "caption": "a star"}]))
    typed = ["--data", data / "rows.json", "--base", folder / "opt", "--work", tmp_path / "work", *SHORT]
    assert train("stage1", *typed) == 0
    said = capsys.readouterr().err
    assert "24 texts are passed over (23 longer than 2000 characters, 1 empty), the first is that of 000000.png" in said
    assert "1 of 25 pictures are not there, or empty; the first is gone.png; they are passed over" in said


@pytest.mark.parametrize("workers", ["0", "1"])
def test_pictures_that_none_can_read_are_said_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_text(f"no picture {i}")
        (tmp_path / f"{i}.txt").write_text("a ring")
    typed = ["--data", tmp_path, "--base", folder / "opt", "--work", tmp_path / "work", *SHORT, "--workers", workers]
    assert "pictures one after another cannot be read" in refused(capsys, "stage1", *typed, "--held-out", "0")


def test_a_base_that_cannot_be_used_is_said_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_checkpoint.write(tmp_path / "llama", "llama", seed=0)
    places_ = ["--data", folder / "data", "--work", tmp_path / "work", *SHORT]
    said = refused(capsys, "stage2", *places_, "--base", tmp_path / "llama", "--out", tmp_path / "out")
    assert "training goes around OPT and Flan-T5, its language model is llama" in said
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(capsys, "stage1", *places_, "--base", tmp_path / "empty")
    asked = ["--data", folder / "data" / "plain.json", "--base", folder / "opt", "--work", tmp_path / "work", *SHORT]
    said = refused(capsys, "vqa", *asked, "--image-size", "30", "--out", tmp_path / "out")
    assert "pictures of 30 pixels are no whole number of patches of 14; 28 would be" in said
    early = refused(capsys, "stage2", *places_, "--base", folder / "opt", "--out", tmp_path / "out")
    assert "run `train stage1` with the same --work first, or name --qformer" in early


def test_a_work_folder_of_another_run_is_said_and_left(
    folder: Path, second: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = shutil.copytree(folder / "work-opt", tmp_path / "work")
    before = (work / "stage1.pt").read_bytes()
    typed = [*places(folder, "opt", work), *SHORT]
    assert "--seed: 0 then, 5 now" in refused(capsys, "stage1", *typed, "--seed", "5")
    assert "--best-by: loss then, r1 now" in refused(capsys, "stage1", *typed, "--best-by", "r1")
    learnt = loop.read(work / "stage1.pt")["facts"]
    first = split.by_share(records.read(folder / "data", None, None, work), 0.2)[0][0].source
    assert isinstance(first, sources.File)
    picture = first.path
    aside = picture.rename(tmp_path / "aside.png")
    try:
        said = refused(capsys, "stage1", *typed)
    finally:
        aside.rename(picture)
    assert (
        f"what --data holds: {json.loads(learnt)['records']} then, " in said and "pictures (" in said.split("then,")[1]
    )
    (tmp_path / "b").symlink_to(folder / "t5")
    assert "other settings" in refused(capsys, "stage1", *typed, "--base", tmp_path / "b")
    assert (work / "stage1.pt").read_bytes() == before
    (work / "stage1.pt").write_bytes(before[: len(before) // 2])
    assert "it is no checkpoint that can be read" in refused(capsys, "stage1", *typed)


def test_what_training_did_not_write_is_never_replaced(
    folder: Path, second: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["--data", folder / "data", "--base", folder / "opt", "--work", folder / "work-opt", *SHORT]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("mine", "file"):
        assert "training did not write it" in refused(capsys, "stage2", *typed, "--out", tmp_path / out)
    for out in (folder / "opt", folder / "data", folder, folder / "work-opt"):
        assert "would take the place of what is read" in refused(capsys, "stage2", *typed, "--out", out)
    forced = ["--out", tmp_path / "out", "--force", "--convert", tmp_path / "mine"]
    assert "it exists and is no bundle" in refused(capsys, "stage2", *typed, *forced)
    assert (tmp_path / "mine" / "photo.jpg").read_text() == "mine"
    assert train("stage2", *typed, "--out", second["opt"]) == 0, "its own it may write anew"


def test_a_disk_that_fills_up_is_said_and_nothing_is_lost(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever a run is full, the same command goes on once there is room, until it is full elsewhere."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    work, out = tmp_path / "work", tmp_path / "out"
    typed = [*places(folder, "opt", work), *UNMEASURED, "--out", out]
    for where, name in (
        (PreTrainedTokenizerFast, "save_pretrained"),
        (torch, "save"),
        (os, "replace"),
        (folders, "save_file"),
    ):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(where, name, full)
            assert "No space left on device" in refused(capsys, "stage1", *typed), name
        assert not list(work.glob("*.part")) and not list(tmp_path.glob(".*.part")) and not out.exists(), name
    assert train("stage1", *typed) == 0 and (out / "config.json").is_file()


def test_a_file_that_cannot_grow_ends_it_and_room_lets_it_go_on_bit_by_bit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bound on files stands for a disk that is full: whatever writes meets it, in Python or not."""
    work, whole = tmp_path / "work", tmp_path / "whole"
    assert train("stage1", *places(folder, "opt", whole), *UNMEASURED) == 0
    size = (whole / "stage1.pt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most, met in ((1000, "qformer_tokenizer"), (size - 1000, "stage1.pt")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            said = refused(capsys, "stage1", *places(folder, "opt", work), *UNMEASURED, "--tensorboard")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert met in said and "it cannot be written" in said, said
        assert not list(work.rglob("*.part")) and not (work / "stage1.pt").exists()
    assert train("stage1", *places(folder, "opt", work), *UNMEASURED) == 0
    one, other = (loop.read(place / "stage1.pt")["model"] for place in (work, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
