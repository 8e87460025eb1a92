"""Whatever the JSON files of a checkpoint say and whatever is typed: a bundle or one sentence."""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import mutations
import pytest
from test_engine import ENGINE

from blip2_export import convert as command
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.engine import run_engine
from blip2_export.graphs import builder

N, N_GOLDEN = 400, 30
_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json"),
    *("qformer_tokenizer/tokenizer.json", "qformer_tokenizer/tokenizer_config.json"),
)
_SECONDS, _BYTES = 10, 1 << 29


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of every family, with every file that a checkpoint may have."""
    root = tmp_path_factory.mktemp("checkpoints")
    for shape in ("tiny", "t5", "instruct-llama", "vqa-opt"):
        random_checkpoint.write(root / shape, shape, seed=1, shard_bytes=100_000 if shape == "tiny" else 1 << 30)
    random_retrieval.write(root / "itg-tiny", "itg-tiny", 1)
    for folder in root.iterdir():
        image = json.loads((folder / "preprocessor_config.json").read_text())
        steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
        image |= {**steps, "do_center_crop": False, "crop_size": {"height": 28, "width": 28}, "rescale_factor": 1 / 255}
        image |= {"do_pad": False, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
        processor = {"num_query_tokens": 8, "processor_class": "Blip2Processor"}
        processor |= {"image_processor": image} if folder.name == "t5" else {}
        special = {} if folder.name == "itg-tiny" else {"eos_token": "</s>", "unk_token": {"content": "<unk>"}}
        for name, content in (
            ("preprocessor_config.json", image),
            ("processor_config.json", processor),
            ("special_tokens_map.json", special),
            ("generation_config.json", {"eos_token_id": 3, "max_length": 20, "suppress_tokens": [9]}),
        ):
            (folder / name).write_text(json.dumps(content))
    return sorted(root.iterdir())


@pytest.fixture(autouse=True)
def no_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_TRACEBACK", "1")
    monkeypatch.setattr(builder, "on_grid", lambda array: None)  # how weights are stored is no matter here


def convert(*typed: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in typed]))


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    last = capsys.readouterr().err.removesuffix("\n").split("\n")[-1]
    assert last.startswith("error: ") and len(last) < 620, last
    return last


def damaged(checkpoints: list[Path], folder: Path, seed: int) -> str:
    """Makes `folder` a copy of one of them with one or two of its files changed."""
    rng = random.Random(seed)
    shutil.copytree(rng.choice(checkpoints), folder, dirs_exist_ok=True)
    there = [name for name in _FILES if (folder / name).is_file()]
    return "; ".join(mutations.damage(folder / name, rng) for name in rng.sample(there, rng.choice((1, 1, 2))))


def test_any_json_gives_a_bundle_or_one_sentence(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {0: 0, 3: 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(N):
        folder, out = tmp_path / f"c{seed}", tmp_path / "b"
        how, start = damaged(checkpoints, folder, seed), time.process_time()
        try:
            code = convert(folder, out, "--no-golden")
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {how}") from error
        assert time.process_time() - start < _SECONDS, f"seed {seed}: {how}"
        said = sentence(capsys) if code else ""
        assert (out / "bundle.json").is_file() == (code == 0), f"seed {seed}: {how}: {said}"
        found[code] += 1
        assert not list(tmp_path.glob(".*")), "something is left over"
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    assert min(found.values()) > N / 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < _BYTES


def test_what_is_converted_from_odd_files_verifies(checkpoints: list[Path], tmp_path: Path) -> None:
    assert ENGINE.exists(), f"{ENGINE} is not there; build it first (cargo build)"
    n_verified = 0
    for seed in range(10_000, 10_000 + N_GOLDEN):
        folder, out = tmp_path / f"c{seed}", tmp_path / f"b{seed}"
        how = damaged(checkpoints, folder, seed)
        try:
            if convert(folder, out, "--beams", 1, "--caption-tokens", 4, "--ask-tokens", 3) == 0:
                run_engine(ENGINE, "verify", str(out))
                n_verified += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {how}") from error
    assert n_verified > N_GOLDEN / 10


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(
            (part, "num_hidden_layers", value)
            for part in ("text_config", "vision_config")
            for value in (0, -1, 10**9, 10**30)
        ),
        ("text_config", "max_position_embeddings", 10**9),
        ("text_config", "vocab_size", 10**12),
        ("text_config", "eos_token_id", 10**6),
        ("text_config", "eos_token_id", -1),
        ("text_config", "eos_token_id", []),
        ("vision_config", "patch_size", 0),
        ("vision_config", "image_size", 10**9),
        ("vision_config", "num_attention_heads", 3),
        ("vision_config", "layer_norm_eps", float("nan")),
        ("qformer_config", "cross_attention_frequency", 0),
        ("qformer_config", "num_attention_heads", 0),
        ("qformer_config", "hidden_size", -(10**30)),
    ],
)
def test_numbers_that_no_model_has_are_refused_by_name(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, key: str, value: Any
) -> None:
    shutil.copytree(checkpoints[0].with_name("tiny"), tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config[part][key] = value
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    assert convert(tmp_path / "c", tmp_path / "b", "--no-golden") == 3
    assert key in sentence(capsys)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        *((("--image-size", size), "image size") for size in (0, -5, 13, 5000, 10**30)),
        *((("--beams", n), "beams") for n in (0, -1, 10**9)),
        *(((f"--{task}-tokens", n), "new tokens") for task in ("caption", "ask") for n in (0, -1, 200, 10**30)),
        *((("--ask-prompt", prompt), "exactly one {}") for prompt in ("", "why?", "{} {}")),
        (("--caption-prompt", "{}"), "no question"),
        (("--caption-prompt", "star " * 99), "has room for"),
        (("--name", "\udcff"), "valid UTF-8"),
        (("--ask-prompt", "\udcff{}"), "valid UTF-8"),
        (("--revision", "main"), "a revision is chosen of an id"),
        *(((option, "nowhere"), "go with a LAVIS file") for option in ("--vision-weights", "--llm", "--tokenizer")),
    ],
)
def test_every_option_that_cannot_be_gets_one_sentence(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: tuple[object, ...], said: str
) -> None:
    assert convert(checkpoints[0].with_name("tiny"), tmp_path / "b", *typed) == 3
    assert said in sentence(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("checkpoint", "out", "said"),
    [
        ("nowhere", "b", "not a folder"),
        ("two\nlines", "b", "not a folder"),
        ("Ünïcode ‮", "b", "not a folder"),
        ("c/config.json", "b", "not a readable PyTorch file"),
        ("empty", "b", "config.json is missing"),
        ("/dev/null", "b", "not a folder"),
        ("c", "c", "take the place of"),
        ("c", "c/..", "take the place of"),
        ("c", "c/config.json", "is not a bundle"),
        ("c", "empty/..", "take the place of"),
        ("c", "c/config.json/b", "no bundle can lie in it"),
        ("c", "x" * 300, "File name too long"),
        ("c", "/dev/full/b", "no bundle can lie in it"),
    ],
)
def test_every_path_that_cannot_be_gets_one_sentence(
    checkpoints: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: str,
    out: str,
    said: str,
) -> None:
    monkeypatch.delenv("BLIP2_TRACEBACK")
    shutil.copytree(checkpoints[0].with_name("tiny"), tmp_path / "c")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert convert(tmp_path / checkpoint, tmp_path / out, "--no-golden", "--force") == 3
    assert said in sentence(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_inside_its_checkpoint_does_not_disturb_it(checkpoints: list[Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints[0].with_name("tiny"), tmp_path / "c")
    for _ in range(2):
        assert convert(tmp_path / "c", tmp_path / "c" / "[b]*", "--no-golden", "--force", "--name", "é 🐕") == 0
    assert json.loads((tmp_path / "c" / "[b]*" / "bundle.json").read_text())["name"] == "é 🐕"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "b.data"), RuntimeError("one\ntwo")]
)
def test_a_full_disk_and_a_bug_give_one_sentence_and_leave_nothing(
    checkpoints: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(builder.Data, "append", fail)
    with pytest.raises(type(error)):
        convert(checkpoints[0].with_name("tiny"), tmp_path / "b", "--no-golden")
    monkeypatch.delenv("BLIP2_TRACEBACK")
    assert convert(checkpoints[0].with_name("tiny"), tmp_path / "b", "--no-golden") == 3
    said = sentence(capsys)
    assert "b.data: No space left" in said or "RuntimeError (one two); BLIP2_TRACEBACK=1" in said
    assert not list(tmp_path.iterdir())
