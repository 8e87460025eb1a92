"""The Q-Former with everything stage 1 trains: query tokens, text branch, and the heads of ITC, ITM and ITG."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings


def config(vocab_size: int, encoder_hidden_size: int) -> Blip2QFormerConfig:
    """The demo's Q-Former: 5 layers of width 128, cross-attention in layers 0, 2 and 4."""
    return Blip2QFormerConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        cross_attention_frequency=2,
        encoder_hidden_size=encoder_hidden_size,
        use_qformer_text_input=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class QFormer(nn.Module):
    """The three attention masks of BLIP-2 over one set of weights (Li et al. 2023, section 3.1)."""

    def __init__(self, cfg: Blip2QFormerConfig, n_queries: int = 32, joint_width: int = 64) -> None:
        super().__init__()
        width = cfg.hidden_size
        self.cfg, self.n_queries = cfg, n_queries
        self.qformer = Blip2QFormerModel(cfg)
        self.embeddings = Blip2TextEmbeddings(cfg)
        self.query_tokens = nn.Parameter(torch.empty(1, n_queries, width).normal_(0, 0.02))
        self.vision_projection = nn.Linear(width, joint_width)
        self.text_projection = nn.Linear(width, joint_width)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=cfg.layer_norm_eps))
        self.head_bias = nn.Parameter(torch.zeros(cfg.vocab_size))
        nn.init.normal_(self.embeddings.word_embeddings.weight, 0, 0.02)
        nn.init.normal_(self.embeddings.position_embeddings.weight, 0, 0.02)

    def queries(self, features: Tensor) -> Tensor:
        """Queries alone: [batch, n_queries, width]."""
        tokens = self.query_tokens.expand(len(features), -1, -1)
        return self.qformer(query_embeds=tokens, encoder_hidden_states=features).last_hidden_state

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text alone (uni-modal mask): [batch, length, width]."""
        return self.qformer(query_embeds=self.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state

    def matching_logits(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """ITM logits [batch, 2] of the bi-directional mask, averaged over the queries."""
        both = torch.cat([mask.new_ones(len(ids), self.n_queries), mask], 1)
        hidden = self._joint(features, ids, both)
        return self.itm_head(hidden[:, : self.n_queries]).mean(1)

    def captioning(self, features: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [batch, n_queries, width] and ITG logits [batch, length, vocab] of the multimodal causal mask.

        Queries see queries only, so they are those of `queries`; a text position sees all queries and the text up to itself.
        """
        queries, logits = self.captionings(features, ids[:, None], mask[:, None])
        return queries, logits[:, 0]

    def captionings(self, features: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As `captioning`, for several texts of each picture that do not see one another.

        `ids` and `mask` [batch, texts, length]; logits [batch, texts, length, vocab]. The queries are computed once a picture.
        """
        n, (rows, texts, length) = self.n_queries, ids.shape
        seen = torch.zeros(n + texts * length, n + texts * length, dtype=torch.bool, device=ids.device)
        seen[:, :n] = True
        seen[n:, n:] = torch.block_diag(*[torch.ones(length, length, device=ids.device).tril()] * texts).bool()
        alive = torch.cat([mask.new_ones(rows, n).bool(), mask.flatten(1).bool()], 1)
        # A mask of another type than the features' gives wrong scores without an error.
        additive = torch.where(seen[None] & alive[:, None, :], 0.0, -1e4)[:, None].to(features.dtype)
        places = torch.arange(length, device=ids.device).repeat(texts)[None]
        hidden = self._joint(features, ids.flatten(1), additive, places)
        logits = F.linear(self.transform(hidden[:, n:]), self.embeddings.word_embeddings.weight, self.head_bias)
        return hidden[:, :n], logits.unflatten(1, (texts, length))

    def _joint(self, features: Tensor, ids: Tensor, mask: Tensor, places: Tensor | None = None) -> Tensor:
        tokens = self.query_tokens.expand(len(ids), -1, -1)
        return self.qformer(
            query_embeds=self.embeddings(ids, position_ids=places, query_embeds=tokens),
            query_length=self.n_queries,
            attention_mask=mask,
            encoder_hidden_states=features,
        ).last_hidden_state
