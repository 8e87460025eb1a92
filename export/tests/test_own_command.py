"""`train stage1`, `stage2` and `vqa` as a person types them: what they leave, and what they say of what cannot be."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, Blip2ForConditionalGeneration, PreTrainedTokenizerFast

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.scenes import dataset
from blip2_export.train import cli, text
from blip2_export.train.own import loop, options, start
from blip2_export.train.own.base import open_base
from blip2_export.train.own.captions import clean
from blip2_export.train.own.length import Length
from blip2_export.train.own.loop import Schedule

SHORT = ("--steps", "3", "--batch-size", "4", "--workers", "0", "--held-out", "0.2")
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
    folder: Path, second: dict[str, Path], family: str
) -> None:
    work, out = folder / f"work-{family}", folder / f"answers-{family}"
    typed = ["--data", folder / "data" / "plain.json", "--base", second[family], "--work", work]
    assert train("vqa", *typed, *SHORT, "--learning-rate", "1e-3", "--image-size", "42", "--out", out) == 0
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
    convert(out, folder / f"bundle-{family}", Choices("answers", golden=True))
    facts = json.loads((folder / f"bundle-{family}" / "bundle.json").read_text())
    assert facts["image"]["size"] == 42 and "ask" in facts["tasks"]
