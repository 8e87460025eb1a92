"""config.json as the reference's class for it, its numbers checked before anything is built of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.read.guarded import in_one_sentence

if TYPE_CHECKING:
    from transformers import Blip2Config, InstructBlipConfig

    Config = Blip2Config | InstructBlipConfig

_LAYERS, _WIDTH, _POSITIONS, _IDS = 1 << 12, 1 << 18, 1 << 20, 1 << 24
_LARGEST = {  # of what sizes a tensor or counts a loop; each is 1 at least
    "image_size": 1 << 12,
    "patch_size": 1 << 12,
    "num_query_tokens": _POSITIONS,
    "cross_attention_frequency": _LAYERS,
    "relative_attention_num_buckets": 1 << 16,
    "relative_attention_max_distance": 1 << 16,
    "max_position_embeddings": _POSITIONS,
    "vocab_size": _IDS,
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "d_kv", "head_dim"), _WIDTH),
    **dict.fromkeys(("hidden_size", "intermediate_size", "encoder_hidden_size", "image_text_hidden_size"), _WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "ffn_dim", "d_model", "d_ff"), _WIDTH),
}
_EPSILONS = ("layer_norm_eps", "post_layernorm_eps", "layer_norm_epsilon", "rms_norm_eps")
_DIVIDED = (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"))


def read(checkpoint: Checkpoint) -> Config:
    """The reference's configuration of a checkpoint."""
    from transformers import Blip2Config, InstructBlipConfig

    kind = InstructBlipConfig if checkpoint.config["model_type"] == "instructblip" else Blip2Config
    with in_one_sentence(f"{checkpoint.folder}: config.json is not understood"):
        cfg = kind(**checkpoint.config)
    parts = {"": cfg, "vision_config.": cfg.vision_config, "qformer_config.": cfg.qformer_config}
    if not checkpoint.is_retrieval:
        parts["text_config."] = cfg.text_config
    wrong = next((said for name, part in parts.items() for said in _wrong(name, part)), None)
    if wrong:
        raise CheckpointError(f"{checkpoint.folder}: config.json says {wrong}")
    return cfg


def _wrong(name: str, part: Any) -> list[str]:
    """What no model can be built of."""
    said = []
    for key, largest in _LARGEST.items():
        value = getattr(part, key, None)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            said.append(f"{name}{key} is {_short(value)}; whole numbers from 1 to {largest} are possible")
    for key in _EPSILONS:
        value = getattr(part, key, None)
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            said.append(f"{name}{key} is {_short(value)}; it must be above 0")
    for whole, divisor in _DIVIDED:
        a, b = getattr(part, whole, None), getattr(part, divisor, None)
        if not said and a and b and a % b and not getattr(part, "head_dim", None):
            said.append(f"{name}{whole} is {a}, which {divisor} ({b}) does not divide")
    return said


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
