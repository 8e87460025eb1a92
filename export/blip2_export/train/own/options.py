"""What a person types, with what holds otherwise and where that comes from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blip2_export.read.hub import locate
from blip2_export.read.lavis import Parts
from blip2_export.train.own import measures
from blip2_export.train.own.bad import FEW
from blip2_export.train.own.batches import Sizes
from blip2_export.train.own.chain import Chain
from blip2_export.train.own.length import Length
from blip2_export.train.own.loop import Schedule
from blip2_export.train.own.lora import Lora
from blip2_export.train.own.questions import SIDE
from blip2_export.train.own.setup import Setup
from blip2_export.train.own.sources import DataError


@dataclass(frozen=True)
class Usual:
    """What holds unless it is typed, and `…_of`, where it comes from."""

    epochs: float
    epochs_of: str
    batch: int
    batch_of: str
    rate: float
    least_rate: float
    rate_of: str
    warmup: int
    betas: tuple[float, float]


# LAVIS: lavis/projects/blip2/train/pretrain_stage{1,2}.yaml and caption_coco_ft.yaml.
_OF_LAVIS = "LAVIS' for pre-training"
USUAL = {
    "stage1": Usual(
        *(10, _OF_LAVIS),
        *(64, "our choice; 100 on each GPU in LAVIS, 1,680 in all in the paper"),
        *(1e-4, 1e-5, "section 3.4 of the paper, and the end of LAVIS' pretrain_stage1.yaml"),
        *(2000, (0.9, 0.98)),
    ),
    "stage2": Usual(
        *(10, _OF_LAVIS),
        *(64, "as on each GPU in LAVIS; 1,920 with OPT and 1,520 with Flan-T5 in the paper"),
        *(1e-4, 5e-5, "section 3.4 of the paper"),
        *(2000, (0.9, 0.98)),
    ),
    "vqa": Usual(
        *(5, "the paper's, in its appendix"),
        *(16, "our choice; 128 in the paper"),
        *(1e-5, 0.0, "the paper's appendix, and the end of LAVIS' caption_coco_ft.yaml"),
        *(1000, (0.9, 0.999)),
    ),
}

_WRITTEN = {
    "stage2": f". For cider (CIDEr-D) and bleu4 (BLEU-4) each measurement writes captions of {measures.FEW_WRITTEN} held-out "
    "pictures at most, greedily; that takes up to 30 times as long as their losses, for the text so far is read anew for every word"
}


def add(parser: argparse.ArgumentParser, stage: str) -> None:
    """The options of a stage."""
    _add_data(parser.add_argument_group("data"), stage)
    _add_models(parser.add_argument_group("what is trained"), stage)
    _add_lavis(parser.add_argument_group("what a LAVIS file leaves out, if --base is one"))
    _add_length(parser.add_argument_group("how long and how fast"), USUAL[stage])
    _add_machine(parser.add_argument_group("hardware"), stage)
    _add_looking(parser.add_argument_group("looking on"), stage)


def setup(args: argparse.Namespace, stage: str) -> Setup:
    """What was typed, for a stage; one sentence if it cannot be meant."""
    _check(args)
    usual = USUAL[stage]
    return Setup(
        data=[weighted(said) for said in args.data],
        base=locate(str(args.base)),
        work=args.work,
        images=tuple(args.images),
        held_out_images=args.held_out_images,
        held_out=share_or_path(args.held_out),
        bert=args.bert,
        qformer=locate(str(args.qformer)) if args.qformer else None,
        n_queries=args.queries,
        prompt=getattr(args, "prompt", ""),
        schedule=_schedule(args, usual),
        sizes=Sizes(args.batch_size, args.accumulate),
        precision=args.precision,
        seed=args.seed,
        workers=args.workers,
        measure_every=args.measure_every or 0,
        patience=args.patience,
        better=args.best_by,
        write=args.write,
        samples=args.samples,
        sample_every=args.sample_every,
        tensorboard=args.tensorboard,
        answers=tuple(getattr(args, "answers", ())),
        held_out_answers=getattr(args, "held_out_answers", None),
        length=Length(args.steps, args.epochs or usual.epochs, args.warmup, usual.warmup),
        parts=Parts(args.vision_weights, args.llm, args.tokenizer),
        lora=Lora.parsed(args.lora) if args.lora else None,
        frozen_float32=args.frozen_float32,
        checkpointing=args.checkpointing,
        features=args.cache_features,
        features_type=args.cache_type,
        features_most=args.cache_most,
        augment=args.augment,
        bad_share=args.bad_pictures,
    )


def _schedule(args: argparse.Namespace, usual: Usual) -> Schedule:
    """Of one step: how many there are is known once the data is."""
    rate = usual.rate if args.learning_rate is None else args.learning_rate
    least = min(usual.least_rate, rate) if args.least_rate is None else args.least_rate
    return Schedule(1, rate, floor=least / rate, weight_decay=args.weight_decay, betas=usual.betas)


def chain(args: argparse.Namespace, inner: str = "") -> Chain | None:
    """What follows, of a stage that has a folder of its own or not."""
    return Chain(args.convert / inner, args.engine, args.evaluate_on, args.force) if args.convert else None


def weighted(said: str) -> tuple[Path, float]:
    """`PATH` or `PATH=WEIGHT`; a path that is there is never cut."""
    path, equals, weight = said.rpartition("=")
    if not equals or Path(said).exists():
        return Path(said), 1.0
    try:
        number = float(weight)
    except ValueError:
        return Path(said), 1.0
    if not 0 < number < float("inf"):
        raise DataError(f"--data {said}: a weight is a number above 0")
    return Path(path), number


def share_or_path(said: str) -> float | Path:
    """A share from 0 up to 1, or the path of a set."""
    try:
        share = float(said)
    except ValueError:
        return Path(said)
    if not 0 <= share < 1:
        raise DataError(f"--held-out {said}: a share is at least 0 and less than 1")
    return share


def _check(args: argparse.Namespace) -> None:
    least = {
        "steps": 1,
        "batch_size": 1,
        "accumulate": 1,
        "workers": 0,
        "measure_every": 1,
        "patience": 0,
        "warmup": 0,
        "samples": 0,
        "sample_every": 0,
    }
    more = {"queries": 1, "questions": 1, "threads": 0, "evaluate_on": 1}
    for name, number in (least | more).items():
        typed = getattr(args, name, None)
        if typed is not None and typed < number:
            raise DataError(f"--{name.replace('_', '-')} {typed}: {number} is the least")
    for name in ("learning_rate", "epochs"):
        typed = getattr(args, name)
        if typed is not None and not 0 < typed < float("inf"):
            raise DataError(f"--{name.replace('_', '-')} {typed}: it must be a number above 0")
    if args.least_rate is not None and not 0 <= args.least_rate <= (args.learning_rate or args.least_rate):
        raise DataError(f"--least-rate {args.least_rate}: it must be from 0 to --learning-rate")
    if not 0 <= args.bad_pictures <= 1:
        raise DataError(f"--bad-pictures {args.bad_pictures}: it is a share, from 0 to 1")
    if not args.cache_most > 0:
        raise DataError(f"--cache-most {args.cache_most}: it must be a number above 0")
    if not 0 <= args.weight_decay < float("inf"):
        raise DataError(f"--weight-decay {args.weight_decay}: it must be 0 or more")
    if args.bert is not None and not args.bert.is_dir():
        raise DataError(f"--bert {args.bert}: there is no such folder")


def _add_data(group: argparse._ArgumentGroup, stage: str) -> None:
    rows = "questions and answers" if stage == "vqa" else "captions"
    group.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="PATH[=WEIGHT]",
        help=f"a set of pictures with {rows}; repeated for several, which take turns by their weights (default weight: 1). "
        + _FORMS["vqa" if stage == "vqa" else "captions"],
    )
    _add_images(group)
    group.add_argument(
        "--held-out",
        default="0.02",
        metavar="SHARE|PATH",
        help="share of the pictures that is not learnt but measured on, chosen by name, so that it stays the same as data is "
        "added; or a set of its own (default: %(default)s, our choice). A picture of it that is in --data as well is not "
        "learnt, be it the same file or one that was saved anew",
    )
    group.add_argument(
        "--bad-pictures",
        type=float,
        default=0.05,
        metavar="SHARE",
        help=f"share of the pictures that may be such that cannot be read, and {FEW} in any case; others take their places "
        "(default: %(default)s, our choice)",
    )
    group.add_argument(
        "--augment",
        action="store_true",
        help="show half of the pictures or more of each, at a new place each time, and half of them mirrored, as the paper does; "
        "where captions say left and right, do not",
    )
    if stage == "vqa":
        _add_answers(group)


def _add_images(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--images",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="folder that names of pictures start from (default: that of the file); repeated, one for each --data",
    )
    group.add_argument(
        "--held-out-images",
        type=Path,
        metavar="FOLDER",
        help="folder of the pictures of a --held-out set (default: --images, if that is one)",
    )


def _add_answers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--answers",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="VQAv2's annotations, one for each --data",
    )
    group.add_argument("--held-out-answers", type=Path, metavar="FILE", help="VQAv2's annotations of --held-out")


_FORMS = {
    "captions": "COCO captions, Karpathy's JSON, JSON Lines or CSV rows of a picture and its captions, Flickr30k's .token file, a "
    "folder with one of these or with a text file beside each picture, or WebDataset shards (`a-{000..099}.tar`)",
    "vqa": "VQAv2's questions with --answers, or JSON, JSON Lines or CSV rows of `image`, `question` and `answer` (or `answers`, a "
    "list that counts by its shares, as LAVIS weighs the answers of VQAv2)",
}


def _add_models(group: argparse._ArgumentGroup, stage: str) -> None:
    what = {
        "stage1": "image encoder and sizes",
        "stage2": "image encoder and language model",
        "vqa": "all that stage 2 left",
    }
    own = "--base, if that reads questions already, " if stage == "vqa" else "--base itself, another, "
    group.add_argument(
        "--base",
        type=Path,
        required=True,
        help=f"checkpoint that gives {what[stage]}: a Hugging Face folder with OPT or Flan-T5, an id on the hub, or "
        "what else `convert` takes",
    )
    group.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints, logs and the Q-Former's tokenizer"
    )
    group.add_argument(
        "--bert",
        type=Path,
        help="BERT folder that the Q-Former starts from, bert-base-uncased in the paper (default: from nothing)",
    )
    group.add_argument(
        "--qformer",
        type=Path,
        help=(
            "checkpoint that gives what reads the question"
            if stage == "vqa"
            else "checkpoint whose Q-Former it starts from"
        )
        + f": {own}what stage 1 left as a folder (--out of stage1), or a LAVIS file of stage 1 (with --bert for its tokenizer)"
        + ("" if stage == "stage1" else "; stage 1 in the same --work comes first"),
    )
    group.add_argument("--queries", type=int, metavar="N", help="query tokens (default: the base's, 32 in the paper)")
    _add_lora(group, stage)
    if stage == "stage2":
        _add_written(group)
    if stage == "vqa":
        _add_asked(group)


def _add_lora(group: argparse._ArgumentGroup, stage: str) -> None:
    said = (
        "train an adapter of --base alone, in its language model, its Q-Former or both, and write that to --out; `convert` "
        "and `peft` put it on the base (rank 16, alpha twice the rank, dropout 0.05, as in peft's example for BLIP-2)"
    )
    # Stage 1 knows it so that somebody who tries it is told why not.
    shown = argparse.SUPPRESS if stage == "stage1" else said
    group.add_argument("--lora", metavar="language|qformer|both[:RANK]", help=shown)


def _add_written(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        default="",
        help="text that the language model reads before every caption, such as `a photo of` (default: none; then Flan-T5 reads "
        "the beginning of the caption and writes the rest, as in the paper)",
    )


def _add_asked(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="N",
        help=f"side of the pictures (default: {SIDE}, paper's appendix; the base's with --lora)",
    )
    group.add_argument(
        "--questions",
        type=int,
        default=4,
        metavar="N",
        help="questions of a picture in a step, at most (default: %(default)s)",
    )


def _add_lavis(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--vision-weights", type=Path, metavar="FILE", help="its image encoder, as for `convert`")
    group.add_argument("--llm", type=Path, metavar="FOLDER", help="the OPT or Flan-T5 model of a stage-2 file")
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="bert-base-uncased for a stage-1 file, else the language model's",
    )


def _add_length(group: argparse._ArgumentGroup, usual: Usual) -> None:
    group.add_argument("--steps", type=int, metavar="N", help="steps of the run (default: as --epochs says)")
    group.add_argument(
        "--epochs",
        type=float,
        metavar="X",
        help=f"times through the pictures, each with one of its captions (default: {usual.epochs:g}, {usual.epochs_of}; the paper "
        "takes 250,000 and 80,000 steps for 129 million pictures)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=usual.batch,
        metavar="N",
        help=f"pictures of a step, of all processes and parts together (default: %(default)s, {usual.batch_of})",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="parts that a step is computed in, one after another, for less memory; stage 1 contrasts within a part then "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--learning-rate", type=float, metavar="X", help=f"after the warm-up (default: {usual.rate:g}, {usual.rate_of})"
    )
    group.add_argument(
        "--least-rate", type=float, metavar="X", help=f"where its cosine ends (default: {usual.least_rate:g})"
    )
    group.add_argument(
        "--warmup",
        type=int,
        metavar="N",
        help=f"steps in which the rate rises (default: {usual.warmup}, as in the paper, but a tenth of the run at most)",
    )
    group.add_argument(
        "--weight-decay", type=float, default=0.05, metavar="X", help="of AdamW (default: %(default)s, paper)"
    )


def _add_machine(group: argparse._ArgumentGroup, stage: str) -> None:
    group.add_argument(
        "--precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="`bf16` or `fp16` (with scaled losses) for products; trained weights stay float32, frozen ones are held in 16 bits "
        "(default: no, all is float32; LAVIS takes fp16, and bf16 for Flan-T5, which overflows fp16)",
    )
    group.add_argument(
        "--frozen-float32",
        action="store_true",
        help="hold frozen weights in float32 all the same, for twice the memory; products are the same, tables more exact",
    )
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute activations twice instead of keeping them: the same losses, less memory, about a third more time",
    )
    _add_cache(group, stage)
    group.add_argument("--seed", type=int, default=0, help="of order, noise and first weights (default: %(default)s)")
    group.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that read pictures (default: %(default)s)"
    )
    group.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: PyTorch's choice)")


def _add_cache(group: argparse._ArgumentGroup, stage: str) -> None:
    also = " (frozen with --lora alone)" if stage == "vqa" else ""
    group.add_argument(
        "--cache-features",
        type=Path,
        metavar="FOLDER",
        help="keep what the frozen image encoder says of each picture, for all runs around the same encoder"
        + f"{also}; not with --augment",
    )
    group.add_argument(
        "--cache-type",
        choices=("float16", "float32"),
        default="float16",
        help="how: float16 is half as large (0.7 MB a picture of ViT-g at 224 pixels), float32 gives the same losses as none "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--cache-most",
        type=float,
        default=100.0,
        metavar="GIB",
        help="the most that it may take (default: %(default)g)",
    )


def _add_looking(group: argparse._ArgumentGroup, stage: str) -> None:
    known = ", ".join(measures.MORE_IS_BETTER[stage])
    group.add_argument(
        "--measure-every",
        type=int,
        metavar="N",
        help="steps between measurements on what is held out, which also tell what to keep as the best (default: a tenth of the "
        "run, or an epoch if that is less, but at least a fiftieth of the run, our choice: a set of any size has enough to choose "
        "from, and little time goes into it)",
    )
    group.add_argument(
        "--best-by",
        default="",
        metavar="MEASURE",
        help=f"what tells the best checkpoint: {known} (default: {measures.USUAL[stage]})" + _WRITTEN.get(stage, ""),
    )
    group.add_argument(
        "--patience",
        type=int,
        default=0,
        metavar="N",
        help="measurements without a better one after which the run ends (default: 0, never)",
    )
    group.add_argument(
        "--write",
        choices=("best", "last"),
        default="best",
        help="the weights that --out has at the end; the last where nothing is held out (default: %(default)s)",
    )
    _add_shown(group)


def _add_shown(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--samples",
        type=int,
        default=4,
        metavar="N",
        help="pictures that are held out whose captions or answers are logged (default: %(default)s)",
    )
    group.add_argument(
        "--sample-every", type=int, default=0, metavar="N", help="steps between them (default: with each measurement)"
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write event files to WORK/tensorboard, beside WORK/PHASE.jsonl and the page WORK/PHASE.html",
    )


def add_chain(group: argparse._ArgumentGroup) -> None:
    """The options of what follows training."""
    group.add_argument(
        "--convert",
        type=Path,
        metavar="BUNDLE",
        help="make a bundle of --out, verify it and evaluate it on what is held out: recall and matching, captions, answers; "
        "both need the engine, without it the bundle alone is made",
    )
    group.add_argument(
        "--engine",
        type=Path,
        metavar="FILE",
        help="the blip2 binary (default: $BLIP2_ENGINE, target/release/blip2, or PATH's)",
    )
    group.add_argument(
        "--evaluate-on",
        type=int,
        default=500,
        metavar="N",
        help="pictures that it is evaluated on, at most (default: %(default)s)",
    )
    group.add_argument("--force", action="store_true", help="replace an existing BUNDLE, once the new one is complete")


__all__: Sequence[str] = ("SIDE", "USUAL", "add", "add_chain", "chain", "setup", "share_or_path", "weighted")
