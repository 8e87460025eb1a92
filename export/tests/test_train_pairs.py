"""The two stages on a folder of pictures with captions, as a user runs them."""

from __future__ import annotations

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
from blip2_export.train import pairs, text
from blip2_export.train.images import CaptionedImages, DataError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_checkpoint.write(folder / "base", "odd-3", seed=4)
    dataset.write_dataset(folder / "data", 12, 0, 64)
    return folder


def train(folder: Path, stage: str, *more: str) -> subprocess.CompletedProcess[str]:
    places = ["--data", folder / "data", "--base", folder / "base", "--work", folder / "work"]
    sizes = ["--steps", "3", "--batch-size", "4", "--warmup", "1"]
    command = [sys.executable, "-m", "blip2_export", "train", stage, *map(str, places), *sizes, *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)


def test_both_stages_run_and_give_a_folder_that_converts(base: Path) -> None:
    early = train(base, "stage2", "--out", str(base / "out"))
    assert early.returncode == 1 and "run `train stage1`" in early.stderr and "Traceback" not in early.stderr
    first = train(base, "stage1")
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in (base / "work" / "stage1.jsonl").read_text().splitlines()]
    assert {"itc", "itm", "itg"} <= rows[0].keys()
    second = train(base, "stage2", "--out", str(base / "out"), "--prompt", "a photo of")
    assert second.returncode == 0, second.stderr
    before = Blip2ForConditionalGeneration.from_pretrained(base / "base")
    after = Blip2ForConditionalGeneration.from_pretrained(base / "out", dtype=torch.float32)
    for frozen in ("vision_model", "language_model"):
        old, new = getattr(before, frozen).state_dict(), getattr(after, frozen).state_dict()
        assert all(torch.equal(old[k].half().float(), new[k]) for k in old), frozen
    assert not torch.equal(before.query_tokens, after.query_tokens)
    convert(base / "out", base / "bundle", Choices("own", golden=False))
    assert (base / "bundle" / "bundle.json").exists()


def test_the_q_former_starts_from_bert(base: Path, tmp_path: Path) -> None:
    width = json.loads((base / "base" / "config.json").read_text())["qformer_config"]
    tokenizer = text.train_qformer_tokenizer(text.corpus(50, "bert"), 300)
    torch.manual_seed(3)
    bert = BertModel(
        BertConfig(
            vocab_size=len(tokenizer) - 1,
            hidden_size=width["hidden_size"],
            num_hidden_layers=width["num_hidden_layers"],
            num_attention_heads=width["num_attention_heads"],
            intermediate_size=width["intermediate_size"],
            max_position_embeddings=40,
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{k: v for k, v in tokenizer.special_tokens_map.items() if k != "bos_token"},
    )
    plain.save_pretrained(tmp_path / "bert")
    setup = pairs.Setup(CaptionedImages(base / "data"), base / "base", tmp_path / "work", tmp_path / "bert")
    vocabulary = len(pairs._qformer_tokenizer(setup))
    q = pairs._qformer(setup, pairs._base(setup.base), vocabulary)
    own, theirs = q.qformer.state_dict(), bert.state_dict()
    same = {
        "encoder.layer.0.attention.attention.query.weight": "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.1.intermediate_query.dense.weight": "encoder.layer.1.intermediate.dense.weight",
        "encoder.layer.1.intermediate.dense.weight": "encoder.layer.1.intermediate.dense.weight",
        "encoder.layer.1.output_query.LayerNorm.weight": "encoder.layer.1.output.LayerNorm.weight",
    }
    for mine, theirs_name in same.items():
        assert torch.equal(own[mine], theirs[theirs_name]), mine
    words = theirs["embeddings.word_embeddings.weight"]
    assert torch.equal(q.embeddings.word_embeddings.weight[: len(words)], words)


def test_a_base_that_cannot_be_used_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a BLIP-2 folder"):
        pairs._base(tmp_path)
    random_checkpoint.write(tmp_path / "few", "tiny", seed=0)
    with pytest.raises(DataError, match="32 query tokens"):
        pairs._base(tmp_path / "few")
