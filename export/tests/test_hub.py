"""Checkpoints by id, from a stand-in hub on loopback into a cache of their own."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import old_revisions
import pytest
from safetensors.numpy import save_file
from stand_in_hub import Hub, Model, serve

from blip2_export import convert as command
from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.read.hub import locate
from blip2_export.reference import generation
from blip2_export.run.generation import Graphs
from blip2_export.scenes import drawing

NAME = "Salesforce/blip2-opt-2.7b"
_FETCH = """
import sys
from blip2_export.read import hub
try:
    print(hub.fetch(*sys.argv[1:]))
except hub.CheckpointError as error:
    sys.exit(f"error: {error}")
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def python(tmp_path: Path, hub: Hub) -> Run:
    """Runs Python as a user of that hub would, with an empty cache."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def run(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, env={**kept, **own, **more}, cwd=Path(__file__).parents[1], capture_output=True, text=True
        )

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the released layout: sharded safetensors, the same as shards of `.bin`, and files that nobody needs."""
    folder = tmp_path_factory.mktemp("released") / "c"
    random_checkpoint.write(folder, "odd-1", seed=6, shard_bytes=150_000)
    shutil.copytree(folder, folder.parent / "pickled")
    old_revisions.pickle_weights(folder.parent / "pickled", n_shards=2)
    for file in folder.parent.glob("pickled/pytorch_model*"):
        shutil.copy(file, folder)
    for name in ("README.md", ".gitattributes", "generation_config.json", "flax_model.msgpack", "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "qformer_tokenizer").mkdir()
    (folder / "qformer_tokenizer" / "vocab.txt").write_text("[PAD]\n")
    return folder


@pytest.fixture(scope="session")
def converted(checkpoint: Path) -> Path:
    """The bundle of its folder."""
    convert(checkpoint, checkpoint.parent / "bundle", Choices("x", golden=False))
    return checkpoint.parent / "bundle"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Two small files and 24 MiB of weights, which `fetch` does not look into."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(24 << 20))
    return folder


def fetched(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed command ends with."""
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), done.stderr
    return line


def test_an_id_converts_to_the_bundle_of_its_folder(
    hub: Hub, python: Run, checkpoint: Path, converted: Path, tmp_path: Path
) -> None:
    hub.models[NAME] = Model({"main": checkpoint})
    done = python("-m", "blip2_export", "convert", NAME, tmp_path / "b", "--name", "x", "--no-golden")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "home")
    files = {str(p.relative_to(tmp_path / "b")): p for p in (tmp_path / "b").rglob("*") if not p.is_dir()}
    assert not any(path.is_symlink() for path in files.values()), "a link into the cache would break with the cache"
    assert {name: p.read_bytes() for name, p in files.items()} == {
        str(p.relative_to(converted)): p.read_bytes() for p in converted.rglob("*") if p.is_file()
    }


def test_an_adapter_of_an_id_fetches_its_base_by_id(
    hub: Hub, python: Run, checkpoint: Path, converted: Path, tmp_path: Path
) -> None:
    lora, name = tmp_path / "lora", "someone/blip2-lora"
    lora.mkdir()
    module = "base_model.model.language_model.model.decoder.layers.0.self_attn.q_proj.lora_"
    numbers = np.random.default_rng(0).standard_normal((2, 60), np.float32) * 0.3
    save_file({f"{module}A.weight": numbers, f"{module}B.weight": numbers.T.copy()}, lora / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": NAME}
    (lora / "adapter_config.json").write_text(json.dumps(said))
    (lora / "optimizer.pt").write_bytes(b"nobody needs it")
    hub.models |= {NAME: Model({"main": checkpoint}), name: Model({"main": lora})}
    common = ("--name", "x", "--no-golden")
    for out, words in {"a": (name,), "b": (NAME, "--adapter", name)}.items():
        done = python("-m", "blip2_export", "convert", *words[:1], tmp_path / out, *words[1:], *common)
        assert done.returncode == 0, done.stderr
    a, b, plain = ((bundle / "bundle.json").read_bytes() for bundle in (tmp_path / "a", tmp_path / "b", converted))
    assert a == b != plain
    assert "optimizer.pt" not in hub.fetched()


def test_the_pickled_first_revision_of_an_id_equals_the_reference(
    hub: Hub, python: Run, checkpoint: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(checkpoint.parent / "pickled", first)
    old_revisions.forget_image_token(first)
    old_revisions.slow_tokenizer(first)
    hub.models[NAME] = Model({"main": checkpoint, "refs/pr/1": first})
    folder = fetched(python("-c", _FETCH, NAME, "refs/pr/1"))
    convert(folder, tmp_path / "b", Choices("x", golden=False))
    graphs = Graphs(tmp_path / "b")
    reference = generation.Reference(first, graphs.facts)
    pixels, _, _ = reference.stages(drawing.sample_pictures(1, seed=3)[0])
    ids, _, tokens, _ = reference.generate(pixels, "a photo of", 8)
    assert graphs.greedy(graphs.queries(graphs.features(pixels[None])), [ids], 8)[1] == [tokens]
    assert hub.fetched() >= {"pytorch_model-00001-of-00002.bin", "vocab.json", "merges.txt"}


def test_only_what_a_conversion_reads_is_fetched_and_that_once(hub: Hub, python: Run, checkpoint: Path) -> None:
    hub.models[NAME] = Model({"main": checkpoint, "pickled": checkpoint.parent / "pickled"})
    folder = fetched(python("-c", _FETCH, NAME))
    shards = {path.name for path in checkpoint.glob("*.safetensors")}
    configs = {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    wanted = {*configs, *shards, "model.safetensors.index.json", "qformer_tokenizer/vocab.txt"}
    assert hub.fetched() == wanted
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == wanted
    assert all((folder / name).read_bytes() == (checkpoint / name).read_bytes() for name in wanted)
    hub.log.clear()
    assert fetched(python("-c", _FETCH, NAME)) == folder and hub.fetched() == set()
    pickled = {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}
    other = fetched(python("-c", _FETCH, NAME, "pickled"))
    assert {path.name for path in other.iterdir()} == configs | pickled
    assert other != folder


def test_a_cut_download_goes_on_where_it_broke_off(hub: Hub, python: Run, large: Path) -> None:
    hub.models[NAME] = Model({"main": large})
    hub.cuts["model.safetensors"] = [15 << 20]
    folder = fetched(python("-c", _FETCH, NAME))
    assert (folder / "model.safetensors").read_bytes() == (large / "model.safetensors").read_bytes()
    ranges = [line.split("bytes=")[1] for line in hub.log if "bytes=" in line]
    assert len(ranges) == 1 and 0 < int(ranges[0].rstrip("-")) <= 15 << 20, hub.log


def test_a_download_that_fails_keeps_its_complete_files_for_the_next(
    hub: Hub, python: Run, large: Path, tmp_path: Path
) -> None:
    hub.models[NAME] = Model({"main": large})
    hub.cuts["model.safetensors"] = [0] * 6
    said = complaint(python("-c", _FETCH, NAME))
    assert "broke off" in said and "goes on with the files that are missing" in said
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    said = complaint(python("-c", _FETCH, NAME, HF_HUB_OFFLINE="1"))
    assert "not all of it is in the cache" in said
    hub.log.clear()
    fetched(python("-c", _FETCH, NAME))
    assert hub.fetched() == {"model.safetensors"}


def test_a_complete_cache_needs_no_hub(hub: Hub, python: Run, checkpoint: Path) -> None:
    hub.models[NAME] = Model({"main": checkpoint})
    folder = fetched(python("-c", _FETCH, NAME))
    assert fetched(python("-c", _FETCH, NAME, HF_HUB_OFFLINE="1")) == folder
    assert fetched(python("-c", _FETCH, NAME, HF_ENDPOINT="http://127.0.0.1:9")) == folder
    shutil.rmtree(folder.parents[1] / "trees")  # as an older huggingface_hub, or transformers itself, leaves the cache
    assert fetched(python("-c", _FETCH, NAME, HF_HUB_OFFLINE="1")) == folder


@pytest.mark.parametrize(
    ("words", "locked", "said"),
    [
        (("someone/nothing",), None, "no model on the hub has this id"),
        ((NAME, "v9"), None, "no revision `v9`"),
        ((NAME,), (401, "GatedRepo"), f"access is gated; ask for it at .*/{NAME}"),
        ((NAME,), (403, "GatedRepo"), "access is gated"),
        ((NAME,), (403, ""), r"refuses access \(403\); log in"),
        ((NAME,), (401, ""), r"refuses access \(401\); log in"),
    ],
)
def test_what_the_hub_refuses_gets_one_sentence(hub: Hub, python: Run, large: Path, words, locked, said: str) -> None:
    hub.models[NAME] = Model({"main": large}, locked)
    found = complaint(python("-c", _FETCH, *words))
    assert re.search(said, found), found
    assert found.startswith(f"error: {words[0]}: ")


def test_without_a_connection_the_sentence_says_so(python: Run) -> None:
    said = complaint(python("-c", _FETCH, NAME, HF_ENDPOINT="http://127.0.0.1:9"))
    assert "no folder here, and http://127.0.0.1:9 cannot be reached" in said
    for words in ((NAME,), (NAME, "0123456789" * 4)):
        assert "HF_HUB_OFFLINE" in complaint(python("-c", _FETCH, *words, HF_HUB_OFFLINE="1"))


def test_the_command_takes_a_revision_of_an_id_only(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(checkpoint), str(tmp_path / "b"), "--revision", "main"])) == 3
    assert "a revision is chosen of an id on the hub" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors.index.json", "has no weights"),
        ("model-00002-of-*.safetensors", "its index lists model-00002-of-"),
    ],
)
def test_a_model_that_is_no_checkpoint_is_refused_before_its_weights_come(
    hub: Hub, python: Run, checkpoint: Path, tmp_path: Path, lost: str, said: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "c", ignore=shutil.ignore_patterns("pytorch_model*", lost))
    hub.models[NAME] = Model({"main": tmp_path / "c"})
    assert said in complaint(python("-c", _FETCH, NAME))
    assert not any(file.endswith(".safetensors") for file in hub.fetched())


def test_a_path_is_never_taken_for_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "blip2_export.read.hub.fetch", lambda repo, revision: Path("cache") / repo / (revision or "main")
    )
    (tmp_path / "models" / "here").mkdir(parents=True)
    for path in ("models/here", "./models/away", "../a/b", "/a/b", "a/b/c", "away", "a/b.", "a--b/c", "~/a"):
        assert locate(path) == Path(path)
        with pytest.raises(CheckpointError, match="not of a folder"):
            locate(path, "main")
    assert locate("models/away") == Path("cache/models/away/main")
    assert locate(NAME, "v1") == Path("cache") / NAME / "v1"
    assert locate("a_1/b.c-d") == Path("cache/a_1/b.c-d/main")
