"""The `convert` command."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from blip2_export.bundle import Choices, convert
from blip2_export.graphs.builder import UnsupportedError
from blip2_export.graphs.precision import Precision, Precisions
from blip2_export.graphs.targets import TARGETS
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.read.hub import locate
from blip2_export.read.lavis import Parts

_LINE = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="folder with config.json, weights (safetensors or .bin), tokenizer and processor files, an id on the "
        "Hugging Face hub such as Salesforce/blip2-opt-2.7b, or a .pth file of LAVIS",
    )
    parser.add_argument("out", type=Path, help="folder of the new bundle")
    parser.add_argument("--revision", help="branch, tag or commit of the id on the hub (default: main)")
    parser.add_argument("--name", help="the bundle's name (default: the folder's)")
    _add_texts(parser)
    parser.add_argument(
        "--no-golden", action="store_true", help="record no reference; `blip2 verify` then checks files and shapes only"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="pictures of N×N pixels instead of the checkpoint's size; position embeddings are interpolated",
    )
    _add_weights(parser)
    _add_lavis(parser.add_argument_group("what a LAVIS file leaves out"))
    parser.add_argument(
        "--target",
        choices=sorted(TARGETS),
        default="cpu",
        help="whose operators the graphs have: `webgpu` is for GPUs of any maker, `tensorrt` for its engines of what looks "
        "at pictures, with the language model on CUDA (default: %(default)s)",
    )
    _add_precisions(parser.add_argument_group("precision of each part"))
    parser.add_argument("--force", action="store_true", help="replace an existing bundle, once the new one is complete")


def run(args: argparse.Namespace) -> int:
    try:
        _convert(args)
    except (CheckpointError, UnsupportedError) as error:
        return _refuse(error)
    except Exception as error:
        if os.environ.get("BLIP2_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.strerror:
            return _refuse(f"{error.filename or args.out}: {error.strerror}")
        return _refuse(
            f"{args.checkpoint}: {type(error).__name__} ({error}); BLIP2_TRACEBACK=1 shows where it comes from"
        )
    total = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {total / 1e6:.1f} MB", file=sys.stderr)
    return 0


def _add_texts(parser: argparse.ArgumentParser) -> None:
    """What captions and answers are unless the engine is told otherwise."""
    parser.add_argument(
        "--caption-prompt",
        help="text before a caption, `a photo of` for COCO-tuned checkpoints (default: none; "
        "`A short image description:` for InstructBLIP)",
    )
    parser.add_argument(
        "--ask-prompt",
        help="template around a question (default: `Question: {} Answer:`, with `Short answer:` for Flan-T5 and InstructBLIP)",
    )
    parser.add_argument(
        "--caption-tokens", type=int, default=30, help="most new tokens of a caption (default %(default)s)"
    )
    parser.add_argument("--ask-tokens", type=int, default=10, help="most new tokens of an answer (default %(default)s)")
    parser.add_argument(
        "--beams",
        type=int,
        metavar="N",
        help="beams of captions and answers, 1 for greedy search (default: 5, and 3 for captions of stage 1)",
    )


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-tensors",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors of such names (`*` stands for anything) may be left out; otherwise one without a place is an error",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER",
        help="LoRA adapter of peft to merge, a folder or an id on the hub; repeated, one after another. One that lies beside "
        "the weights is merged in any case",
    )


def _add_precisions(parts: argparse._ArgumentGroup) -> None:
    names = [str(precision) for precision in Precision]
    parts.add_argument(
        "--precision",
        choices=names,
        metavar="NAME",
        help=f"of every part: {', '.join(names)} (default: float32, which is exact; for cuda and tensorrt float16, but "
        "bfloat16 for Flan-T5, which overflows float16)",
    )
    for part, what in (("vision", "image encoder"), ("qformer", "Q-Former"), ("language", "language model")):
        parts.add_argument(f"--{part}", choices=names, metavar="NAME", help=f"of the {what}")
    parts.add_argument(
        "--weight-bits",
        type=int,
        choices=(7, 8),
        default=8,
        help="of int8 weights; 7 are faster on x86 processors without VNNI (AVX2) and less exact (default: %(default)s)",
    )
    parts.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="pictures, and texts in its captions.txt (`NAME: text`) or in a .txt file beside each, that fewer bits are fitted to; "
        "every fourth is kept for measuring the loss (default: drawn scenes)",
    )
    parts.add_argument(
        "--no-loss", action="store_true", help="measure no loss against float32, which is built for that"
    )


def _precisions(args: argparse.Namespace) -> Precisions:
    chosen = (name or args.precision for name in (args.vision, args.qformer, args.language))
    return Precisions(*(Precision(name) if name else None for name in chosen))


def _add_lavis(parts: argparse._ArgumentGroup) -> None:
    parts.add_argument(
        "--vision-weights",
        type=Path,
        metavar="FILE",
        help="its image encoder: eva_vit_g.pth, clip_vit_L.pth, another LAVIS file that holds one, or a BLIP-2 folder",
    )
    parts.add_argument("--llm", type=Path, metavar="FOLDER", help="the OPT or Flan-T5 model of a stage-2 file")
    parts.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="bert-base-uncased for a stage-1 file; for a stage-2 file the language model's, if not in its folder",
    )


def _convert(args: argparse.Namespace) -> None:
    choices = Choices(
        args.name or args.out.name,
        args.caption_prompt,
        args.ask_prompt,
        args.caption_tokens,
        args.ask_tokens,
        args.beams,
        not args.no_golden,
        args.force,
        args.image_size,
        Parts(args.vision_weights, args.llm, args.tokenizer),
        ignored_tensors=tuple(args.ignore_tensors),
        target=args.target,
        precisions=_precisions(args),
        weight_bits=args.weight_bits,
        calibration=args.calibration,
        loss=not args.no_loss,
    )
    choices = replace(choices, adapters=tuple(locate(adapter) for adapter in args.adapter))
    convert(locate(args.checkpoint, args.revision), args.out, choices)


def _refuse(said: object) -> int:
    """One line, however long the value is that it quotes."""
    line = " ".join(str(said).split())
    line = line if len(line) <= _LINE else f"{line[: _LINE // 2]} … {line[-_LINE // 2 :]}"
    print(f"error: {line}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    return 3
