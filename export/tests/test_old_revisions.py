"""Checkpoints as older versions left them, against `transformers` with its own processor on the same folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import old_revisions
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.read import processor, tokenizers
from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.read.pickled import PickledError, PickledFile
from blip2_export.reference import pictures
from blip2_export.run.generation import Graphs
from blip2_export.scenes import drawing

TOLERANCE = 1e-4
PROMPTS = ("", "Question: what colour is the star? Answer:", "a photo of")
N_NEW = 8
N_TOKENS = 321  # of the random checkpoints' tokenizer, `<image>` included as the last
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "room": {
        "text_config": {
            "vocab_size": N_TOKENS + 7,
            "hidden_size": 60,
            "word_embed_proj_dim": 60,
            "num_attention_heads": 3,
        }
    },
    "no-room": {"text_config": {"vocab_size": N_TOKENS - 1, "num_attention_heads": 1}, "top": {"num_query_tokens": 5}},
}


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random checkpoint whose embedding table has rows left for an image token, or has none."""
    monkeypatch.setattr(random_checkpoint, "SHAPES", random_checkpoint.SHAPES | SHAPES)
    random_checkpoint.write(tmp_path / "c", getattr(request, "param", "room"), seed=4)
    return tmp_path / "c"


def reference(folder: Path, pixels: np.ndarray, prompt: str) -> tuple[list[int], np.ndarray, list[int]]:
    """Prompt ids, first logits and greedy tokens, with `<image>` added as the processor and the model's users do."""
    speech = Blip2Processor.from_pretrained(folder)
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    n_rows = model.config.text_config.vocab_size
    speech.num_query_tokens = model.config.num_query_tokens
    model.config.image_token_index = speech.tokenizer.convert_tokens_to_ids("<image>")
    if len(speech.tokenizer) > n_rows:
        model.resize_token_embeddings(len(speech.tokenizer))
    new_rows = list(range(n_rows, model.get_input_embeddings().num_embeddings))
    inputs = speech(images=drawing.sample_pictures(1, seed=3)[0], text=prompt, return_tensors="pt")
    inputs["pixel_values"] = torch.from_numpy(pixels)[None]
    out = model.generate(
        **inputs,
        max_new_tokens=N_NEW,
        do_sample=False,
        suppress_tokens=new_rows or None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = inputs["input_ids"][0].tolist()
    return ids[speech.num_query_tokens :], out.logits[0][0].numpy()[:n_rows], out.sequences[0, len(ids) :].tolist()


def assert_equal_to_reference(folder: Path, bundle: Path) -> None:
    graphs = Graphs(bundle)
    prepare = pictures.preparation(folder, graphs.facts["image"])
    pixels = np.stack([prepare(p) for p in drawing.sample_pictures(3, seed=3, side=90)])
    queries = graphs.queries(graphs.features(pixels))
    wanted = [reference(folder, *case) for case in zip(pixels, PROMPTS, strict=True)]
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    assert [tokenizer.encode(prompt).ids for prompt in PROMPTS] == [ids for ids, _, _ in wanted]
    logits, tokens = graphs.greedy(queries, [ids for ids, _, _ in wanted], N_NEW)
    expected = np.stack([first for _, first, _ in wanted])
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"first logits: relative error {error:.2e}"
    assert tokens == [row for _, _, row in wanted]
    assert len({tuple(row) for row in tokens}) > 1, "the checkpoint writes the same whatever it sees"


@pytest.mark.parametrize("folder", sorted(SHAPES), indirect=True)
@pytest.mark.parametrize("tokenizer", ["fast", "slow"])
def test_a_first_revision_equals_the_reference(folder: Path, tokenizer: str) -> None:
    old_revisions.forget_image_token(folder)
    old_revisions.pickle_weights(folder, n_shards=3)
    if tokenizer == "slow":
        old_revisions.slow_tokenizer(folder)
    convert(folder, folder.parent / "b", Choices("x"))
    assert_equal_to_reference(folder, folder.parent / "b")
    facts = json.loads((folder.parent / "b" / "bundle.json").read_text())
    assert facts["language"]["token_ids"]["image"] == N_TOKENS - 1
    cases = json.loads((folder.parent / "b" / "golden" / "golden.json").read_text())["cases"]
    ids = [case["prompt_ids"] for case in cases if case["task"] == "caption"]
    assert ids == [[2]] * len(ids), "a caption starts with </s> alone"


@pytest.mark.parametrize("folder", ["no-room"], indirect=True)
def test_a_tokenizer_larger_than_the_table_loses_what_has_no_embedding(folder: Path) -> None:
    """`<image>` was added to the tokenizer, the table was not resized: the engine would refuse the pair."""
    convert(folder, folder.parent / "b", Choices("x", golden=False))
    facts = json.loads((folder.parent / "b" / "bundle.json").read_text())
    kept = Tokenizer.from_file(str(folder.parent / "b" / "tokenizer.json"))
    assert kept.get_vocab_size() == facts["language"]["vocab_size"] == N_TOKENS - 1
    assert kept.token_to_id("<image>") is None and kept.encode("a red star").ids[0] == 2
    assert_equal_to_reference(folder, folder.parent / "b")


def test_a_vocabulary_without_embeddings_is_refused(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{i}": N_TOKENS + i for i in range(8)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="more tokens than the 328 that have an embedding"):
        convert(folder, folder.parent / "b", Choices("x", golden=False))


@pytest.mark.parametrize(("n_shards", "zipped"), [(1, True), (4, True), (1, False)])
def test_pickled_weights_give_the_bundle_that_safetensors_give(folder: Path, n_shards: int, zipped: bool) -> None:
    convert(folder, folder.parent / "a", Choices("x", golden=False))
    old_revisions.pickle_weights(folder, n_shards, zipped)
    convert(folder, folder.parent / "b", Choices("x", golden=False))
    for data in (folder.parent / "a").glob("*.data"):
        assert data.read_bytes() == (folder.parent / "b" / data.name).read_bytes()


def test_pickled_tensors_of_any_layout_are_read_as_pytorch_reads_them(tmp_path: Path) -> None:
    whole = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    kept = {"whole": whole, "rows": whole[2:5], "turned": whole.t(), "part": whole[1:, 3:8], "one": whole[0, 0]}
    tensors = {f"{n}.{d}": t.to(d) for n, t in kept.items() for d in (torch.float32, torch.float16, torch.bfloat16)}
    for zipped in (True, False):
        torch.save({**kept, **tensors, "step": 3}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        file = PickledFile(tmp_path / "x.bin")
        assert set(file.keys()) == {*kept, *tensors}
        for name, tensor in {**kept, **tensors}.items():
            found = file.get_tensor(name)
            assert found.dtype == np.dtype(str(tensor.dtype).removeprefix("torch."))
            np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy(), strict=True)


def test_reading_a_pickled_file_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    torch.save({"0": torch.zeros(9)}, tmp_path / "warm.bin")
    torch.save({str(i): torch.zeros(1 << 20) for i in range(32)}, tmp_path / "x.bin")
    program = (
        "import re, sys, torch\nfrom pathlib import Path\nfrom blip2_export.read.pickled import PickledFile\n"
        "used = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "PickledFile(Path(sys.argv[1]))\nbefore = used()\nfile = PickledFile(Path(sys.argv[2]))\n"
        "for name in file.keys():\n    file.get_tensor(name).sum()\n"
        "print(used() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "warm.bin", tmp_path / "x.bin"], capture_output=True, text=True
    )
    assert int(done.stdout) < 20 << 10, f"{done.stdout} KiB for tensors of 4 MiB in a file of 128 MiB {done.stderr}"


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize("content", ["code", "list", "cut", "text"])
def test_a_pickled_file_that_is_no_dictionary_of_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.bin"
    torch.save([torch.zeros(3)] if content == "list" else {"a": torch.zeros(300), "b": _Command()}, path)
    if content in ("cut", "text"):
        path.write_bytes(path.read_bytes()[:-40] if content == "cut" else b"version https://git-lfs")
    with pytest.raises(PickledError):
        PickledFile(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda f: (f / "pytorch_model-00002-of-00003.bin").unlink(),
            "shard pytorch_model-00002-of-00003.bin is missing",
        ),
        (lambda f: _cut(f / "pytorch_model-00002-of-00003.bin"), "00002-of-00003.bin: cannot be read"),
        (lambda f: torch.save({}, f / "pytorch_model-00002-of-00003.bin"), "though the index says so"),
        (lambda f: (f / "pytorch_model.bin.index.json").write_text("{}"), "has no weight_map"),
        (lambda f: (f / "merges.txt").unlink(), "nor vocab.json and merges.txt"),
        (lambda f: (f / "merges.txt").rename(f / "spiece.model"), "pip install sentencepiece"),
        (lambda f: (f / "merges.txt").write_text("#version: 0.2\nnot two\nof a pair"), "tokenizer cannot be read"),
    ],
)
def test_what_is_missing_or_damaged_gets_one_sentence(folder: Path, damage, said: str) -> None:
    old_revisions.forget_image_token(folder)
    old_revisions.pickle_weights(folder, n_shards=3)
    old_revisions.slow_tokenizer(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        convert(folder, folder.parent / "b", Choices("x", golden=False))
    assert [path.name for path in folder.parent.iterdir()] == ["c"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_safetensors_count_before_pickled_weights_as_in_the_reference(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "old")
    old_revisions.pickle_weights(folder.parent / "old")
    torch.save({"query_tokens": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert Checkpoint(folder).has("vision_model.post_layernorm.weight")
    assert Checkpoint(folder.parent / "old").tensor("query_tokens").shape == (1, 8, 32)


def test_image_settings_come_from_whichever_file_the_reference_reads(folder: Path) -> None:
    """Split files, nested into processor_config.json, and both: the nested ones count."""
    path, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    split = old_revisions.edit(path, image_mean=[0.5, 0.25, 0.125], processor_class="Blip2Processor")
    nested.write_text(json.dumps({"num_query_tokens": 8, "processor_class": "Blip2Processor"}))
    assert processor.image_facts(folder, 28)["mean"] == [0.5, 0.25, 0.125]
    nested.write_text(json.dumps({"image_processor": {**split, "image_mean": [0.1, 0.2, 0.3]}, "num_query_tokens": 8}))
    assert processor.image_facts(folder, 28)["mean"] == [0.1, 0.2, 0.3]
    assert list(Blip2Processor.from_pretrained(folder).image_processor.image_mean) == [0.1, 0.2, 0.3]
    path.unlink()
    assert processor.image_facts(folder, 28)["mean"] == [0.1, 0.2, 0.3]


def test_the_old_spelling_of_the_text_input_is_understood(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["qformer_config"]
    config["qformer_text_input"] = not config.pop("use_qformer_text_input")
    old_revisions.edit(folder / "config.json", qformer_config=config)
    assert Checkpoint(folder).config["qformer_config"]["use_qformer_text_input"] is True


def test_a_slow_tokenizer_is_the_one_that_the_reference_makes(folder: Path, tmp_path: Path) -> None:
    old_revisions.forget_image_token(folder)
    fast = AutoTokenizer.from_pretrained(folder)
    old_revisions.slow_tokenizer(folder)
    tokenizers.write(folder, tmp_path / "tokenizer.json", N_TOKENS + 7)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("", "two dogs  play\non the beach", "Größe 中 🐕", "</s> a <pad>"):
        assert made.encode(text).ids == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert made.encode(text).ids == fast(text)["input_ids"]
        assert made.decode(made.encode(text).ids) == fast.decode(fast(text)["input_ids"], skip_special_tokens=True)
