"""The Q-Former as a writer: text embeddings and the cache, which begins with the queries' keys and values → logits.

Text positions see all queries and the text up to themselves; with the queries in front of the cache this is plain causal attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2_export.graphs.bert import TEXT, Layers
from blip2_export.graphs.builder import Data, Output, UnsupportedError
from blip2_export.graphs.decoding import Cached, Decoder, Head, declare_inputs, finish, own_head, select
from blip2_export.read.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import Blip2QFormerConfig

_HEAD = "cls.predictions."
WORDS, HEAD = "embeddings.word_embeddings.weight", _HEAD + "decoder.weight"
BIAS = _HEAD + "bias"  # there only with the head of image-grounded text generation
HEAD_BIAS = _HEAD + "decoder.bias"


def build(out: Output, checkpoint: Checkpoint, cfg: Blip2QFormerConfig, data: Data, n_queries: int) -> Decoder:
    """Inputs and outputs as those of the language models' decoders. Its queries stand in the cache."""
    g = out.graph("decoder", data, n_queries + cfg.max_position_embeddings)
    layers = Layers(g, checkpoint, cfg)
    width, vocab = cfg.hidden_size, cfg.vocab_size
    words = layers.read(WORDS, vocab, width)
    new = declare_inputs(g, words, reads_queries=False, offset=n_queries)
    heads = layers.cached_heads
    cached = Cached(g, heads, g.over_cache(new, heads, heads.width**-0.5))
    learned = layers.read("embeddings.position_embeddings.weight", cfg.max_position_embeddings, width)
    x = g.op("Add", [new.embeds, g.op("Gather", [g.weight(learned), new.positions], axis=0)])
    x = layers.embedding_norm(g.shaped(x, ["rows", "sequence", width]))
    for i in range(cfg.num_hidden_layers):
        x = layers.feed_forward(i, _attention(layers, cached, i, x), TEXT)
    x = select(g, x, width)
    x = g.activation(layers.linear(_HEAD + "transform.dense", x, width, width), cfg.hidden_act)
    x = layers.norm(_HEAD + "transform.LayerNorm", x)
    bias = layers.read(BIAS, vocab)
    if HEAD_BIAS not in checkpoint.tied(BIAS):
        raise UnsupportedError(f"`{HEAD_BIAS}` is not equal to `{BIAS}`; which of them holds cannot be told")
    head = own_head(checkpoint, WORDS, HEAD, words.shape)
    return finish(g, x, Head(words, head, bias), heads, cfg.num_hidden_layers)


def _attention(layers: Layers, cached: Cached, i: int, x: str) -> str:
    g, heads, width = layers.g, layers.cached_heads, layers.width
    name = f"qformer.encoder.layer.{i}.attention."
    # Apart, as the graphs that read texts have them: the data file holds every weight once.
    qkv = [
        g.linear(
            x,
            heads.rows(layers.read(f"{name}attention.{part}.weight", width, width), heads.n),
            heads.rows(layers.read(f"{name}attention.{part}.bias", width), heads.n),
        )
        for part in ("query", "key", "value")
    ]
    y = cached.attend(i, g.op("Concat", qkv, axis=-1))
    weight = heads.columns(layers.read(name + "output.dense.weight", width, width))
    y = g.linear(y, weight, layers.read(name + "output.dense.bias", width))
    return layers.norm(name + "output.LayerNorm", g.op("Add", [y, x]))
