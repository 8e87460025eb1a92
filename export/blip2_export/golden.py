"""Records inputs and the outputs of every stage from `transformers`, in float32 on CPU, for `blip2 verify`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from blip2_export import processor, reference, scenes
from blip2_export.checkpoint import Checkpoint, CheckpointError

N_PICTURES = 2
_QUESTION = "what colour is the star?"
_PICTURE_SIDE = 240


def record(checkpoint: Checkpoint, bundle: Path, facts: dict[str, Any]) -> None:
    """Writes `bundle/golden/`."""
    import torch

    folder = bundle / "golden"
    folder.mkdir()
    _check_memory(checkpoint)
    if facts["family"] == "qformer":
        from blip2_export import golden_retrieval

        cases, tolerance = golden_retrieval.cases(checkpoint, bundle, facts)
    else:
        cases, tolerance = _cases(checkpoint, folder, facts), ("features", "queries", "first_logits")
    facts["made_by"]["torch"] = version("torch")
    golden = {
        "format_version": 1,
        "reference": f"transformers {version('transformers')}, torch {torch.__version__.split('+')[0]}, float32 on cpu",
        "tolerance": {"pixels": 0.0157, **dict.fromkeys(tolerance, 1e-4)},
        "cases": cases,
    }
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


def _cases(checkpoint: Checkpoint, folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Drawn pictures, each captioned and asked one question."""
    model = Reference(checkpoint, facts)
    cases = []
    for i, picture in enumerate(scenes.sample_pictures(N_PICTURES, seed=7, side=_PICTURE_SIDE)):
        picture.save(folder / f"{i}.png")
        pixels, features = model.look(picture)
        shared = {
            "pixels": save(folder / f"{i}.pixels.bin", pixels),
            "features": save(folder / f"{i}.features.bin", features),
        }
        if model.question is None:
            shared["queries"] = save(folder / f"{i}.queries.bin", model.queries(features))
        for task, question, prompt in (
            ("caption", "", facts["prompts"]["caption"]),
            ("ask", _QUESTION, facts["prompts"]["ask"].format(_QUESTION)),
        ):
            own = {} if model.question is None else _asked(model, folder / f"{i}.{task}", features, prompt, question)
            n_new = facts["generation"][task]["max_new_tokens"]
            ids, logits, tokens, text = model.generate(pixels, prompt, n_new, question)
            cases.append(
                {
                    "task": task,
                    "image": f"golden/{i}.png",
                    "prompt": prompt,
                    "prompt_ids": ids,
                    "max_new_tokens": n_new,
                    **shared,
                    **own,
                    "first_logits": save(folder / f"{i}.{task}.first_logits.bin", logits),
                    "tokens": tokens,
                    "text": text,
                }
            )
    return cases


def _asked(model: Reference, stem: Path, features: np.ndarray, prompt: str, question: str) -> dict[str, Any]:
    """What a case holds of its own where the Q-Former reads a question."""
    queries = model.queries(features, prompt, question)
    return {
        "question_ids": model.question_ids(prompt, question),
        "queries": save(stem.with_name(stem.name + ".queries.bin"), queries),
    }


@dataclass(frozen=True)
class Found:
    """Generated ids of every row, up to and with the end token, and all that `generate()` gave."""

    tokens: list[list[int]]
    given: Any


class Reference:
    """`Blip2ForConditionalGeneration` or `InstructBlipForConditionalGeneration` with the PIL image processor.

    Where the Q-Former reads text, `facts` say whether that is the whole `prompt` or the `question` in it.
    """

    def __init__(self, checkpoint: Path | Checkpoint, facts: dict[str, Any]) -> None:
        import torch
        from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

        checkpoint = Checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
        self.torch, self.facts = torch, facts
        self.instruct = facts["source"]["model_type"] == "instructblip"
        kind = InstructBlipForConditionalGeneration if self.instruct else Blip2ForConditionalGeneration
        self.model = reference.load(checkpoint, kind, facts["image"]["size"])
        self._place_image_tokens(facts["language"]["token_ids"]["image"])
        self.tokenizer = processor.read_tokenizer(checkpoint.tokenizer_folder)
        self.question = facts["qformer"].get("text")
        if self.question is not None:
            self._questions = processor.read_tokenizer(checkpoint.tokenizer_folder / processor.QUESTION_FOLDER)
            self._questions.enable_truncation(self.question["max_tokens"], direction=self.question["truncation_side"])
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
        pixels = preprocess(picture, self.facts["image"])
        with self.torch.inference_mode():
            seen = self.model.vision_model(self.torch.from_numpy(pixels)[None]).last_hidden_state
        return pixels, seen[0].numpy()

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
        return self._questions.encode(prompt if self.question["reads"] == "prompt" else question).ids

    def generate(
        self, pixels: np.ndarray, prompt: str, max_new_tokens: int, question: str = "", **search: Any
    ) -> tuple[list[int], np.ndarray, list[int], str]:
        """Prompt ids, logits of the first new token, generated ids, and their text; greedy unless `search` says otherwise."""
        out = self.search(pixels[None], prompt, max_new_tokens, question, output_logits=True, **search)
        tokens = out.tokens[0]
        return self.tokenizer.encode(prompt).ids, out.given.logits[0][0].numpy(), tokens, self.text(tokens)

    @property
    def mixes_pictures(self) -> bool:
        """Whether a batch is not what its pictures are alone.

        Features are scattered in flattened order; behind a projection wider than the embeddings a picture gets the one before's.
        """
        return bool(self.model.language_projection.out_features != self.facts["language"]["hidden"])

    def search(self, pixels: np.ndarray, prompt: str, max_new_tokens: int, question: str = "", **search: Any) -> Found:
        """The tokens that `generate()` finds for every picture of a batch [n, 3, S, S] behind the same prompt."""
        image = [self.model.config.image_token_index] * self.model.config.num_query_tokens
        rows = self.torch.tensor([image + self.tokenizer.encode(prompt).ids]).expand(len(pixels), -1)
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
        spaced = f" {word}" if type(self.tokenizer.pre_tokenizer).__name__ == "ByteLevel" else word
        found = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in (word, spaced)]
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
    embeddings.load_state_dict({name: reference.tensor(checkpoint, f"embeddings.{name}") for name in names})
    return embeddings.eval()


def preprocess(picture: Any, image: dict[str, Any]) -> np.ndarray:
    """[3, S, S] by `transformers`' own image processor on PIL."""
    from PIL import Image
    from transformers import BlipImageProcessorPil

    side = {"height": image["size"], "width": image["size"]}
    prepare = BlipImageProcessorPil(
        size=side,
        resample=getattr(Image.Resampling, image["resample"].upper()),
        image_mean=image["mean"],
        image_std=image["std"],
        rescale_factor=image["rescale"],
    )
    return np.asarray(prepare(images=picture, return_tensors="np")["pixel_values"][0], np.float32)


def save(path: Path, value: np.ndarray) -> dict[str, Any]:
    value.astype("<f4").tofile(path)
    return {"file": f"golden/{path.name}", "shape": list(value.shape)}


def _check_memory(checkpoint: Checkpoint) -> None:
    stored = checkpoint.n_bytes
    free = _available_bytes()
    if free is not None and 2 * stored > free:
        raise CheckpointError(
            f"recording goldens needs about {2 * stored / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free; "
            "convert with --no-golden"
        )


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
