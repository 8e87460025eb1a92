"""Records inputs and the outputs of every stage from `transformers`, in float32 on CPU, for `blip2 verify`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.reference import generation, pictures, retrieval

_PIXELS = 1e-6  # in every byte the same; a division of LAVIS is a multiplication here
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
        "tolerance": {"pixels": _PIXELS, **dict.fromkeys(tolerance, 1e-4)},
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
                    "first_logits": save(folder / f"{i}.{task}.first_logits.bin", logits),
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
    queries = model.queries(features, prompt, question)
    return {
        "question_ids": model.question_ids(prompt, question),
        "queries": save(stem.with_name(stem.name + ".queries.bin"), queries),
    }


def _stage1_cases(
    checkpoint: Checkpoint, folder: Path, facts: dict[str, Any]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Drawn pictures, each matched with texts, embedded, and captioned where the checkpoint can; and the compared stages."""
    model = retrieval.Reference(checkpoint, facts)
    out = []
    for i, (picture, pixels) in enumerate(pictures.shown(model.prepare, facts["image"]["size"])):
        picture.save(folder / f"{i}.png")
        features = model.features(pixels)
        queries, image_embeds = model.image(features)
        shared = {
            "image": f"golden/{i}.png",
            "pixels": save(folder / f"{i}.pixels.bin", pixels),
            "features": save(folder / f"{i}.features.bin", features),
            "queries": save(folder / f"{i}.queries.bin", queries),
        }
        out.append(
            {"task": "match", **shared, "texts": [model.match(features, image_embeds, t) for t in retrieval.TEXTS]}
        )
        ids = model.encode(retrieval.TEXTS[i])
        states, multimodal = model.text(ids), model.matching(features, ids)[1]
        out.append(
            {
                "task": "embed",
                **shared,
                "text": retrieval.TEXTS[i],
                "input_ids": ids,
                "image_embeds": save(folder / f"{i}.image_embeds.bin", image_embeds),
                "text_embeds": save(folder / f"{i}.text_embeds.bin", states),
                "multimodal_states": save(folder / f"{i}.multimodal_states.bin", multimodal),
            }
        )
        if "caption" in facts["tasks"]:
            most = facts["generation"]["caption"]["max_new_tokens"]
            ids, logits, tokens, text = model.write(features, most)
            out.append(
                {
                    "task": "caption",
                    "prompt": "",
                    "prompt_ids": ids,
                    "max_new_tokens": most,
                    **shared,
                    "first_logits": save(folder / f"{i}.caption.first_logits.bin", logits),
                    "tokens": tokens,
                    "text": text,
                }
            )
    return out, _STAGE1 if "caption" in facts["tasks"] else _STAGE1[:-1]


def save(path: Path, value: np.ndarray) -> dict[str, Any]:
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
