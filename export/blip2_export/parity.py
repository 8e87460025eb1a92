"""A bundle in the engine against its checkpoint in `transformers`: the same pictures and prompts must give the same tokens."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2_export import scenes
from blip2_export.golden import Reference

PROMPTS = ("", "Question: what colour is the star? Answer:", "a photo of")
# What `generate()` is told, and the engine's words for it.
SEARCHES: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({}, ()),
    ({"num_beams": 2, "length_penalty": 0.0}, ("--beams", "2", "--length-penalty", "0")),
    ({"num_beams": 3, "early_stopping": True}, ("--beams", "3", "--early-stopping", "true")),
    (
        {"num_beams": 5, "length_penalty": -1.0, "early_stopping": "never"},
        ("--beams", "5", "--length-penalty", "-1", "--early-stopping", "never"),
    ),
    (
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
        ("--repetition-penalty", "1.4", "--no-repeat-ngram", "2", "--min-new-tokens", "5"),
    ),
)


@dataclass
class Comparison:
    """What was compared. `written` are the reference's distinct token rows: few of them test little."""

    cases: int = 0
    differences: list[str] = field(default_factory=list)
    written: set[tuple[int, ...]] = field(default_factory=set)


def compare(checkpoint: Path, bundle: Path, engine: Path, n_pictures: int, max_new_tokens: int) -> Comparison:
    """Tokens and texts of drawn scenes: greedy behind every prompt, every other search on a third of the pictures."""
    reference = Reference(checkpoint, json.loads((bundle / "bundle.json").read_text()))
    pictures = scenes.sample_pictures(n_pictures, seed=5, side=150)
    out = Comparison()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.png" for i in range(n_pictures)]
        for picture, path in zip(pictures, paths, strict=True):
            picture.save(path)
        pixels = [reference.stages(p)[0] for p in pictures]
        for k, (search, words) in enumerate(SEARCHES):
            for prompt in PROMPTS:
                shown = range(n_pictures) if k == 0 else range(0, n_pictures, 3)
                options = [
                    "--json",
                    "--model",
                    str(bundle),
                    "--max-new-tokens",
                    str(max_new_tokens),
                    "--prompt",
                    prompt,
                ]
                found = run_engine(engine, "caption", *options, *words, *(str(paths[i]) for i in shown))
                for i, row in zip(shown, found, strict=True):
                    _, _, tokens, text = reference.generate(pixels[i], prompt, max_new_tokens, **search)
                    out.cases += 1
                    out.written.add(tuple(tokens))
                    if (row["tokens"], row["text"]) != (tokens, text):
                        out.differences.append(f"{search} picture {i} {prompt!r}: {row['tokens']}, reference {tokens}")
    return out


def run_engine(engine: Path, *words: str) -> list[dict[str, object]]:
    """The JSON lines that a command of the engine prints."""
    done = subprocess.run([str(engine), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine} {words[0]} failed: {done.stderr.strip()}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="the Hugging Face folder that the bundle was converted from")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", type=Path, default=Path("target/release/blip2"), help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=70, help="drawn pictures (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=20, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    found = compare(args.checkpoint, args.bundle, args.engine, args.pictures, args.max_new_tokens)
    for line in found.differences:
        print(line)
    print(
        json.dumps(
            {"cases": found.cases, "equal": found.cases - len(found.differences), "distinct": len(found.written)}
        )
    )
    return int(bool(found.differences))
