"""The reference of stage-1 bundles: `Blip2ForImageTextRetrieval`, and on its modules the head that writes, which it lacks."""

from __future__ import annotations

from typing import Any

import numpy as np

from blip2_export.read import tokenizers
from blip2_export.read.checkpoint import Checkpoint
from blip2_export.reference import load, pictures

TEXTS = (
    "a red star left of a blue ring",
    "two dogs",
    "a green square above a yellow circle, right of a small red star which is left of a large blue ring, and below all of "
    "them a purple triangle beside an orange heart",
)


class Reference:
    """One picture, one text at a time, in float32."""

    def __init__(self, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
        import torch
        from transformers import Blip2ForImageTextRetrieval

        self.torch, self.facts = torch, facts
        self.model = load.load(checkpoint, Blip2ForImageTextRetrieval, facts["image"]["size"])
        self.prepare = pictures.preparation(checkpoint.processor_folder, facts["image"])
        self.tokenizer = tokenizers.load(checkpoint.tokenizer_folder)
        if self.tokenizer.backend_tokenizer.token_to_id("[DEC]") is None:  # as LAVIS' `init_tokenizer`
            self.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self.max_tokens = facts["qformer"]["text"]["max_tokens"]
        if "caption" in facts["tasks"]:
            name = "cls.predictions."
            self.head = {
                stem: load.tensor(checkpoint, name + stem)
                for stem in (
                    *(f"transform.{layer}.{kind}" for layer in ("dense", "LayerNorm") for kind in ("weight", "bias")),
                    "bias",
                    "decoder.weight",
                )
            }

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, truncation=True, max_length=self.max_tokens).input_ids)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            return self.model.vision_model(self.torch.from_numpy(pixels)[None]).last_hidden_state[0].numpy()

    def image(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Query states [n_queries, hidden] and their unit vectors in the joint space."""
        with self.torch.inference_mode():
            states = self._qformer(self.model.query_tokens, features, self.model.query_tokens.shape[1], None)
            embeds = self._unit(self.model.vision_projection(states))
        return states[0].numpy(), embeds[0].numpy()

    def text(self, ids: list[int]) -> np.ndarray:
        """Unit vectors in the joint space of every position of a text."""
        with self.torch.inference_mode():
            states = self._qformer(self.model.embeddings(self.torch.tensor([ids])), None, 0, None)
            return self._unit(self.model.text_projection(states))[0].numpy()

    def matching(self, features: np.ndarray, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """ITM logits [2], and the query states they come from."""
        tokens = self.model.query_tokens
        with self.torch.inference_mode():
            both = self.model.embeddings(self.torch.tensor([ids]), query_embeds=tokens)
            states = self._qformer(both, features, tokens.shape[1], None)[:, : tokens.shape[1]]
            return self.model.itm_head(states).mean(1)[0].numpy(), states[0].numpy()

    def match(self, features: np.ndarray, image_embeds: np.ndarray, text: str) -> dict[str, Any]:
        """ITM logits and probability, and the cosine of ITC (largest over the queries, not divided by the temperature)."""
        ids = self.encode(text)
        logits, _ = self.matching(features, ids)
        return {
            "text": text,
            "input_ids": ids,
            "itm_logits": logits.tolist(),
            "probability": float(1 / (1 + np.exp(logits[0] - logits[1]))),
            "itc": float((image_embeds @ self.text(ids)[0]).max()),
        }

    def write(self, features: np.ndarray, most: int) -> tuple[list[int], np.ndarray, list[int], str]:
        """Ids in front, logits of the first new token, greedy ids and their text. Every step computes the whole sequence anew."""
        ids = self.facts["language"]["token_ids"]
        started = [ids["bos"]]
        first, tokens = None, []
        while len(tokens) < most and not (tokens and tokens[-1] in ids["eos"]):
            logits = self.logits(features, [*started, *tokens])
            first = logits if first is None else first
            tokens.append(int(logits.argmax()))
        assert first is not None, "at least one token is asked for"
        return started, first, tokens, self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def logits(self, features: np.ndarray, ids: list[int]) -> np.ndarray:
        """[vocab] behind the last id: one pass under the multimodal causal mask."""
        torch, F, head = self.torch, self.torch.nn.functional, self.head
        tokens = self.model.query_tokens
        n, length = tokens.shape[1], len(ids)
        seen = torch.zeros(n + length, n + length, dtype=torch.bool)
        seen[:, :n] = True
        seen[n:, n:] = torch.ones(length, length, dtype=torch.bool).tril()
        with torch.inference_mode():
            both = self.model.embeddings(torch.tensor([ids]), query_embeds=tokens)
            x = self._qformer(both, features, n, torch.where(seen, 0.0, -1e4)[None, None])[0, -1]
            x = F.gelu(F.linear(x, head["transform.dense.weight"], head["transform.dense.bias"]))
            norm = (head["transform.LayerNorm.weight"], head["transform.LayerNorm.bias"])
            x = F.layer_norm(x, x.shape, *norm, self.model.config.qformer_config.layer_norm_eps)
            return F.linear(x, head["decoder.weight"], head["bias"]).numpy()

    def _qformer(self, x: Any, features: np.ndarray | None, n_queries: int, mask: Any) -> Any:
        seen = None if features is None else self.torch.from_numpy(features)[None]
        return self.model.qformer(
            query_embeds=x, query_length=n_queries, attention_mask=mask, encoder_hidden_states=seen
        ).last_hidden_state

    def _unit(self, x: Any) -> Any:
        return self.torch.nn.functional.normalize(x, dim=-1)
