"""How true a bundle is on held-out scenes, asked through the engine as a user would: captions, answers, matching, retrieval."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from blip2_export.scenes import drawing, retrieval, texts
from blip2_export.scenes.held_out import Engine, HeldOut

TASKS = ("caption", "ask", "match", "embed")
_COUNTS = ("edits",)  # figures that are no shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=Path("models/demo-opt"), help="bundle (default %(default)s)")
    parser.add_argument(
        "--engine", type=Path, default=Path("target/release/blip2"), help="the blip2 binary (default %(default)s)"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="what to evaluate (default: all that the bundle can)")
    parser.add_argument("--count", type=int, default=1000, help="scenes of each kind (default %(default)s)")
    parser.add_argument("--seed", default="evaluation", help="another seed draws other scenes (default %(default)s)")
    parser.add_argument("--side", type=int, default=256, help="side of the pictures in pixels (default %(default)s)")
    parser.add_argument(
        "--group", type=int, default=100, help="pictures that a text finds one of (default %(default)s)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="BUNDLE",
        help="the same model in float32: asked too, and the shares of both stored in the `loss` of --model's bundle.json",
    )
    parser.add_argument(
        "--wrong", type=Path, help="write everything that was wrong to this file, one JSON object a line"
    )


def run(args: argparse.Namespace) -> int:
    """Prints one line for ordinary scenes and one for scenes with an unseen shape–colour pair."""
    tasks = _tasks(args, _facts(args.model))
    exact = _yardstick(args) if args.against else None
    wrong: list[dict[str, Any]] = []
    for name, unseen in (("held-out scenes", False), ("unseen shape-colour pairs", True)):
        figures = _asked(args, args.model, unseen, tasks, wrong)
        print(json.dumps({"model": str(args.model), "on": name, "scenes": args.count, **figures}), flush=True)
        if exact is not None and not unseen:
            wanted = _asked(args, exact, unseen, tasks, [])
            print(json.dumps({"model": str(exact), "on": name, "scenes": args.count, **wanted}), flush=True)
            _store(args.model, figures, wanted)
    if args.wrong:
        args.wrong.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    return 0


def _asked(
    args: argparse.Namespace, model: Path, unseen: bool, tasks: Collection[str], wrong: list[dict[str, Any]]
) -> dict[str, float]:
    """The figures of a bundle. All bundles see the same scenes and are asked the same."""
    rng = random.Random(f"{args.seed} {unseen}")
    found = [drawing.sample_scene(rng, unseen=unseen) for _ in range(args.count)]
    with tempfile.TemporaryDirectory() as folder:
        pictures = [_save(s, Path(folder) / f"{i}.png", args.side) for i, s in enumerate(found)]
        held = HeldOut(Engine(args.engine, model), found, pictures, rng, wrong)
        return _figures(held, tasks, _facts(model)["family"], args.group)


def _yardstick(args: argparse.Namespace) -> Path:
    """The float32 bundle; that of fewer bits has a loss to which figures belong."""
    if any(graph["precision"] != "float32" for graph in _facts(args.against)["graphs"].values()):
        raise SystemExit(
            f"{args.against}: not all of its graphs are float32; --against takes the same model in float32"
        )
    if "loss" not in _facts(args.model):
        raise SystemExit(
            f"{args.model}: bundle.json has no `loss`, so that figures have no place; convert it to fewer bits"
        )
    return Path(args.against)


def _store(bundle: Path, figures: dict[str, float], exact: dict[str, float]) -> None:
    """Writes the shares of both to the `loss` of a bundle."""
    facts = _facts(bundle)
    facts["loss"]["tasks"] = {
        name: {"float32": exact[name], "bundle": share} for name, share in figures.items() if name not in _COUNTS
    }
    aside = bundle / "bundle.json.part"
    aside.write_text(json.dumps(facts, indent=1) + "\n")
    aside.replace(bundle / "bundle.json")


def _figures(held: HeldOut, tasks: Collection[str], family: str, group: int) -> dict[str, float]:
    figures = {}
    if "caption" in tasks:
        figures["itg_true" if family == "qformer" else "captions_true"] = texts.captions(held)
    if "ask" in tasks:
        figures |= texts.answers(held)
    if {"match", "embed"} & set(tasks):
        figures |= retrieval.figures(held, tasks, group)
    return figures


def _facts(bundle: Path) -> dict[str, Any]:
    try:
        return json.loads((bundle / "bundle.json").read_text())
    except FileNotFoundError:
        raise SystemExit(f"{bundle}: no bundle.json there") from None


def _tasks(args: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    can = [task for task in TASKS if task in facts["tasks"]]
    lacking = [task for task in args.tasks or [] if task not in can]
    if lacking:
        raise SystemExit(f"{args.model} cannot {' or '.join(lacking)}; it can {', '.join(can)}")
    return args.tasks or can


def _save(scene: drawing.Scene, path: Path, side: int) -> str:
    drawing.draw(scene, side).save(path)
    return str(path)
