"""What a checkpoint may hold that is none of this model's own tensors: recognised by names, said in half a sentence."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

_QUANTIZED = re.compile(
    r"\.(SCB|absmax|quant_map|quant_state\..+|nested_.+|qweight|qzeros|g_idx|scales|weight_scale\w*)$"
)
_ADAPTED = re.compile(r"(^|\.)lora_|\.base_layer\.|\.modules_to_save\.")
_MARK = "query_tokens"  # every model here has it, at its top
_SAVED_BY = {
    "module.": "DataParallel, whose `.module` is the model to save",
    "_orig_mod.": "torch.compile, whose `._orig_mod` is the model to save",
    "base_model.model.": "peft, whose `merge_and_unload()` gives the model to save",
}
_NO_WEIGHTS = (  # patterns of names in a folder that has no weights to read, and what to do about it
    (r".+\.gguf", "a GGUF file; convert the checkpoint that it was made from"),
    (r"global_step\d+|zero_to_fp32\.py", "DeepSpeed's shards; run its zero_to_fp32.py in the folder first"),
    (r".+\.distcp|pytorch_model_fsdp.*", "FSDP's shards; merge them first (`accelerate merge-weights`)"),
    (r"tf_model\.h5|flax_model\.msgpack", "weights of TensorFlow or Flax; save them with PyTorch first"),
    (
        r"optimizer\.(pt|bin)|trainer_state\.json",
        "a trainer's state without the model; save that with `save_pretrained`",
    ),
)


def quantized(config: dict[str, Any]) -> str | None:
    """Whether the configuration says that weights are no plain numbers."""
    said = config.get("quantization_config")
    if not said:
        return None
    method = said.get("quant_method", "of a kind it does not name") if isinstance(said, dict) else said
    return f"config.json has a quantization_config ({method}); convert the checkpoint that was quantized"


def wrapped(names: Collection[str]) -> str | None:
    """Whether the names are those of a quantized, an adapted or a wrapped model."""
    found = next(filter(_QUANTIZED.search, names), None)
    if found:
        return f"it holds `{found}`, so its weights are quantized; convert the checkpoint that was quantized"
    found = next(filter(_ADAPTED.search, names), None)
    if found:
        return f"it holds `{found}` of an adapter among the weights; save what peft's `merge_and_unload()` gives"
    prefix = next((name.removesuffix(_MARK) for name in names if name.endswith("." + _MARK)), None)
    if prefix is None or _MARK in names:
        return None
    by = _SAVED_BY.get(prefix, "a module around the model; save the model inside it")
    return f"its tensors are named `{prefix}…`, as saved by {by}"


def without_weights(there: Iterable[str]) -> str | None:
    """What lies in a folder, by the names in it, that has no weights."""
    listed = sorted(there)
    for pattern, said in _NO_WEIGHTS:
        found = next((name for name in listed if re.fullmatch(pattern, name.rpartition("/")[2])), None)
        if found:
            return f"`{found}` is there: {said}"
    return None


def no_model(keys: Collection[str]) -> str | None:
    """What a pickled file holds, by the names at its top, that is no state of a model."""
    if {"state", "param_groups"} <= set(keys):
        return "it holds an optimizer's state, not a model's"
    if "state_dict" in keys:
        return "its model lies under `state_dict`, as Lightning saves it; save that alone, under the model's own names"
    return None
