"""BLIP-2's first stage written from its formulas (Li et al. 2023, section 3), in plain PyTorch, for files of either naming.

Shares nothing with the exporter: weights come from the files under their own names, attention is a softmax over masked scores,
and writing computes the whole sequence anew at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
HUGGING_FACE = {
    "layer": "qformer.encoder.layer.{}.",
    "projection": "{}.attention.{}",
    "norm": "qformer.layernorm",
    "embeddings": "embeddings.",
    "head": "cls.predictions.",
    "image": "vision_projection",
    "text": "text_projection",
}
LAVIS = {
    "layer": "Qformer.bert.encoder.layer.{}.",
    "projection": "{}.self.{}",
    "norm": "Qformer.bert.embeddings.LayerNorm",
    "embeddings": "Qformer.bert.embeddings.",
    "head": "Qformer.cls.predictions.",
    "image": "vision_proj",
    "text": "text_proj",
}


def lift(weights: Weights) -> Weights:
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """[batch, positions, width] each; `mask` [batch or 1, queries, keys] is true where a key may be seen."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])


def norm(w: Weights, name: str, x: Tensor, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], epsilon)


def eva(w: Weights, pixels: Tensor, n_blocks: int) -> Tensor:
    """EVA's ViT without a norm at its end; keys have no bias."""
    heads = w["cls_token"].shape[-1] // 88
    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(n_blocks):
        name = f"blocks.{i}."
        q, k, v = F.linear(norm(w, name + "norm1", x, 1e-6), w[name + "attn.qkv.weight"]).chunk(3, -1)
        y = attend(q + w[name + "attn.q_bias"], k, v + w[name + "attn.v_bias"], heads)
        x = x + linear(w, name + "attn.proj", y)
        x = x + linear(w, name + "mlp.fc2", F.gelu(linear(w, name + "mlp.fc1", norm(w, name + "norm2", x, 1e-6))))
    return x


def clip(w: Weights, pixels: Tensor, n_blocks: int) -> Tensor:
    """CLIP's ViT up to its last block but one: norm in front, sigmoid-approximated GELU."""
    width = w["class_embedding"].shape[0]
    x = F.conv2d(pixels, w["conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, width), x], 1) + w["positional_embedding"]
    x = norm(w, "ln_pre", x, 1e-5)
    for i in range(n_blocks):
        name = f"transformer.resblocks.{i}."
        y = norm(w, name + "ln_1", x, 1e-5)
        qkv = F.linear(y, w[name + "attn.in_proj_weight"], w[name + "attn.in_proj_bias"]).chunk(3, -1)
        x = x + linear(w, name + "attn.out_proj", attend(*qkv, width // 64))
        y = linear(w, name + "mlp.c_fc", norm(w, name + "ln_2", x, 1e-5))
        x = x + linear(w, name + "mlp.c_proj", y * torch.sigmoid(1.702 * y))
    return x


@dataclass
class Stage1:
    """The Q-Former with its three masks. `features`: [batch, positions, width of the image encoder]."""

    weights: Weights
    names: dict[str, str]
    heads: int
    frequency: int = 2
    epsilon: float = 1e-12

    @property
    def n_queries(self) -> int:
        return self.weights["query_tokens"].shape[1]

    def queries(self, features: Tensor) -> Tensor:
        """States of the queries alone."""
        x = self._start(self.weights["query_tokens"].expand(len(features), -1, -1))
        return self._layers(x, self.n_queries, None, features)

    def image(self, features: Tensor) -> Tensor:
        return F.normalize(linear(self.weights, self.names["image"], self.queries(features)), dim=-1)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States of the text alone."""
        return self._layers(self._start(self._words(ids)), 0, mask.bool()[:, None], None)

    def text_embeds(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(linear(self.weights, self.names["text"], self.text(ids, mask)), dim=-1)

    def match(self, features: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of no and yes, and the query states: everything sees everything but padding."""
        seen = torch.cat([torch.ones(len(ids), self.n_queries, dtype=torch.bool), mask.bool()], 1)[:, None]
        states = self._both(features, ids, seen)[:, : self.n_queries]
        return linear(self.weights, "itm_head", states).mean(1), states

    def writing_logits(self, features: Tensor, ids: Tensor) -> Tensor:
        """[batch, length, vocab]: queries see queries, text sees the queries and what was written up to itself."""
        n, total = self.n_queries, self.n_queries + ids.shape[1]
        place = torch.arange(total)
        seen = (place[None, :] < n) | ((place[:, None] >= n) & (place[None, :] <= place[:, None]))
        x = self._both(features, ids, seen[None])[:, n:]
        head = self.names["head"]
        x = norm(
            self.weights,
            head + "transform.LayerNorm",
            F.gelu(linear(self.weights, head + "transform.dense", x)),
            self.epsilon,
        )
        return F.linear(
            x, self.weights[self.names["embeddings"] + "word_embeddings.weight"], self.weights[head + "bias"]
        )

    def write(self, features: Tensor, start: int, end: int, n_new: int) -> tuple[list[list[int]], list[Tensor]]:
        """Greedy ids of every picture up to its end, and the logits [vocab] of each step."""
        rows, steps = [], []
        for one in features:
            ids, logits = [start], []
            while len(ids) <= n_new and ids[-1] != end:
                logits.append(self.writing_logits(one[None], torch.tensor([ids]))[0, -1])
                ids.append(int(logits[-1].argmax()))
            rows.append(ids[1:])
            steps.append(torch.stack(logits))
        return rows, steps

    def _both(self, features: Tensor, ids: Tensor, seen: Tensor) -> Tensor:
        tokens = self.weights["query_tokens"].expand(len(ids), -1, -1)
        return self._layers(self._start(torch.cat([tokens, self._words(ids)], 1)), self.n_queries, seen, features)

    def _words(self, ids: Tensor) -> Tensor:
        name = self.names["embeddings"]
        positions = self.weights[name + "position_embeddings.weight"][: ids.shape[1]]
        return self.weights[name + "word_embeddings.weight"][ids] + positions

    def _start(self, x: Tensor) -> Tensor:
        return norm(self.weights, self.names["norm"], x, self.epsilon)

    def _layers(self, x: Tensor, n_queries: int, seen: Tensor | None, features: Tensor | None) -> Tensor:
        i = 0
        while f"{self.names['layer'].format(i)}attention.output.dense.weight" in self.weights:
            name = self.names["layer"].format(i)
            x = self._attention(name, "attention", x, x, seen)
            queries, text = x[:, :n_queries], x[:, n_queries:]
            if n_queries and i % self.frequency == 0:
                assert features is not None
                queries = self._attention(name, "crossattention", queries, features, None)
            parts = [
                self._feed(name, part, suffix) for part, suffix in ((queries, "_query"), (text, "")) if part.shape[1]
            ]
            x = torch.cat(parts, 1)
            i += 1
        return x

    def _attention(self, name: str, kind: str, x: Tensor, source: Tensor, seen: Tensor | None) -> Tensor:
        q, k, v = (
            linear(self.weights, name + self.names["projection"].format(kind, part), x if part == "query" else source)
            for part in ("query", "key", "value")
        )
        y = linear(self.weights, f"{name}{kind}.output.dense", attend(q, k, v, self.heads, seen))
        return norm(self.weights, f"{name}{kind}.output.LayerNorm", x + y, self.epsilon)

    def _feed(self, name: str, x: Tensor, suffix: str) -> Tensor:
        y = F.gelu(linear(self.weights, f"{name}intermediate{suffix}.dense", x))
        y = linear(self.weights, f"{name}output{suffix}.dense", y)
        return norm(self.weights, f"{name}output{suffix}.LayerNorm", x + y, self.epsilon)
