"""Drawn scenes as a folder: pictures, captions, questions, and what is true of each picture."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from blip2_export.scenes import drawing, truths


def write_dataset(folder: Path, n: int, seed: int, side: int, unseen: bool = False) -> None:
    """`folder/000000.png`… with `annotations.json` (COCO captions form), `questions.json`, and `truths.json` for `blip2 bench`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    images, annotations, questions = [], [], []
    true: dict[str, list[str]] = {}
    for i in range(n):
        scene = drawing.sample_scene(rng, unseen=unseen)
        name = f"{i:06}.png"
        true |= truths.of_scene(name, scene)
        drawing.draw(scene, side).save(folder / name)
        images.append({"id": i, "file_name": name})
        annotations += [{"id": 5 * i + k, "image_id": i, "caption": drawing.caption(scene, rng)} for k in range(5)]
        for kind in drawing.QUESTION_KINDS:
            _, asked, answer = drawing.question(scene, rng, kind)
            questions.append({"image_id": i, "kind": kind, "question": asked, "answer": answer})
            true[f"{name}: {asked}"] = [answer]
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "truths.json").write_text(json.dumps(true))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder for the pictures and their annotations")
    parser.add_argument("--count", type=int, default=100, help="pictures to draw (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=256, help="side of a picture in pixels (default %(default)s)")
    parser.add_argument(
        "--unseen", action="store_true", help="every scene holds a shape–colour pair kept out of training"
    )


def run(args: argparse.Namespace) -> int:
    write_dataset(args.out, args.count, args.seed, args.side, args.unseen)
    return 0
