"""`transformers` as the reference of bundles that write with a language model: every stage on its own, and `generate()`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip2_export.read import adapter, tokenizers
from blip2_export.read.checkpoint import Checkpoint
from blip2_export.reference import load, pictures


@dataclass(frozen=True)
class Found:
    """Generated ids of every row, up to and with the end token, and all that `generate()` gave."""

    tokens: list[list[int]]
    given: Any


class Reference:
    """`Blip2ForConditionalGeneration` or `InstructBlipForConditionalGeneration` with the checkpoint's processor and tokenizers.

    Where the Q-Former reads text, `facts` say whether that is the whole `prompt` or the `question` in it.
    """

    def __init__(self, checkpoint: Path | Checkpoint, facts: dict[str, Any]) -> None:
        import torch
        from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

        checkpoint = adapter.open_folder(checkpoint) if isinstance(checkpoint, Path) else checkpoint
        self.torch, self.facts = torch, facts
        self.instruct = facts["source"]["model_type"] == "instructblip"
        kind = InstructBlipForConditionalGeneration if self.instruct else Blip2ForConditionalGeneration
        self.model = load.load(checkpoint, kind, facts["image"]["size"])
        self._place_image_tokens(facts["language"]["token_ids"]["image"])
        self.prepare = pictures.preparation(checkpoint.processor_folder, facts["image"])
        self.tokenizer = tokenizers.load(checkpoint.tokenizer_folder)
        self.question = facts["qformer"].get("text")
        if self.question is not None:
            self._questions = tokenizers.load(checkpoint.tokenizer_folder / tokenizers.QUESTION_FOLDER)
            self._questions.truncation_side = self.question["truncation_side"]
            self._embed = None if self.instruct else _text_embeddings(checkpoint, self.model.config.qformer_config)

    def _place_image_tokens(self, image: int) -> None:
        """Old checkpoints name no image token and may have no embedding for it; any will do, features replace it."""
        self.model.config.image_token_index = image
        table = self.model.get_input_embeddings()
        last = table.num_embeddings - 1
        table.register_forward_pre_hook(lambda _, ids: (ids[0].clamp(max=last),))

    def stages(self, picture: Any, prompt: str = "", question: str = "") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels [3, S, S], features [positions, hidden] and queries [n_queries, width] of one picture."""
        pixels, features = self.look(picture)
        return pixels, features, self.queries(features, prompt, question)

    def look(self, picture: Any) -> tuple[np.ndarray, np.ndarray]:
        pixels = self.prepare(picture)
        return pixels, self.features(pixels)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            return self.model.vision_model(self.torch.from_numpy(pixels)[None]).last_hidden_state[0].numpy()

    def queries(self, features: np.ndarray, prompt: str = "", question: str = "") -> np.ndarray:
        with self.torch.inference_mode(), self._reading(prompt, question):
            tokens = self.model.query_tokens.expand(1, -1, -1)
            seen = self.torch.from_numpy(features)[None]
            read = self._instruction(prompt, question, tokens.shape[1])
            queries = self.model.qformer(query_embeds=tokens, encoder_hidden_states=seen, **read).last_hidden_state
            projected = self.model.language_projection(queries[:, : tokens.shape[1]])[0].numpy()
        width = self.facts["language"]["hidden"]
        return projected.reshape(-1)[: len(projected) * width].reshape(-1, width)

    def question_ids(self, prompt: str, question: str) -> list[int]:
        """What the Q-Former reads, special tokens included."""
        text, most = prompt if self.question["reads"] == "prompt" else question, self.question["max_tokens"]
        return list(self._questions(text, truncation=True, max_length=most).input_ids)

    def prompt_ids(self, prompt: str) -> list[int]:
        """What the language model reads behind the queries, special tokens included."""
        return list(self.tokenizer(prompt).input_ids)

    def generate(
        self, pixels: np.ndarray, prompt: str, max_new_tokens: int, question: str = "", **search: Any
    ) -> tuple[list[int], np.ndarray, list[int], str]:
        """Prompt ids, logits of the first new token, generated ids, and their text; greedy unless `search` says otherwise."""
        out = self.search(pixels[None], prompt, max_new_tokens, question, output_logits=True, **search)
        tokens = out.tokens[0]
        return self.prompt_ids(prompt), out.given.logits[0][0].numpy(), tokens, self.text(tokens)

    @property
    def mixes_pictures(self) -> bool:
        """Whether a batch is not what its pictures are alone.

        Features are scattered in flattened order; behind a projection wider than the embeddings a picture gets the one before's.
        """
        return bool(self.model.language_projection.out_features != self.facts["language"]["hidden"])

    def search(self, pixels: np.ndarray, prompt: str, max_new_tokens: int, question: str = "", **search: Any) -> Found:
        """The tokens that `generate()` finds for every picture of a batch [n, 3, S, S] behind the same prompt."""
        image = [self.model.config.image_token_index] * self.model.config.num_query_tokens
        rows = self.torch.tensor([image + self.prompt_ids(prompt)]).expand(len(pixels), -1)
        read = self._instruction(prompt, question, n_rows=len(pixels))
        with self.torch.inference_mode(), self._reading(prompt, question):
            out = self.model.generate(
                pixel_values=self.torch.from_numpy(pixels),
                input_ids=rows,
                attention_mask=self.torch.ones_like(rows),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                **{f"qformer_{name}": value for name, value in read.items()},
                **search,
            )
        started = 1 if self.facts["family"] == "encoder_decoder" else rows.shape[1]
        return Found([self._up_to_the_end(row) for row in out.sequences[:, started:].tolist()], out)

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def spellings(self, word: str) -> list[list[int]]:
        """Token ids of a word at the beginning of a text and, where tokens carry it, behind a space."""
        spaced = f" {word}" if type(self.tokenizer.backend_tokenizer.pre_tokenizer).__name__ == "ByteLevel" else word
        found = [self.tokenizer(text, add_special_tokens=False).input_ids for text in (word, spaced)]
        return found if found[0] != found[1] else found[:1]

    def _up_to_the_end(self, tokens: list[int]) -> list[int]:
        """Without what fills up a row behind its end."""
        ends = self.facts["language"]["token_ids"]["eos"]
        return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]

    def _instruction(self, prompt: str, question: str, n_queries: int = 0, n_rows: int = 1) -> dict[str, Any]:
        """What InstructBLIP's Q-Former is told; its mask covers `n_queries` query tokens in front."""
        if not self.instruct:
            return {}
        ids = self.torch.tensor([self.question_ids(prompt, question)]).expand(n_rows, -1)
        mask = self.torch.ones(n_rows, n_queries + ids.shape[1], dtype=self.torch.long)
        return {"input_ids": ids, "attention_mask": mask}

    @contextmanager
    def _reading(self, prompt: str, question: str) -> Iterator[None]:
        """BLIP-2's Q-Former gets the question beside the query tokens; `generate()` of its own passes none on."""
        if self.question is None or self.instruct:
            yield
            return
        qformer, ids = self.model.qformer, self.torch.tensor([self.question_ids(prompt, question)])
        forward = qformer.forward

        def with_question(query_embeds: Any, **kwargs: Any) -> Any:
            rows, n = query_embeds.shape[:2]
            both = self._embed(ids.expand(rows, -1), query_embeds=query_embeds)
            out = forward(both, query_length=n, **kwargs)
            out.last_hidden_state = out.last_hidden_state[:, :n]
            return out

        qformer.forward = with_question
        try:
            yield
        finally:
            qformer.forward = forward


def _text_embeddings(checkpoint: Checkpoint, cfg: Any) -> Any:
    """Word and position embeddings, which BLIP-2's class for generation does not load."""
    from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

    embeddings = Blip2TextEmbeddings(cfg)
    names = ("word_embeddings.weight", "position_embeddings.weight")
    embeddings.load_state_dict({name: load.tensor(checkpoint, f"embeddings.{name}") for name in names})
    return embeddings.eval()
