"""The `train` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from blip2_export.train import demo, pairs
from blip2_export.train.images import CaptionedImages, DataError
from blip2_export.train.loop import Phase, Schedule

_RESUMES = "A killed run goes on from its last checkpoint in --work; losses are logged to WORK/<phase>.jsonl."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    chain = what.add_parser(
        "demo",
        help="a demo from nothing: ViT, language model, stage 1, stage 2, questions",
        description="Trains every phase that is not finished and writes a Hugging Face folder to --out. Demos in the same "
        f"--work share the phases that they have in common. {_RESUMES}",
    )
    _add_demo(chain)
    first = what.add_parser(
        "stage1",
        help="stage 1 on image-caption pairs: ITC, ITM and ITG, ViT frozen",
        description=f"Trains a Q-Former around the ViT of --base. {_RESUMES}",
    )
    second = what.add_parser(
        "stage2",
        help="stage 2 on image-caption pairs: LM loss, ViT and language model frozen",
        description=f"Goes on from stage 1 in the same --work and writes a Hugging Face folder to --out. {_RESUMES}",
    )
    second.add_argument("--out", type=Path, required=True, help="the Hugging Face folder to write")
    second.add_argument("--prompt", default="", help="text before every caption, such as `a photo of` (default: none)")
    for stage, steps in ((first, 250_000), (second, 80_000)):
        _add_pairs(stage, steps)
    for command in (chain, first, second):
        command.add_argument("--work", type=Path, required=True, help="folder for checkpoints, logs and tokenizers")
        command.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage",
        choices=("stage1", "stage2", "vqa"),
        default="stage2",
        help="the last stage: stage1 for matching and retrieval, stage2 for captions and questions, vqa for a Q-Former "
        "that reads the question (default %(default)s)",
    )
    parser.add_argument(
        "--llm", choices=("opt", "t5"), default="opt", help="the language model's family (default %(default)s)"
    )
    parser.add_argument(
        "--without-stage1",
        action="store_true",
        help="start stage 2 from a new Q-Former, to see what stage 1 is worth; only with --stage stage2",
    )
    parser.add_argument("--out", type=Path, required=True, help="the Hugging Face folder to write")
    parser.add_argument("--tiny", action="store_true", help="three steps a phase: tries the chain, learns nothing")


def _add_pairs(parser: argparse.ArgumentParser, steps: int) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="COCO captions file, a list of {image, caption} rows, or a folder with annotations.json or captions.json",
    )
    parser.add_argument("--images", type=Path, help="folder that picture names start from (default: beside the file)")
    parser.add_argument(
        "--base", type=Path, required=True, help="BLIP-2 OPT folder that gives ViT, language model and dimensions"
    )
    parser.add_argument("--bert", type=Path, help="BERT folder that the Q-Former starts from (default: from nothing)")
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s, as in the paper")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak, after warm-up (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=2000, help="steps of linear warm-up (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        if args.what == "demo":
            if args.without_stage1 and args.stage != "stage2":
                raise ValueError("--without-stage1 is for --stage stage2 only")
            plan = demo.TINY if args.tiny else demo.Plan()
            demo.train(demo.Demo(args.work, plan, args.stage, args.llm, args.without_stage1), args.out)
        else:
            _run_stage(args)
    except (DataError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run_stage(args: argparse.Namespace) -> None:
    data = CaptionedImages(args.data, args.images)
    phase = Phase(args.what, args.work, Schedule(args.steps, args.learning_rate, warmup=args.warmup))
    setup = pairs.Setup(data, args.base, args.work, args.bert, args.batch_size, getattr(args, "prompt", ""))
    if args.what == "stage1":
        pairs.train_stage1(setup, phase)
    else:
        pairs.train_stage2(setup, phase, args.out)
