"""What all decoder graphs share: their inputs, attention over the cache in place, the embedding table and the head.

Rows are computed, slots hold keys and values. Every layer works on the rows alone; only attention sees all slots of the
cache, where one without a row costs a position. So texts come and go without moving a slot, and only live ones are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from blip2_export.graphs.builder import Attend, Graph, New
from blip2_export.graphs.heads import Heads
from blip2_export.read.checkpoint import Checkpoint, CheckpointError

_PARTS = ("key", "value")


@dataclass(frozen=True)
class Decoder:
    """The built graph with what `bundle.json` says of it."""

    graph: Graph
    kv_cache: dict[str, Any]


class Cached:
    """Attention of every layer over the cache."""

    def __init__(self, g: Graph, heads: Heads, attend: Attend) -> None:
        """`attend`: the graph's `over_cache`."""
        self._g, self._heads, self._attend = g, heads, attend

    def attend(self, layer: int, qkv: str) -> str:
        """Of rows, whose packed projections are given."""
        g = self._g
        shape = ["slots", self._heads.n_kv, "capacity", self._heads.padded]
        past = [g.input(f"past_key_values.{layer}.{p}", g.dtype.name, shape) for p in _PARTS]
        present = [f"present.{layer}.{p}" for p in _PARTS]
        y = self._attend(qkv, past, present)
        for value in present:
            g.output(value, value, g.dtype.name, shape)
        return y


def declare_inputs(g: Graph, table: np.ndarray, reads_queries: bool, offset: int = 0) -> New:
    """`reads_queries`: query tokens, none in a step, stand in front of the tokens. `offset`: as many stand in the cache."""
    embeds = embed(g, table, "rows", reads_queries)
    positions = g.input("position_ids", "int64", ["rows", "sequence"])
    g.input("seqlens_k", "int32", ["slots"])
    g.input("total_sequence_length", "int32", [])
    g.input("slot_rows", "int64", ["slots"])
    g.input("row_slots", "int64", ["rows"])
    g.input("logits_at", "int64", ["rows", "n_logits"])
    return New(embeds, positions, offset)


def embed(g: Graph, table: np.ndarray, batch: str, reads_queries: bool) -> str:
    """The embeddings of `input_ids`, behind `queries` where there are any."""
    x = g.rows(table, g.input("input_ids", "int64", [batch, "n_tokens"]))
    if not reads_queries:
        return x
    queries = g.take("queries", [batch, "n_queries", table.shape[1]])
    return g.shaped(g.op("Concat", [queries, x], axis=1), [batch, "sequence", table.shape[1]])


def select(g: Graph, x: str, width: int) -> str:
    """The positions of each row that logits are wanted for."""
    at = g.op("Unsqueeze", [g.int32("logits_at"), g.constant([2])])
    return str(g.op("GatherElements", [x, g.op("Add", [at, g.constant(np.zeros(width), np.int32)])], axis=1))


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


@dataclass(frozen=True)
class Head:
    """What makes logits of states: `own` weights, or those of the embedding table; `bias` behind them."""

    table: np.ndarray
    own: np.ndarray | None
    bias: np.ndarray | None = None


def finish(g: Graph, x: str, head: Head, heads: Heads, n_layers: int) -> Decoder:
    """The head behind the last states."""
    logits = g.times(x, head.table if head.own is None else head.own, shared=head.own is None)
    logits = logits if head.bias is None else g.op("Add", [logits, g.weight(head.bias)])
    g.give(logits, "logits", ["rows", "n_logits", len(head.table)], first=True)
    g.save()
    return Decoder(g, _cache_facts(g, heads, n_layers))


def _cache_facts(g: Graph, heads: Heads, n_layers: int) -> dict[str, Any]:
    names = {
        f"{side}_{p}": f"{stem}.{{}}.{p}"
        for side, stem in (("past", "past_key_values"), ("present", "present"))
        for p in _PARTS
    }
    return {"n_layers": n_layers, "n_heads": heads.n_kv, "head_dim": heads.padded, "dtype": g.dtype.name, **names}
