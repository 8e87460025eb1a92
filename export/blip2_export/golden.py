"""Records inputs and the outputs of every stage from `transformers`, in float32 on CPU, for `blip2 verify`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from blip2_export import processor, scenes
from blip2_export.checkpoint import CheckpointError, weight_files

N_PICTURES = 2
_QUESTION = "what colour is the star?"
_PICTURE_SIDE = 240


def record(checkpoint: Path, bundle: Path, facts: dict[str, Any]) -> None:
    """Writes `bundle/golden/`: drawn pictures, each captioned and asked one question."""
    import torch

    reference = Reference(checkpoint, facts)
    folder = bundle / "golden"
    folder.mkdir()
    cases = []
    for i, picture in enumerate(scenes.sample_pictures(N_PICTURES, seed=7, side=_PICTURE_SIDE)):
        picture.save(folder / f"{i}.png")
        pixels, features, queries = reference.stages(picture)
        shared = {
            "pixels": _save(folder / f"{i}.pixels.bin", pixels),
            "features": _save(folder / f"{i}.features.bin", features),
            "queries": _save(folder / f"{i}.queries.bin", queries),
        }
        for task, prompt in (
            ("caption", facts["prompts"]["caption"]),
            ("ask", facts["prompts"]["ask"].format(_QUESTION)),
        ):
            ids, logits, tokens, text = reference.generate(pixels, prompt, facts["generation"][task]["max_new_tokens"])
            cases.append(
                {
                    "task": task,
                    "image": f"golden/{i}.png",
                    "prompt": prompt,
                    "prompt_ids": ids,
                    "max_new_tokens": facts["generation"][task]["max_new_tokens"],
                    **shared,
                    "first_logits": _save(folder / f"{i}.{task}.first_logits.bin", logits),
                    "tokens": tokens,
                    "text": text,
                }
            )
    facts["made_by"]["torch"] = version("torch")
    golden = {
        "format_version": 1,
        "reference": f"transformers {version('transformers')}, torch {torch.__version__.split('+')[0]}, float32 on cpu",
        "tolerance": {"pixels": 0.0157, "features": 1e-4, "queries": 1e-4, "first_logits": 1e-4},
        "cases": cases,
    }
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


class Reference:
    """`Blip2ForConditionalGeneration` with the PIL image processor."""

    def __init__(self, checkpoint: Path, facts: dict[str, Any]) -> None:
        import torch
        from transformers import Blip2ForConditionalGeneration

        _check_memory(checkpoint)
        self.torch = torch
        self.model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = processor.read_tokenizer(checkpoint)
        self.facts = facts
        self._place_image_tokens(facts["language"]["token_ids"]["image"])

    def _place_image_tokens(self, image: int) -> None:
        """Old checkpoints name no image token and may have no embedding for it; any will do, features replace it."""
        self.model.config.image_token_index = image
        table = self.model.get_input_embeddings()
        last = table.num_embeddings - 1
        table.register_forward_pre_hook(lambda _, ids: (ids[0].clamp(max=last),))

    def stages(self, picture: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels [3, S, S], features [positions, hidden] and queries [n_queries, width] of one picture."""
        pixels = preprocess(picture, self.facts["image"])
        with self.torch.inference_mode():
            seen = self.model.vision_model(self.torch.from_numpy(pixels)[None]).last_hidden_state
            tokens = self.model.query_tokens.expand(1, -1, -1)
            queries = self.model.qformer(query_embeds=tokens, encoder_hidden_states=seen).last_hidden_state
            projected = self.model.language_projection(queries)[0].numpy()
        width = self.facts["language"]["hidden"]
        return pixels, seen[0].numpy(), projected.reshape(-1)[: len(projected) * width].reshape(-1, width)

    def generate(
        self, pixels: np.ndarray, prompt: str, max_new_tokens: int, **search: Any
    ) -> tuple[list[int], np.ndarray, list[int], str]:
        """Prompt ids, logits of the first new token, generated ids, and their text; greedy unless `search` says otherwise."""
        ids = self.tokenizer.encode(prompt).ids
        image = [self.model.config.image_token_index] * self.model.config.num_query_tokens
        row = self.torch.tensor([image + ids])
        with self.torch.inference_mode():
            out = self.model.generate(
                pixel_values=self.torch.from_numpy(pixels)[None],
                input_ids=row,
                attention_mask=self.torch.ones_like(row),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **search,
            )
        tokens = out.sequences[0, row.shape[1] :].tolist()
        return ids, out.logits[0][0].numpy(), tokens, self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def preprocess(picture: Any, image: dict[str, Any]) -> np.ndarray:
    """[3, S, S] by `transformers`' own image processor on PIL."""
    from transformers import BlipImageProcessorPil

    side = {"height": image["size"], "width": image["size"]}
    from PIL import Image

    processor = BlipImageProcessorPil(
        size=side,
        resample=getattr(Image.Resampling, image["resample"].upper()),
        image_mean=image["mean"],
        image_std=image["std"],
        rescale_factor=image["rescale"],
    )
    return np.asarray(processor(images=picture, return_tensors="np")["pixel_values"][0], np.float32)


def _save(path: Path, value: np.ndarray) -> dict[str, Any]:
    value.astype("<f4").tofile(path)
    return {"file": f"golden/{path.name}", "shape": list(value.shape)}


def _check_memory(checkpoint: Path) -> None:
    stored = sum(file.stat().st_size for file in weight_files(checkpoint))
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
