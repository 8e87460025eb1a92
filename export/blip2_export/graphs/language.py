"""The language model behind the Q-Former, whichever it is: its graphs and the `language` entry of `bundle.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blip2_export.graphs import llama, opt, t5
from blip2_export.graphs.builder import Graph, Output
from blip2_export.graphs.decoding import Decoder
from blip2_export.graphs.precision import Precision
from blip2_export.read import tokenizers
from blip2_export.read.checkpoint import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from blip2_export.read.configuration import Config


@dataclass(frozen=True)
class Language:
    family: str
    graphs: tuple[Graph, ...]
    facts: dict[str, Any]


def width(text: Any) -> int:
    """Of an input embedding, and so of a query."""
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


def at(out: Output, chosen: Precision | None, text: Any) -> Output:
    """In the chosen precision, or in the natural one, which for Flan-T5 is not float16: it overflows."""
    overflows = text.model_type == "t5" and out.kind.natural is Precision.FLOAT16
    return out.at(chosen or (Precision.BFLOAT16 if overflows else None))


def build(out: Output, checkpoint: Checkpoint, cfg: Config) -> Language:
    text = cfg.text_config
    ids = _token_ids(cfg, checkpoint)
    if text.model_type == "t5":
        both = t5.build(out, checkpoint, text)
        ids["decoder_start"] = _decoder_start(text, checkpoint)
        facts = _facts(text, t5.MAX_POSITIONS, both.decoder, ids)
        return Language(
            "encoder_decoder",
            (both.encoder, both.decoder.graph),
            {**facts, "cross_attention": both.cross_attention},
        )
    made = (llama if text.model_type == "llama" else opt).build(out, checkpoint, text)
    return Language("decoder_only", (made.graph,), _facts(text, text.max_position_embeddings, made, ids))


def _facts(text: Any, max_positions: int, made: Decoder, ids: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden": width(text),
        "vocab_size": text.vocab_size,
        "max_positions": max_positions,
        "token_ids": ids,
        "kv_cache": made.kv_cache,
    }


def _token_ids(cfg: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """As `generate()` of the reference uses them: the language model's own, whatever a generation_config.json beside it says."""
    text, folder = cfg.text_config, checkpoint.folder
    eos = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if not eos or any(not _embedded(token, text) for token in eos):
        raise CheckpointError(
            f"{folder}: text_config.eos_token_id of config.json is {text.eos_token_id}, so that no text would end; set it to "
            f"an id below {text.vocab_size} (the reference takes none from generation_config.json)"
        )
    image = cfg.image_token_index
    image = tokenizers.image_token(checkpoint.tokenizer_folder) if image is None else image
    if not 0 <= image < 1 << 32:
        raise CheckpointError(f"{folder}: image_token_index of config.json is {image}, which is no token id")
    ids = {name: getattr(text, f"{name}_token_id", None) for name in ("bos", "pad")}
    return {
        "bos": ids["bos"] if _embedded(ids["bos"], text) else None,
        "eos": eos,
        "pad": ids["pad"] if _embedded(ids["pad"], text) else None,
        "image": image,
    }


def _embedded(token: Any, text: Any) -> bool:
    return type(token) is int and 0 <= token < text.vocab_size


def _decoder_start(text: Any, checkpoint: Checkpoint) -> int:
    """The first token that the decoder reads; the reference falls back to the one that starts a text."""
    ids = (getattr(text, name, None) for name in ("decoder_start_token_id", "bos_token_id"))
    found = next((token for token in ids if token is not None), None)
    if not _embedded(found, text):
        raise CheckpointError(
            f"{checkpoint.folder}: text_config.decoder_start_token_id of config.json is {found}, expected an id below "
            f"{text.vocab_size}"
        )
    return int(found)
