"""Texts of every script in the engine and in `transformers`: the same token ids, seen through what they lead to."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine import ENGINE
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blip2_export import vocabulary
from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.check.parity import drawn_pictures
from blip2_export.read.checkpoint import Checkpoint
from blip2_export.read.tokenizers import QUESTION_FOLDER
from blip2_export.reference import retrieval
from blip2_export.reference.generation import Reference
from blip2_export.reference.pictures import preprocess

SEED, N_TEXTS = 11, 60
TOLERANCE = 1e-4
PIECES = (
    *("a red star", "two dogs", "beach", "how many?", "Question", "x", "7", "{x}", "~", "<b>", "don't", "it's 3.5%"),
    *("🎉", "👩\u200d👧\u200d👦", "🏳️\u200d🌈", "👍🏽", "🇩🇪", "☺", "\U0010ffff", "\ue000", "\u0378"),
    *(
        "漢字",
        "日本語のテキスト",
        "한국어",
        "\u1112\u1161\u11ab",
        "中",
        "ｆｕｌｌ",
        "𝔪𝔞𝔱𝔥",
        "ไทย",
        "हिन्दी",
        "Ελληνικά",
        "Кириллица",
    ),
    *("é", "e\u0301", "a\u0323\u0302", "\u0301", "Å", "ﬁ", "ß", "İ", "ı", "ǆ", "Ω", "½", "²"),
    *("\u200b", "\u200c", "\u200d", "\ufeff", "\u2060", "\u00ad", "\u202e", "\u061c"),
    *("שלום", "مرحبا", "\u0627\u0654", "\u200fא\u200e"),
    *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\u0085", "\u1680"),
    *("\x01", "\x07", "\x1b[1m", "\x1f", "\x7f", "\x9b", "\ufffd", "\ufffe"),
)
# What the engine takes from the ends of a question.
WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")


def texts(n: int, seed: int, longest: int = 8) -> list[str]:
    rng = random.Random(seed)
    drawn = ["".join(rng.choices(PIECES, k=rng.randint(1, longest))) for _ in range(n)]
    spaced = [" ".join(rng.choices(PIECES, k=rng.randint(1, longest))) for _ in range(n)]
    return [text for text in (*drawn, *spaced) if text.strip()][:n]


LONG = (
    "z" * 101,
    "a" * 99 + " " + "b" * 130,
    "漢" * 140,
    "red🎉" * 60,
    "star " * 50 + "🎉 end",
    "e\u0301" * 120,
    "\u200d" * 200 + "a",
)


def bytes_behind_pieces() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """LLaMA's as it is released: a normaliser in the place of a pre-tokenizer, and bytes for what has no piece."""
    pieces, ids = random_checkpoint._piece_tokenizer()
    content = json.loads(pieces.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    model = content["model"]
    model["vocab"] |= {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    content["model"] = {**model, "byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    return random_checkpoint._fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), ids


def normalised_pieces() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """T5's with what its sentencepiece model does first: compatible characters, and white space of one kind."""
    tokenizer = vocabulary.unigram(random_checkpoint._SENTENCES, parts=True)
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    fast = random_checkpoint._fast(tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return fast, random_checkpoint._unigram_tokenizer()[1]


def engine_rows(*typed: str) -> list[dict[str, Any]]:
    assert ENGINE.exists(), f"{ENGINE} is not there; build it first (cargo build)"
    done = subprocess.run([str(ENGINE), *typed], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.split("\n") if line]


Made = Callable[[], tuple[PreTrainedTokenizerFast, dict[str, int]]]


@pytest.mark.parametrize(
    ("shape", "tokenizer", "warns"),
    [
        ("tiny", None, False),  # every byte has a token
        ("t5", None, True),
        ("t5", normalised_pieces, True),
        ("llama", None, True),
        ("llama", bytes_behind_pieces, False),
        ("vqa-opt", None, True),  # the Q-Former lacks what bytes have
        ("instruct-t5", None, True),
    ],
)
def test_questions_of_every_script_are_read_as_the_reference_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, tokenizer: Made | None, warns: bool
) -> None:
    if tokenizer:
        monkeypatch.setitem(random_checkpoint.TOKENIZERS, shape, tokenizer)
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    random_checkpoint.write(checkpoint, shape, seed=3)
    convert(checkpoint, bundle, Choices(shape, golden=False))
    facts = json.loads((bundle / "bundle.json").read_text())
    reference, own = Reference(checkpoint, facts), AutoTokenizer.from_pretrained(checkpoint)
    template = facts["prompts"]["ask"]
    room = facts["language"]["max_positions"] - facts["qformer"]["n_queries"]
    asked = [question for text in (*texts(N_TEXTS, SEED), *LONG) if (question := text.strip(WHITE))]
    asked = [question for question in asked if len(own(template.format(question))["input_ids"]) <= room]
    assert len(asked) > N_TEXTS / 2
    with drawn_pictures(1) as ([picture], [path]):
        options = ("--json", "--beams", "1", "--max-new-tokens", "1", "--log-probs", "5")
        rows = engine_rows("ask", "--model", str(bundle), *options, str(path), "--", *asked)
        pixels = preprocess(picture, facts["image"])
    for row, question in zip(rows, asked, strict=True):
        prompt = template.format(question)
        ids, logits, _, _ = reference.generate(pixels, prompt, 1, question)
        assert ids == own(prompt)["input_ids"], question
        check_question_ids(checkpoint, reference, prompt, question)
        wanted = np.sort(logits - np.logaddexp.reduce(logits))[: -1 - 5 : -1]
        found = [best["log_prob"] for best in row["log_probs"][0]["alternatives"]]
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE, err_msg=ascii(question))
        assert own.unk_token_id not in ids or row["warnings"], ascii(question)
    assert any("warnings" in row for row in rows) == warns
    assert len({round(row["log_probs"][0]["log_prob"], 4) for row in rows}) > len(rows) / 2, "it answers all alike"


def check_question_ids(checkpoint: Path, reference: Reference, prompt: str, question: str) -> None:
    """What the Q-Former gets is what the checkpoint's own tokenizer makes of it, cut as the bundle says."""
    if reference.question is None:
        return
    reads, most = reference.question["reads"], reference.question["max_tokens"]
    side = reference.question["truncation_side"]
    own = AutoTokenizer.from_pretrained(checkpoint / QUESTION_FOLDER, truncation_side=side)
    said = prompt if reads == "prompt" else question
    wanted = own(said, truncation=True, max_length=most)["input_ids"]
    assert reference.question_ids(prompt, question) == wanted, ascii(said)


def test_texts_of_every_script_are_matched_as_the_reference_matches_them(tmp_path: Path) -> None:
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    random_retrieval.write(checkpoint, "itm-tiny", seed=3)
    convert(checkpoint, bundle, Choices("itm-tiny", golden=False))
    facts = json.loads((bundle / "bundle.json").read_text())
    reference, own = (
        retrieval.Reference(Checkpoint(checkpoint), bundle, facts),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    asked = [*texts(4 * N_TEXTS, SEED + 1, longest=20), *LONG]
    with drawn_pictures(1) as ([picture], [path]):
        rows = engine_rows("match", "--model", str(bundle), "--json", str(path), "--", *asked)
        features = reference.features(preprocess(picture, facts["image"]))
    image, n_unknown = reference.image(features)[1], 0
    for row, text in zip(rows, asked, strict=True):
        wanted = reference.match(features, image, text)
        assert wanted["input_ids"] == own(text, truncation=True, max_length=reference.max_tokens)["input_ids"]
        found = [row["itm_logit"], row["itc_similarity"]]
        np.testing.assert_allclose(found, [wanted["itm_logits"][1], wanted["itc"]], atol=TOLERANCE, err_msg=ascii(text))
        n_unknown += own.unk_token_id in wanted["input_ids"]
        assert own.unk_token_id not in wanted["input_ids"] or row["warnings"], ascii(text)
    assert len(rows) / 4 < n_unknown < len(rows), "texts with and without unknown characters"
