"""The `convert` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blip2_export.bundle import Choices, convert
from blip2_export.checkpoint import CheckpointError
from blip2_export.graph import UnsupportedError
from blip2_export.hub import locate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="folder with config.json, weights (safetensors or .bin), tokenizer and processor files, or an id on the "
        "Hugging Face hub such as Salesforce/blip2-opt-2.7b",
    )
    parser.add_argument("out", type=Path, help="folder of the new bundle")
    parser.add_argument("--revision", help="branch, tag or commit of the id on the hub (default: main)")
    parser.add_argument("--name", help="the bundle's name (default: the folder's)")
    parser.add_argument(
        "--caption-prompt",
        default="",
        help="text before a caption, `a photo of` for COCO-tuned checkpoints (default: none)",
    )
    parser.add_argument(
        "--ask-prompt", default="Question: {} Answer:", help="template around a question (default: %(default)s)"
    )
    parser.add_argument(
        "--caption-tokens", type=int, default=30, help="most new tokens of a caption (default %(default)s)"
    )
    parser.add_argument("--ask-tokens", type=int, default=10, help="most new tokens of an answer (default %(default)s)")
    parser.add_argument(
        "--no-golden", action="store_true", help="record no reference; `blip2 verify` then checks files and shapes only"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle, once the new one is complete")


def run(args: argparse.Namespace) -> int:
    choices = Choices(
        args.name or args.out.name,
        args.caption_prompt,
        args.ask_prompt,
        args.caption_tokens,
        args.ask_tokens,
        not args.no_golden,
        args.force,
    )
    try:
        convert(locate(args.checkpoint, args.revision), args.out, choices)
    except (CheckpointError, UnsupportedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    total = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {total / 1e6:.1f} MB", file=sys.stderr)
    return 0
