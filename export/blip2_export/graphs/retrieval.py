"""The Q-Former of stage 1 under its masks (Li et al. 2023, section 3.1): queries alone, text alone, both together; as a writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from blip2_export.graphs import itg
from blip2_export.graphs.bert import QUERY, TEXT, Layers
from blip2_export.graphs.builder import Data, Graph, Output
from blip2_export.read import tokenizers
from blip2_export.read.checkpoint import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from transformers import Blip2Config

TOKENIZER = "qformer_tokenizer.json"
MAX_TOKENS = 32  # what ITC and ITM of the reference cut text to, special tokens included
_START, _END, _PAD, _CLASS = "[DEC]", "[SEP]", "[PAD]", "[CLS]"


@dataclass(frozen=True)
class Stage1:
    """What a stage-1 checkpoint is, beside its image encoder."""

    checkpoint: Checkpoint
    cfg: Blip2Config
    tokenizer: Tokenizer
    n_positions: int

    @property
    def writes(self) -> bool:
        """Whether it has the head of image-grounded text generation."""
        return self.checkpoint.has(itg.BIAS)


def build(out: Output, stage: Stage1) -> tuple[list[Graph], dict[str, Any]]:
    """The graphs behind the image encoder, and what `bundle.json` says of them."""
    cfg, tokenizer = stage.cfg.qformer_config, stage.tokenizer
    data = out.data("qformer")  # all of them run the same layers
    graphs = [part(out, stage, data) for part in (_queries, _text, _matching)]
    facts: dict[str, Any] = {
        "family": "qformer",
        "tasks": ["match", "embed"],
        "qformer": _facts(stage),
        "prompts": {},
        "generation": {},
    }
    if stage.writes:
        writer = itg.build(out, stage.checkpoint, cfg, data, stage.cfg.num_query_tokens)
        graphs.append(writer.graph)
        facts["tasks"].append("caption")
        facts["language"] = {
            "hidden": cfg.hidden_size,
            "vocab_size": cfg.vocab_size,
            "max_positions": stage.cfg.num_query_tokens + cfg.max_position_embeddings,
            "token_ids": {"bos": _id(tokenizer, _START), "eos": [_id(tokenizer, _END)], "pad": _id(tokenizer, _PAD)},
            "kv_cache": writer.kv_cache,
        }
    return graphs, facts


def _facts(stage: Stage1) -> dict[str, Any]:
    cfg = stage.cfg.qformer_config
    facts = {
        "n_queries": stage.cfg.num_query_tokens,
        "hidden": cfg.hidden_size,
        "joint": stage.cfg.image_text_hidden_size,
        "text": {
            "tokenizer": TOKENIZER,
            "max_tokens": min(MAX_TOKENS, cfg.max_position_embeddings),
            "max_positions": cfg.max_position_embeddings,
            "pad": _id(stage.tokenizer, _PAD),
            "truncation_side": "right",
        },
    }
    if stage.checkpoint.has("temp"):
        temperature = stage.checkpoint.tensor("temp")
        if temperature.size != 1:
            raise CheckpointError(f"{stage.checkpoint.folder}: tensor `temp` is no single number")
        facts["temperature"] = float(temperature.reshape(-1)[0])
    return facts


def write_tokenizer(checkpoint: Checkpoint, out: Path, vocab_size: int) -> Tokenizer:
    """`qformer_tokenizer.json`. A `[DEC]` that is one token short of the embedding table is added as the last id, as LAVIS does."""
    folder = checkpoint.tokenizer_folder
    tokenizer = tokenizers.read(folder)
    if tokenizer.token_to_id(_START) is None and tokenizer.get_vocab_size() == vocab_size - 1:
        tokenizer.add_special_tokens([_START])
    tokenizer = tokenizers.embedded(tokenizer, vocab_size)
    for token in (_CLASS, _END, _PAD, *([_START] if checkpoint.has(itg.BIAS) else [])):
        number = tokenizer.token_to_id(token)
        if number is None or number >= vocab_size:
            raise CheckpointError(f"{folder}: the tokenizer has no {token} among the {vocab_size} embedded tokens")
    if tokenizer.encode("a").ids[0] != tokenizer.token_to_id(_CLASS):
        raise CheckpointError(f"{folder}: the tokenizer does not begin texts with {_CLASS}")
    tokenizer.save(str(out / TOKENIZER), pretty=False)
    return tokenizer


def _id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    assert number is not None, "write_tokenizer looked"
    return number


def _queries(out: Output, stage: Stage1, data: Data) -> Graph:
    """`qformer`: queries alone. They begin alike for every image, so the first self-attention sees a batch of one."""
    g = out.graph("qformer", data)
    cfg, n_queries = stage.cfg.qformer_config, stage.cfg.num_query_tokens
    layers = Layers(g, stage.checkpoint, cfg)
    features = g.take("image_features", ["batch", stage.n_positions, cfg.encoder_hidden_size])
    x = layers.embedding_norm(g.weight(layers.query_tokens(n_queries)))
    keys_and_values: list[tuple[str, str]] = []
    for i in range(cfg.num_hidden_layers):
        for part in ("key", "value") if stage.writes else ():
            seen = layers.cached(i, part, x)
            keys_and_values.append((f"query.{i}.{part}", seen if i else g.repeat(seen, features)))
        x = layers.self_attention(i, x)
        x = x if i else g.repeat(x, features)
        x = layers.feed_forward(i, layers.cross_attention(i, x, features), QUERY)
    g.give(x, "query_states", ["batch", n_queries, cfg.hidden_size])
    joint = stage.cfg.image_text_hidden_size
    projected = layers.normalise(layers.linear("vision_projection", x, cfg.hidden_size, joint))
    g.output(projected, "image_embeds", "float32", ["batch", n_queries, joint])
    for name, value in keys_and_values:
        g.output(value, name, g.dtype.name, ["batch", layers.heads.n, n_queries, layers.cached_heads.padded])
    g.save()
    return g


def _text(out: Output, stage: Stage1, data: Data) -> Graph:
    """`qformer_text`: text alone, projected to the joint space at every position."""
    g = out.graph("qformer_text", data)
    cfg, joint = stage.cfg.qformer_config, stage.cfg.image_text_hidden_size
    layers = Layers(g, stage.checkpoint, cfg)
    ids, mask = _text_inputs(g)
    x, seen = layers.embedding_norm(layers.embed_text(ids)), layers.real(mask)
    for i in range(cfg.num_hidden_layers):
        x = layers.feed_forward(i, layers.self_attention(i, x, seen), TEXT)
    projected = layers.normalise(layers.linear("text_projection", x, cfg.hidden_size, joint))
    g.output(projected, "text_embeds", "float32", ["batch", "sequence", joint])
    g.give(x, "text_states", ["batch", "sequence", cfg.hidden_size])
    g.save()
    return g


def _matching(out: Output, stage: Stage1, data: Data) -> Graph:
    """`qformer_itm`: queries and text see each other, only queries see the image. The last layer computes queries only."""
    g = out.graph("qformer_itm", data)
    cfg, n_queries = stage.cfg.qformer_config, stage.cfg.num_query_tokens
    layers = Layers(g, stage.checkpoint, cfg)
    features = g.take("image_features", ["batch", stage.n_positions, cfg.encoder_hidden_size])
    ids, mask = _text_inputs(g)
    queries = g.repeat(g.weight(layers.query_tokens(n_queries)), features)
    seen = layers.real(mask, queries, n_queries)
    x = layers.embedding_norm(layers.joined(queries, layers.embed_text(ids)))
    for i in range(cfg.num_hidden_layers):
        if i == cfg.num_hidden_layers - 1:
            queries = layers.self_attention(i, x, seen, layers.queries_of(x, n_queries))
        else:
            x = layers.self_attention(i, x, seen)
            queries = layers.queries_of(x, n_queries)
        queries = layers.feed_forward(i, layers.cross_attention(i, queries, features), QUERY)
        if i < cfg.num_hidden_layers - 1:
            text = layers.text_of(x, n_queries, ids)
            x = layers.joined(queries, layers.feed_forward(i, text, TEXT))
    logits = g.float32(layers.linear("itm_head", queries, cfg.hidden_size, 2))
    logits = g.op("ReduceMean", [logits, g.constant([1])], keepdims=0)
    g.output(logits, "itm_logits", "float32", ["batch", 2])
    g.give(queries, "multimodal_states", ["batch", n_queries, cfg.hidden_size])
    g.save()
    return g


def _text_inputs(g: Graph) -> tuple[str, str]:
    """Token ids and their mask."""
    ids, mask = (g.input(name, "int64", ["batch", "sequence"]) for name in ("input_ids", "attention_mask"))
    return ids, mask
