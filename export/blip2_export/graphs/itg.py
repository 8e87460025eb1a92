"""The Q-Former as a writer: text embeddings and the cache, which begins with the queries' keys and values → logits.

Text positions see all queries and the text up to themselves; with the queries in front of the cache this is plain causal attention.
"""

from __future__ import annotations

from pathlib import Path

from transformers import Blip2QFormerConfig

from blip2_export.graphs.bert import TEXT, Layers
from blip2_export.graphs.builder import Data, Graph, UnsupportedError
from blip2_export.graphs.decoding import Decoder, attend, declare_inputs, finish, own_head, select, store_embedding
from blip2_export.read.checkpoint import Checkpoint

_HEAD = "cls.predictions."
WORDS, HEAD = "embeddings.word_embeddings.weight", _HEAD + "decoder.weight"
BIAS = _HEAD + "bias"  # there only with the head of image-grounded text generation
HEAD_BIAS = _HEAD + "decoder.bias"


def build(folder: Path, checkpoint: Checkpoint, cfg: Blip2QFormerConfig, data: Data) -> Decoder:
    """Inputs and outputs as those of the language models' decoders. `inputs_embeds` are plain word embeddings."""
    g = Graph(folder, "decoder", data)
    layers = Layers(g, checkpoint, cfg)
    width, vocab = cfg.hidden_size, cfg.vocab_size
    inputs = declare_inputs(g, width)
    words = layers.read(WORDS, vocab, width)
    embedding = store_embedding(g, words)
    learned = layers.read("embeddings.position_embeddings.weight", cfg.max_position_embeddings, width)
    x = g.op("Add", [inputs.embeds, g.op("Gather", [g.weight(learned), inputs.positions], axis=0)])
    x = layers.embedding_norm(x)
    for i in range(cfg.num_hidden_layers):
        x = layers.feed_forward(i, _attention(layers, i, x), TEXT)
    x = select(g, x, inputs.logits_at)
    x = g.activation(layers.linear(_HEAD + "transform.dense", x, width, width), cfg.hidden_act)
    x = layers.norm(_HEAD + "transform.LayerNorm", x)
    bias = layers.read(BIAS, vocab)
    if HEAD_BIAS not in checkpoint.tied(BIAS):
        raise UnsupportedError(f"`{HEAD_BIAS}` is not equal to `{BIAS}`; which of them holds cannot be told")
    head = own_head(checkpoint, WORDS, HEAD, words.shape)
    return finish(g, x, head, words, embedding, layers.heads, cfg.num_hidden_layers, bias)


def _attention(layers: Layers, i: int, x: str) -> str:
    g, heads, width = layers.g, layers.heads, layers.width
    name = f"qformer.encoder.layer.{i}.attention."
    qkv = [
        g.linear(
            x,
            heads.rows(layers.read(f"{name}attention.{part}.weight", width, width), heads.n),
            heads.rows(layers.read(f"{name}attention.{part}.bias", width), heads.n),
        )
        for part in ("query", "key", "value")
    ]
    y = attend(g, i, heads, qkv, heads.width**-0.5)
    weight = heads.columns(layers.read(name + "output.dense.weight", width, width))
    y = g.linear(y, weight, layers.read(name + "output.dense.bias", width))
    return layers.norm(name + "output.LayerNorm", g.op("Add", [y, x]))
