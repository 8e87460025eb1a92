"""What all decoder graphs share: their inputs, attention over the cache in place, the embedding table and the head.

Rows are computed, slots hold keys and values. Every layer works on the rows alone; only attention sees all slots of the
cache, where one without a row costs a position. So texts come and go without moving a slot, and only live ones are computed.
"""

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

    def packed_qkv(self, parts: list[np.ndarray]) -> np.ndarray:
        """The projections to queries, keys and values (or their biases) as one."""
        return np.concatenate(
            [self.rows(part, n) for part, n in zip(parts, (self.n, self.n_kv, self.n_kv), strict=True)]
        )

    def columns(self, weight: np.ndarray) -> np.ndarray:
        """The projection of all query heads' outputs, with zero columns where the padding is."""
        return pad_groups(weight.T, self.n, self.padded).T


@dataclass(frozen=True)
class Inputs:
    """What every decoder starts from; the inputs of attention are known by name."""

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


def declare_inputs(g: Graph, table: np.ndarray, reads_queries: bool) -> Inputs:
    """`reads_queries`: query tokens, none in a step, stand in front of the embedded tokens."""
    embeds = embed(g, table, "rows", reads_queries)
    positions = g.input("position_ids", "int64", ["rows", "sequence"])
    g.input("seqlens_k", "int32", ["slots"])
    g.input("total_sequence_length", "int32", [])
    g.input("slot_rows", "int64", ["slots"])
    g.input("row_slots", "int64", ["rows"])
    return Inputs(embeds, positions, g.input("logits_at", "int64", ["rows", "n_logits"]))


def embed(g: Graph, table: np.ndarray, batch: str, reads_queries: bool) -> str:
    """The embeddings of `input_ids`, behind `queries` where there are any."""
    x = g.rows(table, g.input("input_ids", "int64", [batch, "n_tokens"]))
    if not reads_queries:
        return x
    queries = g.input("queries", "float32", [batch, "n_queries", table.shape[1]])
    return str(g.op("Concat", [queries, x], axis=1))


def to_slots(g: Graph, x: str) -> str:
    """Of every slot what belongs to its row; slots without a row get any."""
    return str(g.op("Gather", [x, "slot_rows"], axis=0))


def to_rows(g: Graph, x: str) -> str:
    """Of every row what its slot holds."""
    return str(g.op("Gather", [x, "row_slots"], axis=0))


def attend(
    g: Graph, layer: int, heads: Heads, qkv: str, scale: float, more: tuple[str, ...] = (), **attributes: Any
) -> str:
    """Causal attention of rows over cache and new positions, which it writes to the cache.

    `qkv`: the packed projections; `more`: inputs behind the lengths, for slots."""
    shape = ["slots", heads.n_kv, "capacity", heads.padded]
    past = [g.input(f"past_key_values.{layer}.{p}", "float32", shape) for p in _PARTS]
    present = [f"present.{layer}.{p}" for p in _PARTS]
    y, *_ = g.op(
        "GroupQueryAttention",
        [to_slots(g, qkv), "", "", *past, "seqlens_k", "total_sequence_length", *more],
        [g.fresh("attention"), *present],
        domain=MICROSOFT,
        num_heads=heads.n,
        kv_num_heads=heads.n_kv,
        scale=float(scale),
        **attributes,
    )
    for value in present:
        g.output(value, value, "float32", shape)
    return to_rows(g, y)


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
    heads: Heads,
    n_layers: int,
    bias: np.ndarray | None = None,
) -> Decoder:
    """The head behind the last states, tied to the embedding table where it has no weights of its own."""
    weight = g.stored(table) if head is None else g.weight(head)
    logits = g.op("FusedMatMul", [x, weight], domain=MICROSOFT, transB=1)
    g.outputs.insert(0, {"name": "logits", "dtype": "float32", "shape": ["rows", "n_logits", len(table)]})
    g.op("Identity", [logits if bias is None else g.op("Add", [logits, g.weight(bias)])], ["logits"])
    g.save()
    return Decoder(g, _cache_facts(heads, n_layers))


def _cache_facts(heads: Heads, n_layers: int) -> dict[str, Any]:
    names = {
        f"{side}_{p}": f"{stem}.{{}}.{p}"
        for side, stem in (("past", "past_key_values"), ("present", "present"))
        for p in _PARTS
    }
    return {"n_layers": n_layers, "n_heads": heads.n_kv, "head_dim": heads.padded, "dtype": "float32", **names}
