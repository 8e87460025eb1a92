"""Image encoders: EVA's and CLIP's, out of the file itself, a file of their own or a BLIP-2 folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from blip2_export.read.checkpoint import CheckpointError, Source, TensorFiles, read_json
from blip2_export.read.lavis.state import Reader, Renamed, State, heads, read_state

_HEAD_SIZES = {"eva": 88, "clip": 64}
_LN_VISION_EPSILON = 1e-5  # PyTorch's default, whatever the blocks have
_DEPTHS = {("eva", 1408): 39, ("clip", 1024): 23}  # of ViT-g and ViT-L: features come from the last layer but one
# What an original image encoder ends with and BLIP-2 does without.
_UNUSED_TOPS = {"eva": re.compile(r"(fc_)?norm\.|head\.|mask_token$"), "clip": re.compile(r"ln_post\.|proj$")}
_VISUAL = "visual_encoder."


def vision_source(file: Path, state: State, other: Path | None) -> tuple[Source, dict[str, Any]]:
    """The image encoder with its configuration: out of `state`, where its tensors are removed, or from `other`."""
    own = {name.removeprefix(_VISUAL): state.pop(name) for name in list(state) if name.startswith(_VISUAL)}
    if own and other:
        raise CheckpointError(f"{file}: it holds its own image encoder; leave --vision-weights out")
    if own:
        return _vision(file, own, bare=False)
    if other is None:
        raise CheckpointError(
            f"{file}: it holds no image encoder; give one with --vision-weights (eva_vit_g.pth, clip_vit_L.pth, or a folder)"
        )
    if other.is_dir():
        return _vision_folder(other)
    read = read_state(other)
    tuned = {name.removeprefix(_VISUAL): value for name, value in read.items() if name.startswith(_VISUAL)}
    return _vision(other, tuned or read, bare=not tuned)


def _vision_folder(folder: Path) -> tuple[Source, dict[str, Any]]:
    """The image encoder of a Hugging Face BLIP-2 folder. Its last norm is not taken: that is trained with the Q-Former."""
    from transformers import Blip2VisionConfig

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: config.json is missing; expected a Hugging Face BLIP-2 folder")
    said = read_json(folder / "config.json").get("vision_config") or {}
    files = TensorFiles(folder)
    own = {name: name for name in files.names() if name.startswith("vision_model.")}
    if not own:
        raise CheckpointError(f"{folder}: no tensor `vision_model.…` is there")
    return Renamed(files, own), {**Blip2VisionConfig(**said).to_dict(), "post_layernorm_eps": _LN_VISION_EPSILON}


_EVA_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.projection",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _vision(file: Path, state: State, bare: bool) -> tuple[Source, dict[str, Any]]:
    """Renamed tensors and their configuration. `bare`: an original file, with one block more than is used."""
    kind = "clip" if "conv1.weight" in state else "eva"
    if kind == "eva" and "patch_embed.proj.weight" not in state:
        raise CheckpointError(f"{file}: neither EVA's image encoder (patch_embed) nor CLIP's (conv1) is there")
    blocks = "transformer.resblocks." if kind == "clip" else "blocks."
    read = Reader(file, state)
    n_blocks = read.count(blocks)
    width, _, patch, _ = read.shape("conv1.weight" if kind == "clip" else "patch_embed.proj.weight", 4)
    depth = _DEPTHS.get((kind, width), n_blocks - 1) if bare else n_blocks
    if depth < 1 or n_blocks < depth:
        raise CheckpointError(f"{file}: {n_blocks} blocks of width {width} are there, at least {depth} are needed")
    inner = read.shape(f"{blocks}0.mlp.{'c_fc' if kind == 'clip' else 'fc1'}.weight", 2)[0]
    tensors = (_clip if kind == "clip" else _eva)(read, depth)
    dropped = re.compile(re.escape(blocks) + rf"({'|'.join(str(i) for i in range(depth, n_blocks)) or '(?!)'})\.")
    unknown = [n for n in read.untouched() if not (dropped.match(n) or (bare and _UNUSED_TOPS[kind].match(n)))]
    if unknown:
        raise CheckpointError(f"{file}: it holds `{unknown[0]}`, which the image encoder of BLIP-2 has not")
    side = round((tensors["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    clip = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "pre_layernorm": True}
    return Reader(file, {f"vision_model.{name}": value for name, value in tensors.items()}), {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads(file, "image encoder", width, _HEAD_SIZES[kind]),
        "image_size": side * patch,
        "patch_size": patch,
        "post_layernorm_eps": _LN_VISION_EPSILON,
        **(clip if kind == "clip" else {"hidden_act": "gelu", "layer_norm_eps": 1e-6}),
    }


def _eva(read: Reader, depth: int) -> State:
    import torch

    tensors = {
        "embeddings.class_embedding": read.take("cls_token"),
        "embeddings.position_embedding": read.take("pos_embed"),
        **read.pair("patch_embed.proj", "embeddings.patch_embedding"),
    }
    for i in range(depth):
        old, new = f"blocks.{i}.", f"encoder.layers.{i}."
        for name, renamed in _EVA_BLOCK.items():
            tensors |= read.pair(old + name, new + renamed)
        query, value = read.take(old + "attn.q_bias"), read.take(old + "attn.v_bias")
        tensors[new + "self_attn.qkv.weight"] = read.take(old + "attn.qkv.weight")
        tensors[new + "self_attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return tensors


def _clip(read: Reader, depth: int) -> State:
    tensors = {
        "embeddings.class_embedding": read.take("class_embedding")[None, None],
        "embeddings.position_embedding": read.take("positional_embedding")[None],
        "embeddings.patch_embedding.weight": read.take("conv1.weight"),
        **read.pair("ln_pre", "pre_layernorm"),
    }
    for i in range(depth):
        old, new = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for name, renamed in _CLIP_BLOCK.items():
            tensors |= read.pair(old + name, new + renamed)
        for kind in ("weight", "bias"):
            tensors[f"{new}self_attn.qkv.{kind}"] = read.take(f"{old}attn.in_proj_{kind}")
    return tensors
