"""The language model behind the Q-Former, whichever it is: its graphs and the `language` entry of `bundle.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Blip2Config, InstructBlipConfig

from blip2_export.graphs import llama, opt, t5
from blip2_export.graphs.builder import Graph
from blip2_export.graphs.decoding import Decoder
from blip2_export.read import processor
from blip2_export.read.checkpoint import Checkpoint, CheckpointError

_NO_TABLE_POSITIONS = 2048  # what a model without a position table is trusted with
Config = Blip2Config | InstructBlipConfig


@dataclass(frozen=True)
class Language:
    family: str
    graphs: tuple[Graph, ...]
    facts: dict[str, Any]


def width(text: Any) -> int:
    """Of an input embedding, and so of a query."""
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


def build(folder: Path, checkpoint: Checkpoint, cfg: Config) -> Language:
    text = cfg.text_config
    ids = _token_ids(cfg, checkpoint)
    if text.model_type == "t5":
        both = t5.build(folder, checkpoint, text)
        ids["decoder_start"] = _decoder_start(text, checkpoint)
        facts = _facts(text, _NO_TABLE_POSITIONS, both.decoder, ids)
        return Language(
            "encoder_decoder",
            (both.encoder, both.decoder.graph),
            {**facts, "cross_attention": both.cross_attention},
        )
    made = (llama if text.model_type == "llama" else opt).build(folder, checkpoint, text)
    return Language("decoder_only", (made.graph,), _facts(text, text.max_position_embeddings, made, ids))


def _facts(text: Any, max_positions: int, made: Decoder, ids: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden": width(text),
        "vocab_size": text.vocab_size,
        "max_positions": max_positions,
        "embedding": made.embedding,
        "token_ids": ids,
        "kv_cache": made.kv_cache,
    }


def _token_ids(cfg: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """As `generate()` of the reference uses them: the language model's own, not a generation_config.json beside it."""
    text = cfg.text_config
    eos = text.eos_token_id
    if eos is None:
        raise CheckpointError(f"{checkpoint.folder}: config.json has no text_config.eos_token_id")
    image = cfg.image_token_index
    return {
        "bos": getattr(text, "bos_token_id", None),
        "eos": eos if isinstance(eos, list) else [eos],
        "pad": text.pad_token_id,
        "image": processor.image_token(checkpoint.tokenizer_folder) if image is None else image,
    }


def _decoder_start(text: Any, checkpoint: Checkpoint) -> int:
    """The first token that the decoder reads; the reference falls back to the one that starts a text."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        if (found := getattr(text, name, None)) is not None:
            return int(found)
    raise CheckpointError(f"{checkpoint.folder}: config.json has no text_config.decoder_start_token_id")
