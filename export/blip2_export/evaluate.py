"""How true a bundle's captions and answers are on held-out scenes, asked through the engine as a user would."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from blip2_export import scenes
from blip2_export.comparison import run_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=Path("models/demo-opt"), help="bundle (default %(default)s)")
    parser.add_argument(
        "--engine", type=Path, default=Path("target/release/blip2"), help="the blip2 binary (default %(default)s)"
    )
    parser.add_argument("--count", type=int, default=1000, help="scenes of each kind (default %(default)s)")
    parser.add_argument("--seed", default="evaluation", help="another seed draws other scenes (default %(default)s)")
    parser.add_argument("--side", type=int, default=256, help="side of the pictures in pixels (default %(default)s)")
    parser.add_argument(
        "--wrong", type=Path, help="write every wrong caption and answer to this file, one JSON object a line"
    )


def run(args: argparse.Namespace) -> int:
    """Prints one line for ordinary scenes and one for scenes with an unseen shape–colour pair."""
    wrong: list[dict[str, str]] = []
    for name, unseen in (("held-out scenes", False), ("unseen shape-colour pairs", True)):
        rng = random.Random(f"{args.seed} {unseen}")
        found = [scenes.sample_scene(rng, unseen=unseen) for _ in range(args.count)]
        with tempfile.TemporaryDirectory() as folder:
            pictures = [_save(s, Path(folder) / f"{i}.png", args.side) for i, s in enumerate(found)]
            captions = _captions(args, found, pictures, wrong)
            answers = _answers(args, found, pictures, rng, wrong)
        print(json.dumps({"on": name, "scenes": args.count, "captions_true": captions, **answers}), flush=True)
    if args.wrong:
        args.wrong.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    return 0


def _save(scene: scenes.Scene, path: Path, side: int) -> Path:
    scenes.draw(scene, side).save(path)
    return path


def _captions(
    args: argparse.Namespace, found: list[scenes.Scene], pictures: list[Path], wrong: list[dict[str, str]]
) -> float:
    texts = [row["text"] for row in _blip2(args, "caption", *map(str, pictures))]
    true = [scenes.is_true(text, scene) for text, scene in zip(texts, found, strict=True)]
    wrong += [
        {"scene": scenes.describe(s), "caption": text} for text, s, ok in zip(texts, found, true, strict=True) if not ok
    ]
    return round(sum(true) / len(true), 4)


def _answers(
    args: argparse.Namespace,
    found: list[scenes.Scene],
    pictures: list[Path],
    rng: random.Random,
    wrong: list[dict[str, str]],
) -> dict[str, float]:
    right, asked_of = Counter[str](), Counter[str]()
    for k, (scene, picture) in enumerate(zip(found, pictures, strict=True)):
        asked = [scenes.question(scene, rng, kind) for kind in scenes.QUESTION_KINDS]
        rows = _blip2(args, "ask", str(picture), *(q for _, q, _ in asked))
        for (kind, question, answer), row in zip(asked, rows, strict=True):
            asked_of[kind] += 1
            right[kind] += row["text"] == answer
            if row["text"] != answer:
                wrong.append(
                    {"scene": scenes.describe(scene), "question": question, "answer": answer, "given": row["text"]}
                )
        if sys.stderr.isatty():
            print(f"\r{k + 1} of {len(found)} pictures asked", end="", file=sys.stderr)
    every = round(sum(right.values()) / sum(asked_of.values()), 4)
    return {"answers_right": every, **{kind: round(right[kind] / asked_of[kind], 4) for kind in scenes.QUESTION_KINDS}}


def _blip2(args: argparse.Namespace, *words: str) -> list[dict[str, Any]]:
    return run_engine(args.engine, words[0], "--model", str(args.model), "--json", *words[1:])
