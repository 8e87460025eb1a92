"""Stage 2 and questions: a trained Q-Former in front of a frozen language model (Li et al. 2023, sections 3.3 and 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip2_export.train.own import together
from blip2_export.train.own.language import Language, Texts, loss
from blip2_export.train.own.lora import Adapter


@dataclass
class Written:
    """Pictures as features of a frozen encoder, or as pixels for one that is trained, and texts about them.

    `question_ids`, `question_mask` [rows, length]: what the Q-Former reads beside its queries, if it reads anything.
    """

    seen: Tensor
    texts: Texts
    question_ids: Tensor | None = None
    question_mask: Tensor | None = None


class Stage2(nn.Module):
    """What is trained: Q-Former, query tokens and projection.

    With `eye` the image encoder as well, with `embeddings` those of questions.
    """

    def __init__(self, qformer: nn.Module, queries: Tensor, language: Language) -> None:
        super().__init__()
        self.qformer = qformer
        self.query_tokens = nn.Parameter(queries.detach().clone())
        self.language_projection = nn.Linear(queries.shape[-1], language.projected)
        self.eye: nn.Module | None = None
        self.embeddings: nn.Module | None = None
        # Not a part: it is frozen, and goes into no checkpoint.
        self._language = (language,)

    @property
    def language(self) -> Language:
        return self._language[0]

    def adapt(self, adapter: Adapter) -> None:
        """Nothing but the adapter is trained. Its matrices in the language model are parameters of this, the model is none."""
        self.requires_grad_(False)
        for p in adapter.parameters.values():
            p.requires_grad_(True)
        own = {name: p for name, p in adapter.parameters.items() if name.startswith("language_model.")}
        if own:
            self.adapter = nn.ParameterDict({name.replace(".", "/"): p for name, p in own.items()})
        # As parts of this they are in training and in evaluation as this is; the language model is always in evaluation.
        self.random = nn.ModuleList(adapter.dropouts)

    def prefix(self, batch: Written) -> Tensor:
        """Soft prompts [rows, queries, width of the language model], a row for each text."""
        seen = self.eye(batch.seen).last_hidden_state if self.eye is not None else batch.seen
        seen = seen[batch.texts.picture]
        tokens = self.query_tokens.expand(len(seen), -1, -1)
        n = tokens.shape[1]
        more = {}
        if self.embeddings is not None and batch.question_ids is not None and batch.question_mask is not None:
            mask = torch.cat([batch.question_mask.new_ones(len(tokens), n), batch.question_mask], 1)
            tokens = self.embeddings(batch.question_ids, query_embeds=tokens)
            more = {"query_length": n, "attention_mask": mask}
        hidden = self.qformer(query_embeds=tokens, encoder_hidden_states=seen, **more).last_hidden_state
        soft, width = self.language_projection(hidden[:, :n]), self.language.width
        # `transformers` scatters features in flattened order, so of wider ones the first n × width values count.
        return soft if soft.shape[-1] == width else soft.flatten(1)[:, : n * width].unflatten(1, (n, width))

    def forward(self, batch: Written) -> dict[str, Tensor]:
        """The mean over the weighted tokens of all processes, as far as this one has them."""
        return {"lm": loss(self.language, self.prefix(batch), batch.texts) / together.mean(batch.texts.mass)}
