"""The `train` command."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import logging

from blip2_export.read.checkpoint import CheckpointError
from blip2_export.train import demo
from blip2_export.train.own import chain, folders, measures, options, stages, together
from blip2_export.train.own.records import Record
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stop import Stopped

_RESUMES = "A killed run goes on from its last checkpoint in --work; what is measured goes to WORK/<phase>.jsonl."
_MANY = (
    "Several processes: `torchrun --nproc-per-node N -m blip2_export train …`, or on GPUs `accelerate launch --num_processes N -m "
    "blip2_export train …`."
)
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
_BOTH = ("stage1", "stage2")


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
        options.add_chain(own.add_argument_group("what follows"))
    both = what.add_parser(
        "all",
        help="stage 1 and stage 2, one after the other",
        description="Trains both stages with the same options (`--steps` and `--epochs` are those of each, `--best-by` is for "
        "those that are measured by it) and writes OUT/stage1 and OUT/stage2; --convert makes BUNDLE/stage1 and BUNDLE/stage2 of "
        f"them. {_RESUMES} {_MANY}",
    )
    options.add(both, "stage2")
    both.add_argument("--out", type=Path, required=True, help="the folder of the two Hugging Face folders")
    options.add_chain(both.add_argument_group("what follows"))


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
        if together.is_first():
            print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from what was saved before", file=sys.stderr)
        return 130
    except (CheckpointError, ValueError, FloatingPointError) as error:
        return _refuse(error)
    except RuntimeError as error:
        if os.environ.get("BLIP2_TRACEBACK") or not together.is_lost(error):
            raise
        return _refuse("another process of this run has ended; the same command goes on from what was saved before")
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
    # Its reports are about names of tensors that are ours.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    is_all = args.what == "all"
    if args.lora and args.what in ("stage1", "all"):
        raise DataError(
            "--lora adapts the base as it is, so that it goes with stage2 or vqa; stage 1 trains the whole Q-Former, with heads "
            "that a base need not have: leave --lora out, and where memory is short take --accumulate or --checkpointing"
        )
    plans = [_plan(args, stage, stage if is_all else "") for stage in (_BOTH if is_all else (args.what,))]
    for plan in plans:
        plan.check()
    for plan in plans:
        held_out = plan.train(args)
        if plan.chain is not None and together.is_first():
            assert plan.out is not None
            setup = plan.setup
            chain.follow(plan.chain, chain.Trained(plan.stage, plan.out, held_out, setup.work, setup.prompt))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class _Plan:
    """A stage, and what follows it."""

    stage: str
    setup: stages.Setup
    out: Path | None
    chain: chain.Chain | None

    def check(self) -> None:
        """Refuses what would fail after training."""
        measures.better(self.stage, self.setup.better)
        if self.chain is not None and self.out is None:
            raise DataError("--convert makes a bundle of the folder that --out names; name one")
        if self.out is not None:
            said = self.setup
            read = (
                said.base,
                said.work,
                said.bert,
                said.qformer,
                *said.images,
                said.held_out_images,
                said.held_out,
                *(p for p, _ in said.data),
            )
            folders.check(self.out, [path for path in read if isinstance(path, Path)])
        if self.chain is not None:
            self.chain.check()

    def train(self, args: argparse.Namespace) -> list[Record]:
        if self.stage == "stage1":
            return stages.train_stage1(self.setup, self.out)
        assert self.out is not None
        if self.stage == "stage2":
            return stages.train_stage2(self.setup, self.out)
        return stages.train_questions(self.setup, self.out, args.image_size, args.questions)


def _plan(args: argparse.Namespace, stage: str, inner: str) -> _Plan:
    out = args.out / inner if args.out is not None else None
    setup = options.setup(args, stage)
    if inner and any(setup.better in measures.MORE_IS_BETTER[one] for one in _BOTH):
        # What the other stage alone is measured by leaves this one its own.
        setup = replace(setup, better=setup.better if setup.better in measures.MORE_IS_BETTER[stage] else "")
    return _Plan(stage, setup, out, options.chain(args, inner))


def _refuse(said: object) -> int:
    """One line, however long the value is that it quotes."""
    line = " ".join(str(said).split())
    print(f"error: {line if len(line) <= 600 else f'{line[:300]} … {line[-300:]}'}", file=sys.stderr)
    return 1
