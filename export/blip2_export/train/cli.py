"""The `train` command."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from blip2_export.read.checkpoint import CheckpointError
from blip2_export.train import demo
from blip2_export.train.own import folders, options, stages
from blip2_export.train.own.stop import Stopped

_RESUMES = "A killed run goes on from its last checkpoint in --work; what is measured goes to WORK/<phase>.jsonl."
_MANY = "Several processes: start it with `accelerate launch -m blip2_export train …` or `torchrun -m`."
_STAGES = {
    "stage1": (
        "pictures with captions: ITC, ITM and ITG, image encoder frozen",
        "Trains a Q-Former around the image encoder of --base.",
    ),
    "stage2": (
        "pictures with captions: language modelling behind the queries, image encoder and language model frozen",
        "Goes on from stage 1 in the same --work, or from --qformer.",
    ),
    "vqa": (
        "questions and answers: the Q-Former reads the question, image encoder and Q-Former trained, language model frozen",
        "Goes on from --base, what stage 2 left; what reads the question comes from stage 1 in the same --work, or from --qformer.",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    chain = what.add_parser(
        "demo",
        help="a demo from nothing: ViT, language model, stage 1, stage 2, questions",
        description="Trains every phase that is not finished and writes a Hugging Face folder to --out. Demos in the same "
        f"--work share the phases that they have in common. {_RESUMES}",
    )
    _add_demo(chain)
    for stage, (summary, does) in _STAGES.items():
        own = what.add_parser(stage, help=summary, description=f"{does} {_RESUMES} {_MANY}")
        options.add(own, stage)
        own.add_argument(
            "--out",
            type=Path,
            required=stage != "stage1",
            help="the Hugging Face folder to write"
            + (" (default: none, stage 2 needs none)" if stage == "stage1" else ""),
        )


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
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, logs and tokenizers")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")


def run(args: argparse.Namespace) -> int:
    try:
        if args.threads > 0:
            torch.set_num_threads(args.threads)
        (_run_demo if args.what == "demo" else _run_own)(args)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from what was saved before", file=sys.stderr)
        return 130
    except (CheckpointError, ValueError, FloatingPointError) as error:
        return _refuse(error)
    except OSError as error:
        if os.environ.get("BLIP2_TRACEBACK") or not error.strerror:
            raise
        return _refuse(f"{error.filename or args.work}: {error.strerror}; what was saved before is as it was")
    return 0


def _run_demo(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    if args.without_stage1 and args.stage != "stage2":
        raise ValueError("--without-stage1 is for --stage stage2 only")
    plan = demo.TINY if args.tiny else demo.Plan()
    demo.train(demo.Demo(args.work, plan, args.stage, args.llm, args.without_stage1), args.out)


def _run_own(args: argparse.Namespace) -> None:
    setup = options.setup(args, args.what)
    if args.out is not None:
        read = [setup.base, setup.work, setup.bert, setup.qformer, setup.images, setup.held_out]
        folders.check(args.out, [path for path in (*read, *(p for p, _ in setup.data)) if isinstance(path, Path)])
    if args.what == "stage1":
        stages.train_stage1(setup, args.out)
    elif args.what == "stage2":
        stages.train_stage2(setup, args.out)
    else:
        stages.train_questions(setup, args.out, args.image_size, args.questions)


def _refuse(said: object) -> int:
    """One line, however long the value is that it quotes."""
    line = " ".join(str(said).split())
    print(f"error: {line if len(line) <= 600 else f'{line[:300]} … {line[-300:]}'}", file=sys.stderr)
    return 1
