"""Shapes of random checkpoints, drawn from a seed: every family, with head dimensions and layer counts that nobody trains."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2_export.check import random_checkpoint, random_retrieval

_HEADS = (5, 7, 8, 11, 12, 16, 20, 22, 27, 32)
FAMILIES = ("opt", "t5", "llama", "instruct-opt", "instruct-t5", "instruct-llama", "vqa-opt", "vqa-t5", "vqa-llama")
STAGE_1 = ("itm", "itg", "itg-clip")


@dataclass(frozen=True)
class Drawn:
    family: str
    parts: dict[str, Any]

    def write(self, folder: Path, seed: int) -> None:
        if self.family in STAGE_1:
            random_retrieval.write(folder, self.parts, seed)
        else:
            random_checkpoint.write(folder, self.parts, seed)


def draw(rng: random.Random, i: int) -> Drawn:
    """The i-th of a row in which the families take turns."""
    family = (*FAMILIES, *STAGE_1)[i % len(FAMILIES + STAGE_1)]
    parts: dict[str, Any] = {
        "vision_config": _vision(rng),
        "qformer_config": _qformer(rng),
        "top": {"num_query_tokens": rng.randint(1, 12)},
    }
    if family in STAGE_1:
        parts["top"]["image_text_hidden_size"] = rng.randint(9, 40)
        parts["writes"] = family != "itm"
        if family == "itg-clip":
            parts["vision_config"] |= random_retrieval.CLIP
            parts["vision_config"].pop("qkv_bias")
        return Drawn(family, parts)
    conditioned, _, language = family.rpartition("-")
    parts["text_config"] = {"model_type": language, **_LANGUAGES[language](rng)}
    if conditioned == "instruct":
        parts["top"]["model_type"] = "instructblip"
    if conditioned == "vqa":
        parts["qformer_config"]["use_qformer_text_input"] = True
    return Drawn(family, parts)


def _vision(rng: random.Random) -> dict[str, Any]:
    heads, patch = rng.randint(1, 4), rng.choice((7, 8, 14))
    return {
        "hidden_size": heads * rng.choice(_HEADS),
        "num_attention_heads": heads,
        "intermediate_size": rng.randint(20, 90),
        "num_hidden_layers": rng.randint(1, 3),
        "patch_size": patch,
        "image_size": patch * rng.randint(2, 5),
        "hidden_act": rng.choice(("gelu", "quick_gelu")),
        "qkv_bias": rng.random() < 0.7,
    }


def _qformer(rng: random.Random) -> dict[str, Any]:
    heads = rng.randint(1, 6)
    return {
        "hidden_size": heads * rng.choice(_HEADS),
        "num_attention_heads": heads,
        "intermediate_size": rng.randint(20, 90),
        "num_hidden_layers": rng.randint(1, 4),
        "cross_attention_frequency": rng.randint(1, 3),
    }


def _opt(rng: random.Random) -> dict[str, Any]:
    heads = rng.randint(1, 4)
    width = heads * rng.choice(_HEADS[3:])
    small = rng.random() < 0.3  # as OPT-350M: norms behind the layers, narrower embeddings
    return {
        "hidden_size": width,
        "word_embed_proj_dim": rng.randint(9, width) if small else width,
        "do_layer_norm_before": not small,
        "num_attention_heads": heads,
        "num_hidden_layers": rng.randint(1, 4),
        "ffn_dim": rng.randint(30, 90),
        "activation_function": rng.choice(("relu", "gelu")),
        "enable_bias": rng.random() < 0.7,
        "layer_norm_elementwise_affine": rng.random() < 0.7,
        "tie_word_embeddings": rng.random() < 0.6,
    }


def _t5(rng: random.Random) -> dict[str, Any]:
    gated = rng.random() < 0.8
    activation = rng.choice(("gelu", "gelu_new")) if gated else "relu"
    n_layers = rng.randint(1, 3)
    return {
        "d_model": rng.randint(24, 60),
        "d_kv": rng.choice(_HEADS),
        "num_heads": rng.randint(1, 5),
        "d_ff": rng.randint(30, 90),
        "num_layers": n_layers,
        "num_decoder_layers": rng.randint(1, n_layers),  # the reference's cache takes no more
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "dense_act_fn": activation,
        "tie_word_embeddings": rng.random() < 0.3,
    }


def _llama(rng: random.Random) -> dict[str, Any]:
    shared, groups = rng.randint(1, 3), rng.randint(1, 3)
    return {
        "hidden_size": shared * groups * rng.randint(7, 19),  # need not be that of all heads together
        "head_dim": 2 * rng.randint(3, 16),
        "num_attention_heads": shared * groups,
        "num_key_value_heads": groups,
        "intermediate_size": rng.randint(30, 90),
        "num_hidden_layers": rng.randint(1, 3),
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.3,
    }


_LANGUAGES = {"opt": _opt, "t5": _t5, "llama": _llama}
