"""The Q-Former with its heads, under Hugging Face names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from blip2_export.read.checkpoint import CheckpointError
from blip2_export.read.lavis.state import Reader, State, heads

_HEAD_SIZE = 64  # BERT's
# Buffers, and tied copies of embeddings that a file keeps although it leaves out the frozen tables.
_LEFTOVERS = re.compile(
    r"Qformer\.bert\.embeddings\.position_ids|opt_model\.lm_head\.weight"
    r"|t5_model\.(encoder|decoder)\.embed_tokens\.weight|Qformer\.cls\.predictions\.decoder\.(weight|bias)"
)

_TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}


def qformer_source(file: Path, state: State) -> Reader:
    tensors, unknown = _renamed(state)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(f"{file}: it holds `{unknown[0]}`{more}, which no BLIP-2 model has")
    for name, source in _TIED.items():
        copy, value = state.get(name), state.get(source)
        if copy is not None and (value is None or copy.shape != value.shape or not bool((copy == value).all())):
            raise CheckpointError(f"{file}: `{name}` is not the same as `{source}`, to which it is tied")
    return Reader(file, tensors)


def qformer_config(read: Reader, n_features: int, is_stage1: bool) -> dict[str, Any]:
    layers = "qformer.encoder.layer."
    n_layers = read.count(layers)
    crossing = [i for i in range(n_layers) if read.has(f"{layers}{i}.crossattention.output.dense.weight")]
    frequency = crossing[1] if len(crossing) > 1 else n_layers
    if not crossing or crossing != list(range(0, n_layers, frequency)):
        raise CheckpointError(
            f"{read.where}: cross-attention in layers {crossing} of the Q-Former has no regular distance"
        )
    _, n_queries, width = read.shape("query_tokens", 3)
    words = "embeddings.word_embeddings.weight"
    if not is_stage1 and read.has(words):
        raise CheckpointError(f"{read.where}: a stage-2 file whose Q-Former reads text is not supported")
    qformer: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads(read.where, "Q-Former", width, _HEAD_SIZE),
        "intermediate_size": read.shape(layers + "0.intermediate_query.dense.weight", 2)[0],
        "cross_attention_frequency": frequency,
        "encoder_hidden_size": n_features,
    }
    config: dict[str, Any] = {"num_query_tokens": n_queries, "qformer_config": qformer}
    if is_stage1:
        qformer["use_qformer_text_input"] = True
        qformer["vocab_size"] = read.shape(words, 2)[0]
        qformer["max_position_embeddings"] = read.shape("embeddings.position_embeddings.weight", 2)[0]
        config["image_text_hidden_size"] = read.shape("vision_projection.weight", 2)[0]
    return config


def _renamed(state: State) -> tuple[State, list[str]]:
    """Tensors under their Hugging Face names, and the names that have none."""
    tensors: State = {}
    unknown = []
    for name, value in state.items():
        new = _qformer_name(name)
        if new is not None:
            tensors[new] = value
        elif not _LEFTOVERS.fullmatch(name):
            unknown.append(name)
    return tensors, unknown


_TOPS = {
    "ln_vision": "vision_model.post_layernorm",
    "opt_proj": "language_projection",
    "t5_proj": "language_projection",
    "vision_proj": "vision_projection",
    "text_proj": "text_projection",
    "itm_head": "itm_head",
    "Qformer.bert.embeddings.LayerNorm": "qformer.layernorm",
    "Qformer.cls.predictions.transform.dense": "cls.predictions.transform.dense",
    "Qformer.cls.predictions.transform.LayerNorm": "cls.predictions.transform.LayerNorm",
}
_WHOLE = {
    "query_tokens": "query_tokens",
    "temp": "temp",
    "Qformer.cls.predictions.bias": "cls.predictions.bias",
    "Qformer.bert.embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
    "Qformer.bert.embeddings.position_embeddings.weight": "embeddings.position_embeddings.weight",
}
_LAYER = re.compile(
    r"(?P<layer>encoder\.layer\.\d+\.)(?:(?P<attention>attention|crossattention)\.(?:self\.(?P<part>query|key|value)"
    r"|(?P<output>output\.(?:dense|LayerNorm)))|(?P<rest>(?:intermediate|output)(?:_query)?\.(?:dense|LayerNorm)))"
)


def _qformer_name(name: str) -> str | None:
    if name in _WHOLE:
        return _WHOLE[name]
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _TOPS:
        return f"{_TOPS[stem]}.{kind}"
    found = _LAYER.fullmatch(stem.removeprefix("Qformer.bert."))
    if found is None or not stem.startswith("Qformer.bert."):
        return None
    if found["rest"]:
        return f"qformer.{found['layer']}{found['rest']}.{kind}"
    inner = f"attention.{found['part']}" if found["part"] else found["output"]
    return f"qformer.{found['layer']}{found['attention']}.{inner}.{kind}"
