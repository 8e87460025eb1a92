"""Records inputs and the outputs of every stage from `transformers`, in float32 on CPU, for `blip2 verify`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.reference import generation, pictures, retrieval

PIXELS = 1e-6  # in every byte the same; a division of LAVIS is a multiplication here
_QUESTION = "what colour is the star?"
_STAGE1 = (
    "features",
    "queries",
    "image_embeds",
    "text_embeds",
    "multimodal_states",
    "itm_logits",
    "itc",
    "first_logits",
)


def record(checkpoint: Checkpoint, bundle: Path, facts: dict[str, Any]) -> None:
    """Writes `bundle/golden/`."""
    import torch

    folder = bundle / "golden"
    folder.mkdir()
    _check_memory(checkpoint, facts["vision"]["n_positions"])
    if facts["family"] == "qformer":
        cases, tolerance = _stage1_cases(checkpoint, folder, facts)
    else:
        cases, tolerance = _cases(checkpoint, folder, facts), ("features", "queries", "first_logits")
    facts["made_by"]["torch"] = version("torch")
    golden = {
        "format_version": 1,
        "reference": f"transformers {version('transformers')}, torch {torch.__version__.split('+')[0]}, float32 on cpu",
        "tolerance": {"pixels": PIXELS, **dict.fromkeys(tolerance, 1e-4)},
        "cases": cases,
    }
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


def _cases(checkpoint: Checkpoint, folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Drawn pictures, each captioned and asked one question."""
    model = generation.Reference(checkpoint, facts)
    cases = []
    for i, (picture, pixels) in enumerate(pictures.shown(model.prepare, facts["image"]["size"])):
        picture.save(folder / f"{i}.png")
        features = model.features(pixels)
        shared = _saved(folder / f"{i}", pixels=pixels, features=features)
        if model.question is None:
            shared |= _saved(folder / f"{i}", queries=model.queries(features))
        for task, question, prompt in (
            ("caption", "", facts["prompts"]["caption"]),
            ("ask", _QUESTION, facts["prompts"]["ask"].format(_QUESTION)),
        ):
            own = {} if model.question is None else _asked(model, folder / f"{i}.{task}", features, prompt, question)
            n_new = facts["generation"][task]["max_new_tokens"]
            _check_room(facts, task, n_new + len(model.prompt_ids(prompt)))
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
                    **_saved(folder / f"{i}.{task}", first_logits=logits),
                    "tokens": tokens,
                    "text": text,
                }
            )
    return cases


def _check_room(facts: dict[str, Any], task: str, n_tokens: int) -> None:
    room = facts["language"]["max_positions"] - facts["qformer"]["n_queries"]
    if n_tokens > room:
        raise CheckpointError(
            f"prompt and new tokens of a {task} are {n_tokens} at most, the language model has room for {room} behind the "
            f"queries; choose fewer with --{task}-tokens"
        )


def _asked(model: generation.Reference, stem: Path, features: np.ndarray, prompt: str, question: str) -> dict[str, Any]:
    """What a case holds of its own where the Q-Former reads a question."""
    ids = model.question_ids(prompt, question)
    return {"question_ids": ids, **_saved(stem, queries=model.queries(features, prompt, question))}


def _stage1_cases(
    checkpoint: Checkpoint, folder: Path, facts: dict[str, Any]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Drawn pictures, each matched with texts, embedded, and captioned where the checkpoint can; and the compared stages."""
    model = retrieval.Reference(checkpoint, facts)
    writes = "caption" in facts["tasks"]
    cases: list[dict[str, Any]] = []
    for i, (picture, pixels) in enumerate(pictures.shown(model.prepare, facts["image"]["size"])):
        stem, text = folder / f"{i}", retrieval.TEXTS[i]
        picture.save(folder / f"{i}.png")
        features = model.features(pixels)
        queries, image_embeds = model.image(features)
        shared = {"image": f"golden/{i}.png", **_saved(stem, pixels=pixels, features=features, queries=queries)}
        matched = [model.match(features, image_embeds, other) for other in retrieval.TEXTS]
        cases.append({"task": "match", **shared, "texts": matched})
        embedded = _embedded(model, stem, features, text)
        cases.append({"task": "embed", **shared, **_saved(stem, image_embeds=image_embeds), **embedded})
        if writes:
            n_new = facts["generation"]["caption"]["max_new_tokens"]
            cases.append({"task": "caption", **shared, **_written(model, folder / f"{i}.caption", features, n_new)})
    return cases, _STAGE1 if writes else _STAGE1[:-1]


def _embedded(model: retrieval.Reference, stem: Path, features: np.ndarray, text: str) -> dict[str, Any]:
    """A text alone, and beside the picture."""
    ids = model.encode(text)
    _, multimodal = model.matching(features, ids)
    return {
        "text": text,
        "input_ids": ids,
        **_saved(stem, text_embeds=model.text(ids), multimodal_states=multimodal),
    }


def _written(model: retrieval.Reference, stem: Path, features: np.ndarray, n_new: int) -> dict[str, Any]:
    """A caption of the Q-Former itself."""
    ids, logits, tokens, text = model.write(features, n_new)
    return {
        "prompt": "",
        "prompt_ids": ids,
        "max_new_tokens": n_new,
        **_saved(stem, first_logits=logits),
        "tokens": tokens,
        "text": text,
    }


def _saved(stem: Path, **values: np.ndarray) -> dict[str, Any]:
    """Each value in a file of its own; what a case says of them."""
    return {name: _save(stem.with_name(f"{stem.name}.{name}.bin"), value) for name, value in values.items()}


def _save(path: Path, value: np.ndarray) -> dict[str, Any]:
    value.astype("<f4").tofile(path)
    return {"file": f"golden/{path.name}", "shape": list(value.shape)}


def _check_memory(checkpoint: Checkpoint, n_positions: int) -> None:
    """Weights in float32, and the scores of one layer's attention over a picture."""
    heads = (checkpoint.config.get("vision_config") or {}).get("num_attention_heads", 16)
    needed = 2 * checkpoint.n_bytes + 8 * heads * n_positions**2
    free = _available_bytes()
    if free is not None and needed > free:
        raise CheckpointError(
            f"recording goldens needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free; "
            "convert with --no-golden"
        )


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
