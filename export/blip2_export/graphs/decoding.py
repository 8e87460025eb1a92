"""What all decoder graphs share: their inputs, attention over the cache in place, the embedding table and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from blip2_export.graphs.builder import MICROSOFT, Graph
from blip2_export.read.checkpoint import Checkpoint, CheckpointError

_PARTS = ("key", "value")


@dataclass(frozen=True)
class Decoder:
    """The built graph with what `bundle.json` says of it."""

    graph: Graph
    embedding: dict[str, Any]
    kv_cache: dict[str, Any]


@dataclass(frozen=True)
class Heads:
    """Attention heads, padded with zeros to a width that GroupQueryAttention takes: a multiple of 8, with rotary of 16."""

    n: int
    n_kv: int
    width: int
    multiple: int = 8

    @property
    def padded(self) -> int:
        return padded(self.width, self.multiple)

    def rows(self, weight: np.ndarray, n: int) -> np.ndarray:
        """A projection to `n` heads (or its bias) with zero rows behind each head."""
        return pad_groups(weight, n, self.padded)

    def columns(self, weight: np.ndarray) -> np.ndarray:
        """The projection of all query heads' outputs, with zero columns where the padding is."""
        return pad_groups(weight.T, self.n, self.padded).T


@dataclass(frozen=True)
class Inputs:
    """Names of the inputs that every decoder has; those of attention are known by name."""

    embeds: str
    positions: str
    logits_at: str


def padded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def pad_groups(weight: np.ndarray, n_groups: int, width: int) -> np.ndarray:
    """Zeros behind every one of `n_groups` equal groups of rows, so that each has `width` rows."""
    groups = weight.reshape(n_groups, -1, *weight.shape[1:])
    if groups.shape[1] == width:
        return weight
    more = [(0, 0), (0, width - groups.shape[1])] + [(0, 0)] * (weight.ndim - 1)
    return np.pad(groups, more).reshape(n_groups * width, *weight.shape[1:])


def declare_inputs(g: Graph, width: int) -> Inputs:
    embeds = g.input("inputs_embeds", "float32", ["batch", "sequence", width])
    positions = g.input("position_ids", "int64", ["batch", "sequence"])
    g.input("seqlens_k", "int32", ["batch"])
    g.input("total_sequence_length", "int32", [])
    return Inputs(embeds, positions, g.input("logits_at", "int64", ["batch", "n_logits"]))


def attend(
    g: Graph, layer: int, heads: Heads, qkv: list[str], scale: float, more: tuple[str, ...] = (), **attributes: Any
) -> str:
    """Causal attention over cache and new positions, which it writes to the cache. `more`: inputs behind the lengths."""
    shape = ["batch", heads.n_kv, "capacity", heads.padded]
    past = [g.input(f"past_key_values.{layer}.{p}", "float32", shape) for p in _PARTS]
    present = [f"present.{layer}.{p}" for p in _PARTS]
    y, *_ = g.op(
        "GroupQueryAttention",
        [*qkv, *past, "seqlens_k", "total_sequence_length", *more],
        [g.fresh("attention"), *present],
        domain=MICROSOFT,
        num_heads=heads.n,
        kv_num_heads=heads.n_kv,
        scale=float(scale),
        **attributes,
    )
    for value in present:
        g.output(value, value, "float32", shape)
    return str(y)


def store_embedding(g: Graph, table: np.ndarray) -> dict[str, Any]:
    """Where the data file holds the token embeddings; the engine reads their rows straight from it."""
    dtype = str(table.dtype)
    return {"file": g.data.name, "offset": g.data.append(table), "dtype": dtype, "shape": list(table.shape)}


def select(g: Graph, x: str, logits_at: str) -> str:
    """The positions of each row that logits are wanted for."""
    return str(g.op("GatherND", [x, g.op("Unsqueeze", [logits_at, g.constant([-1])])], batch_dims=1))


def own_head(checkpoint: Checkpoint, table: str, head: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The tensor `head`, where it is not tied to the embeddings `table`."""
    if head in checkpoint.tied(table):
        return None
    if not checkpoint.has(head):
        raise CheckpointError(
            f"{checkpoint.folder}: tensor `{head}` is missing, and config.json does not tie it to `{table}` "
            "(tie_word_embeddings); the checkpoint is incomplete"
        )
    return checkpoint.tensor(head, shape)


def finish(
    g: Graph,
    x: str,
    head: np.ndarray | None,
    table: np.ndarray,
    embedding: dict[str, Any],
    heads: Heads,
    n_layers: int,
    bias: np.ndarray | None = None,
) -> Decoder:
    """The head behind the last states, tied to the embedding table where it has no weights of its own."""
    weight = g.stored(table, embedding["offset"]) if head is None else g.weight(head)
    logits = g.op("FusedMatMul", [x, weight], domain=MICROSOFT, transB=1)
    g.outputs.insert(0, {"name": "logits", "dtype": "float32", "shape": ["batch", "n_logits", len(table)]})
    g.op("Identity", [logits if bias is None else g.op("Add", [logits, g.weight(bias)])], ["logits"])
    g.save()
    return Decoder(g, embedding, _cache_facts(heads, n_layers))


def _cache_facts(heads: Heads, n_layers: int) -> dict[str, Any]:
    names = {
        f"{side}_{p}": f"{stem}.{{}}.{p}"
        for side, stem in (("past", "past_key_values"), ("present", "present"))
        for p in _PARTS
    }
    return {"n_layers": n_layers, "n_heads": heads.n_kv, "head_dim": heads.padded, "dtype": "float32", **names}
