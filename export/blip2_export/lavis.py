"""LAVIS `.pth` files, presented as checkpoints with Hugging Face names and a configuration that follows from the tensors.

Stage-1 files hold a Q-Former with its text branch and heads; stage-2 files one that feeds a language model, which lies elsewhere.
The image encoder is in the file when it was trained, and in a file of its own otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np
from transformers import Blip2VisionConfig

from blip2_export import pickled, processor
from blip2_export.checkpoint import RETRIEVAL, Checkpoint, CheckpointError, TensorFiles, read_json

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]

_HEAD_SIZE, _EVA_HEAD_SIZE = 64, 88  # BERT's and CLIP's; EVA's ViT-g
_LN_VISION_EPSILON = 1e-5  # PyTorch's default, whatever the blocks have
_DEPTHS = {("eva", 1408): 39, ("clip", 1024): 23}  # of ViT-g and ViT-L: features come from the last layer but one
_STAGE_1 = "stage 1"
_PROJECTIONS = {"opt_proj": "opt", "t5_proj": "t5"}
# Buffers, and tied copies of embeddings that a file keeps although it leaves out the frozen tables.
_LEFTOVERS = re.compile(
    r"Qformer\.bert\.embeddings\.position_ids|opt_model\.lm_head\.weight"
    r"|t5_model\.(encoder|decoder)\.embed_tokens\.weight|Qformer\.cls\.predictions\.decoder\.(weight|bias)"
)
# What an original image encoder ends with and BLIP-2 does without.
_UNUSED_TOPS = {"eva": re.compile(r"(fc_)?norm\.|head\.|mask_token$"), "clip": re.compile(r"ln_post\.|proj$")}


@dataclass(frozen=True)
class Parts:
    """Where the parts lie that a LAVIS file leaves out."""

    vision: Path | None = None
    llm: Path | None = None
    tokenizer: Path | None = None


class LavisCheckpoint(Checkpoint):
    """A LAVIS file with its missing parts. `folder` is the file, for messages."""

    asks = "the other tensors ask for"

    def __init__(self, file: Path, parts: Parts) -> None:
        self.folder = file
        self.processor_folder = None
        state = _read_state(file)
        kind = _kind(file, state)
        language = None if kind == _STAGE_1 else _Language(file, parts, kind)
        self.tokenizer_folder = _tokenizer_folder(file, parts, kind)
        eye, vision_config = _vision_source(file, state, parts.vision)
        bridge = _qformer_source(file, state)
        self._sources: list[_Source] = [bridge, eye]
        self.config: dict[str, Any] = {"model_type": "blip-2", "vision_config": vision_config}
        self.config |= _qformer_config(bridge, vision_config["hidden_size"], kind)
        if language:
            self._sources.append(language.tensors)
            self.config |= language.config(self.tokenizer_folder)
        else:
            self.config["architectures"] = [RETRIEVAL]

    @property
    def n_bytes(self) -> int:
        return sum(source.n_bytes for source in self._sources)

    def has(self, name: str) -> bool:
        return any(source.has(name) for source in self._sources)

    def _read(self, name: str) -> np.ndarray:
        return next(source for source in self._sources if source.has(name)).read(name)


class _Source(Protocol):
    """Tensors by name."""

    @property
    def n_bytes(self) -> int: ...
    def has(self, name: str) -> bool: ...
    def read(self, name: str) -> np.ndarray: ...


def _kind(file: Path, state: State) -> str:
    """`stage 1`, `opt` or `t5`."""
    if "itm_head.weight" in state:
        return _STAGE_1
    found = [kind for name, kind in _PROJECTIONS.items() if f"{name}.weight" in state]
    if len(found) != 1 or "query_tokens" not in state:
        raise CheckpointError(
            f"{file}: neither a stage-1 file (itm_head) nor a stage-2 file (opt_proj, t5_proj) of BLIP-2"
        )
    return found[0]


def _tokenizer_folder(file: Path, parts: Parts, kind: str) -> Path:
    if kind != _STAGE_1:
        assert parts.llm is not None, "_Language looked"
        return parts.tokenizer or parts.llm
    if parts.llm is not None:
        raise CheckpointError(f"{file}: a stage-1 file goes with no language model; leave --llm out")
    if parts.tokenizer is None:
        raise CheckpointError(
            f"{file}: give the folder of the Q-Former's tokenizer (bert-base-uncased) with --tokenizer"
        )
    return parts.tokenizer


# The Q-Former


def _qformer_source(file: Path, state: State) -> _Reader:
    tensors, unknown = _renamed(state)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(f"{file}: it holds `{unknown[0]}`{more}, which no BLIP-2 model has")
    head, words = (
        state.get(f"Qformer.{n}.weight") for n in ("cls.predictions.decoder", "bert.embeddings.word_embeddings")
    )
    if head is not None and (words is None or head.shape != words.shape or not bool((head == words).all())):
        raise CheckpointError(f"{file}: the head of the Q-Former is not tied to its word embeddings")
    return _Reader(file, tensors)


def _qformer_config(read: _Reader, n_features: int, kind: str) -> dict[str, Any]:
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
    if kind != _STAGE_1 and read.has(words):
        raise CheckpointError(f"{read.where}: a stage-2 file whose Q-Former reads text is not supported")
    qformer: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": _heads(read.where, "Q-Former", width, _HEAD_SIZE),
        "intermediate_size": read.shape(layers + "0.intermediate_query.dense.weight", 2)[0],
        "cross_attention_frequency": frequency,
        "encoder_hidden_size": n_features,
    }
    config: dict[str, Any] = {"num_query_tokens": n_queries, "qformer_config": qformer}
    if kind == _STAGE_1:
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


# Image encoders

_VISUAL = "visual_encoder."


def _vision_source(file: Path, state: State, other: Path | None) -> tuple[_Source, dict[str, Any]]:
    """The image encoder with its configuration: out of `state`, where its tensors are removed, or from `other`."""
    own = {name.removeprefix(_VISUAL): state.pop(name) for name in list(state) if name.startswith(_VISUAL)}
    if own and other:
        raise CheckpointError(f"{file}: it holds its own image encoder; leave --vision out")
    if own:
        return _vision(file, own, bare=False)
    if other is None:
        raise CheckpointError(
            f"{file}: it holds no image encoder; give one with --vision (eva_vit_g.pth, clip_vit_L.pth, or a folder)"
        )
    if other.is_dir():
        return _vision_folder(other)
    read = _read_state(other)
    tuned = {name.removeprefix(_VISUAL): value for name, value in read.items() if name.startswith(_VISUAL)}
    return _vision(other, tuned or read, bare=not tuned)


def _vision_folder(folder: Path) -> tuple[_Source, dict[str, Any]]:
    """The image encoder of a Hugging Face BLIP-2 folder. Its last norm is not taken: that is trained with the Q-Former."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: config.json is missing; expected a Hugging Face BLIP-2 folder")
    said = read_json(folder / "config.json").get("vision_config") or {}
    files = TensorFiles(folder)
    if not any(name.startswith("vision_model.") for name in files.names()):
        raise CheckpointError(f"{folder}: no tensor `vision_model.…` is there")
    return files, {**Blip2VisionConfig(**said).to_dict(), "post_layernorm_eps": _LN_VISION_EPSILON}


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


def _vision(file: Path, state: State, bare: bool) -> tuple[_Source, dict[str, Any]]:
    """Renamed tensors and their configuration. `bare`: an original file, with one block more than is used."""
    kind = "clip" if "conv1.weight" in state else "eva"
    if kind == "eva" and "patch_embed.proj.weight" not in state:
        raise CheckpointError(f"{file}: neither EVA's image encoder (patch_embed) nor CLIP's (conv1) is there")
    blocks = "transformer.resblocks." if kind == "clip" else "blocks."
    read = _Reader(file, state)
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
    return _Reader(file, {f"vision_model.{name}": value for name, value in tensors.items()}), {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": _heads(file, "image encoder", width, _HEAD_SIZE if kind == "clip" else _EVA_HEAD_SIZE),
        "image_size": side * patch,
        "patch_size": patch,
        "post_layernorm_eps": _LN_VISION_EPSILON,
        **(clip if kind == "clip" else {"hidden_act": "gelu", "layer_norm_eps": 1e-6}),
    }


def _eva(read: _Reader, depth: int) -> State:
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


def _clip(read: _Reader, depth: int) -> State:
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


def _heads(file: Path, what: str, width: int, head: int) -> int:
    if width % head:
        raise CheckpointError(f"{file}: the {what}'s width {width} is no multiple of its head size {head}")
    return width // head


# The language model


class _Language:
    """A folder with an OPT or T5 model, as LAVIS uses it."""

    def __init__(self, file: Path, parts: Parts, kind: str) -> None:
        if parts.llm is None:
            raise CheckpointError(f"{file}: a stage-2 file holds no language model; give its folder with --llm")
        if not (parts.llm / "config.json").is_file():
            raise CheckpointError(f"{parts.llm}: config.json is missing; expected the folder of the language model")
        self.folder, self.kind = parts.llm, kind
        self.said = read_json(parts.llm / "config.json")
        found = self.said.get("model_type")
        if found != kind:
            raise CheckpointError(
                f"{parts.llm}: the language model is `{found}`; {file.name} was trained with `{kind}`"
            )
        self.tensors = _Prefixed(TensorFiles(parts.llm))

    def config(self, tokenizer_folder: Path) -> dict[str, Any]:
        tokenizer = processor.read_tokenizer(tokenizer_folder)
        text = dict(self.said)
        if self.kind == "opt":
            # Captions were trained to end with a line feed, not with OPT's own end token.
            text["eos_token_id"] = tokenizer.encode("\n", add_special_tokens=False).ids[0]
        else:
            # T5's own configuration may say another form; the language model behind these files ran with the exact one.
            text["dense_act_fn"] = "gelu"
            text["bos_token_id"] = text.get("eos_token_id", 1)
        image = tokenizer.token_to_id("<image>")
        return {
            "architectures": ["Blip2ForConditionalGeneration"],
            "text_config": text,
            "image_token_index": tokenizer.get_vocab_size() if image is None else image,
        }


class _Prefixed:
    """Names of a language model inside BLIP-2, read from a folder that has them without prefix. OPT has two such forms."""

    _STEMS = (("language_model.", ""), ("language_model.model.", ""))

    def __init__(self, source: _Source) -> None:
        self.source = source

    @property
    def n_bytes(self) -> int:
        return self.source.n_bytes

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str) -> np.ndarray:
        found = self._find(name)
        assert found is not None, "has() knew the name"
        return self.source.read(found)

    def _find(self, name: str) -> str | None:
        candidates = [new + name.removeprefix(old) for old, new in self._STEMS if name.startswith(old)]
        return next((c for c in candidates if self.source.has(c)), None)


# Reading


class _Reader:
    """Named PyTorch tensors; remembers which were asked for."""

    def __init__(self, where: Path, state: State) -> None:
        self.where, self.state = where, state
        self.taken: set[str] = set()

    @property
    def n_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.state.values())

    def has(self, name: str) -> bool:
        return name in self.state

    def take(self, name: str) -> Tensor:
        if name not in self.state:
            raise CheckpointError(
                f"{self.where}: tensor `{name}` is missing; the file is incomplete or of another kind"
            )
        self.taken.add(name)
        return self.state[name]

    def read(self, name: str) -> np.ndarray:
        return _checked(self.where, name, self.take(name))

    def pair(self, old: str, new: str) -> State:
        return {f"{new}.{kind}": self.take(f"{old}.{kind}") for kind in ("weight", "bias")}

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        found = tuple(self.take(name).shape)
        if len(found) != rank:
            raise CheckpointError(f"{self.where}: tensor `{name}` is {list(found)}, expected {rank} dimensions")
        return found

    def count(self, prefix: str) -> int:
        """How many numbered members stand behind `prefix`."""
        numbers = {name.removeprefix(prefix).split(".")[0] for name in self.state if name.startswith(prefix)}
        return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)

    def untouched(self) -> list[str]:
        return [name for name in self.state if name not in self.taken]


def _read_state(file: Path) -> State:
    """The tensors of a `.pth` file, under `model` where training state lies beside them."""
    if not file.is_file():
        raise CheckpointError(f"{file}: not a file")
    content = _load(file)
    state = content.get("model", content)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{file}: no named tensors are in it")
    import torch

    other = next((name for name, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise CheckpointError(f"{file}: `{other}` is not a tensor")
    return dict(state)


def _load(file: Path) -> dict[str, Any]:
    try:
        content = pickled.load(file, mmap=True)
    except pickled.PickledError as error:
        raise CheckpointError(f"{file}: not a readable PyTorch file ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: no named tensors are in it")
    return content


def _checked(where: Path, name: str, value: Tensor) -> np.ndarray:
    import torch

    convert: dict[torch.dtype, Callable[[Tensor], np.ndarray]] = {
        torch.float32: lambda t: t.numpy(),
        torch.float16: lambda t: t.numpy(),
        torch.bfloat16: lambda t: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16),
    }
    if value.dtype not in convert:
        raise CheckpointError(
            f"{where}: tensor `{name}` has dtype {value.dtype}; float32, float16, bfloat16 are supported"
        )
    return convert[value.dtype](value.detach().contiguous())
