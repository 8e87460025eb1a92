"""Stage 1, stage 2 and questions on own data, from the data to a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from blip2_export.read.lavis import Parts
from blip2_export.train.frozen import frozen
from blip2_export.train.own import (
    batches,
    estimate,
    folders,
    hardware,
    language,
    length,
    loop,
    machine,
    measures,
    pictures,
    questions,
    start,
    together,
    watch,
)
from blip2_export.train.own.bad import Bad
from blip2_export.train.own.base import Base, open_base
from blip2_export.train.own.batches import Batches, Part, Sizes
from blip2_export.train.own.features import Eye, Shelf
from blip2_export.train.own.held_out import HeldOut
from blip2_export.train.own.length import Length
from blip2_export.train.own.loop import Fit, Run, Schedule, Task
from blip2_export.train.own.lora import Adapter, Lora, adapt
from blip2_export.train.own.pictures import Sight
from blip2_export.train.own.records import Record
from blip2_export.train.own.sets import Learnt, Usable
from blip2_export.train.own.sets import learnt as learnt_of
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stage1 import Captions, Stage1
from blip2_export.train.own.stage2 import Stage2, Written
from blip2_export.train.stage2 import query_only

_MEASURED_TOGETHER = 128  # pictures at most
_LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Setup:
    """What a person says of a run. `data`: sets, each with its weight; `held_out`: a share of them, or a set of its own.

    `measure_every`: steps between measurements, 0 for as the run is long.

    `better`: the measure that tells the best checkpoint, by default that of the phase; `write`: `best` or `last`, the weights that
    are written. `samples`: pictures whose captions or answers are shown, every `sample_every` steps or else with each measurement.

    `images`: folder of the pictures of all sets, or one for each. `answers`, `held_out_answers`: the annotations of VQAv2's
    questions, for each set. `length`: gives `schedule` its steps once the
    data is known. `parts`: what a LAVIS file leaves out. `frozen_float32`: frozen weights stay float32 whatever the precision is;
    otherwise they are held in what they are computed in. `checkpointing`: activations are computed twice instead of kept.

    `features`: folder that features of the frozen encoder are kept in, as `features_type`, of at most `features_most` GiB.
    `augment`: pictures are cropped and mirrored. `bad_share`: of the pictures, how many may be such that cannot be read.
    """

    data: list[tuple[Path, float]]
    base: Path
    work: Path
    images: tuple[Path, ...] = ()
    held_out: float | Path = 0.02
    held_out_images: Path | None = None
    bert: Path | None = None
    qformer: Path | None = None
    n_queries: int | None = None
    prompt: str = ""
    schedule: Schedule = field(default_factory=lambda: Schedule(1000))
    sizes: Sizes = field(default_factory=lambda: Sizes(64))
    precision: str = "no"
    seed: int = 0
    workers: int = 2
    measure_every: int = 0
    patience: int = 0
    better: str = ""
    write: str = "best"
    samples: int = 4
    sample_every: int = 0
    tensorboard: bool = False
    answers: tuple[Path, ...] = ()
    held_out_answers: Path | None = None
    length: Length | None = None
    parts: Parts = field(default_factory=Parts)
    lora: Lora | None = None
    frozen_float32: bool = False
    checkpointing: bool = False
    features: Path | None = None
    features_type: str = "float16"
    features_most: float = 100.0
    augment: bool = False
    bad_share: float = 0.05

    @property
    def held(self) -> str:
        """The precision that frozen weights are held in."""
        return "no" if self.frozen_float32 else self.precision


@dataclass(frozen=True)
class _Stage:
    """What `model` is trained on. `read`: a part as the model takes it; `still`: models beside it that do not change."""

    name: str
    model: nn.Module
    parts: Callable[[int], list[Part]]
    read: Callable[[Part], Any]
    looks: watch.Watch
    bad: Bad
    still: list[nn.Module]
    mass: Callable[[Part], Tensor] = lambda _: torch.ones(())

    def task(self, better: str) -> Task:
        """`better`: the measure that tells the best checkpoint."""

        def losses(trained: nn.Module, part: Part) -> dict[str, Tensor]:
            return trained(self.read(part))

        looks, by = self.looks, measures.better(self.name, better)
        shown = (looks.sample, looks.thumbnails)
        return Task(self.model, self.parts, losses, looks.measure, by, *shown, self.bad.note, self.mass)


def _mass(part: Part) -> Tensor:
    """Of texts: their tokens, by weight."""
    return part.said.mass


def train_stage1(setup: Setup, out: Path | None) -> list[Record]:
    """ITC + ITM + ITG around the frozen encoder; leaves `stage1.pt` in the work folder and, if wanted, a retrieval folder.

    Of every stage the records that were held out are given back.
    """
    accelerator = _accelerator(setup)
    base, learnt = open_base(setup.base, setup.parts), _learnt(setup, batches.usable, accelerator)
    _check_contrasts(setup, learnt)
    setup = _planned(setup, learnt)
    tokenizer, first = _first(setup, base, learnt, accelerator)
    start.tell_unread(setup.qformer, setup.bert)
    model = Stage1(first, tokenizer)
    hardware.held(base.vision, setup.held)
    _save_memory(setup, model)
    with frozen(base.vision, "image encoder"):
        shelf = _shelf(setup, base, learnt)
        make = _batches(setup, base, learnt, shelf)
        say = batches.captioned(model.encode)
        eye = Eye(base.vision, accelerator.device, shelf)

        def see(part: Part) -> Captions:
            return _captions(eye, part)

        bad = _bad(setup, learnt, "stage1")
        looks = watch.stage1(_held_out(setup, base, learnt, bad, shelf=shelf), model, see, setup.samples)
        stage = _Stage("stage1", model, lambda step: make.parts(step, say), see, looks, bad, [base.vision])
        _fit(setup, stage, accelerator, out)
    if out is not None and accelerator.is_main_process:
        folders.write_stage1(out, base, model.qformer, tokenizer)
    accelerator.wait_for_everyone()
    return learnt.held_out


def train_stage2(setup: Setup, out: Path) -> list[Record]:
    """The language model's loss in front of the frozen model; writes a folder, or an adapter of the base."""
    accelerator, base = _accelerator(setup), open_base(setup.base, setup.parts)
    if not base.has_language:
        raise DataError(f"{setup.base}: it has no language model, which stage 2 needs")
    hardware.check_language(setup.precision, base.family)
    learnt = _learnt(setup, batches.usable, accelerator)
    setup = _planned(setup, learnt)
    speaks = language.of_family(base.family, base.model.language_model, base.tokenizer())
    hardware.held(base.vision, setup.held)
    hardware.held(base.model.language_model, setup.held)
    model, adapter = _second(setup, base, learnt, accelerator, speaks)
    _save_memory(setup, model, base.model.language_model)
    with frozen(base.vision, "image encoder"), frozen(base.model.language_model, "language model"):
        shelf = _shelf(setup, base, learnt)
        make = _batches(setup, base, learnt, shelf)
        splits = base.family == "t5" and not setup.prompt
        say = batches.written(speaks, setup.prompt, splits)
        eye = Eye(base.vision, accelerator.device, shelf)
        _placed(base.model.language_model, accelerator)

        def write(part: Part) -> Written:
            return Written(eye(part), part.said.to(accelerator.device))

        bad = _bad(setup, learnt, "stage2")
        held_out, looked = _held_out(setup, base, learnt, bad, shelf=shelf), (setup.samples, setup.better)
        looks = watch.stage2(held_out, speaks, setup.prompt, splits, write, *looked)
        still = [base.vision, base.model.language_model]
        stage = _Stage("stage2", model, lambda step: make.parts(step, say), write, looks, bad, still, _mass)
        _fit(setup, stage, accelerator, out)
    if accelerator.is_main_process and adapter is not None:
        folders.write_adapter(out, base, adapter)
    elif accelerator.is_main_process:
        folders.write_stage2(out, base, model)
    accelerator.wait_for_everyone()
    return learnt.held_out


def _second(
    setup: Setup, base: Base, learnt: Learnt, accelerator: Accelerator, speaks: language.Language
) -> tuple[Stage2, Adapter | None]:
    """What stage 2 trains; with LoRA that is an adapter of the base as it is."""
    if setup.lora is None:
        _, first = _first(setup, base, learnt, accelerator)
        from_stage1 = _take_stage1(first, setup)
        model = Stage2(query_only(first.qformer), first.query_tokens, speaks)
        if setup.qformer and not from_stage1:
            start.fill_projection(model.language_projection, start.open_qformer(setup.qformer, setup.bert))
        return model, None
    if base.config.qformer_config.use_qformer_text_input:
        raise DataError(f"{setup.base}: its Q-Former reads questions; --lora of stage 2 goes with one that does not")
    return _adapted(setup, base, setup.lora, speaks)


def _adapted(
    setup: Setup, base: Base, lora: Lora, speaks: language.Language, embeddings: nn.Module | None = None
) -> tuple[Stage2, Adapter]:
    """The base as it is, of which an adapter alone is trained. `embeddings`: of what its Q-Former reads, if it does."""
    if setup.qformer or setup.bert or setup.n_queries:
        raise DataError("--lora adapts the base as it is; leave --qformer, --bert and --queries out")
    model = Stage2(base.model.qformer, base.model.query_tokens, speaks)
    model.language_projection.load_state_dict(base.model.language_projection.state_dict())
    model.embeddings = embeddings
    adapter = adapt(lora, base.model.language_model, model.qformer, base.family, setup.seed)
    model.adapt(adapter)
    return model, adapter


def train_questions(setup: Setup, out: Path, side: int = 0, n_questions: int = 4) -> list[Record]:
    """Image encoder and Q-Former learn to answer, at `side` × `side`, or the usual size; with LoRA an adapter of the base does.

    What the Q-Former reads texts with is that of stage 1 in the work folder, or of --qformer; with LoRA the base's own.
    """
    if setup.lora is not None:
        return _adapt_questions(setup, setup.lora, out, side, n_questions)
    accelerator, base, side = _accelerator(setup), open_base(setup.base, setup.parts), side or questions.SIDE
    _check_answers(setup, base)
    questions.check_side(base, side)
    if setup.features is not None:
        raise DataError("--cache-features with questions goes with --lora; without that the image encoder is trained")
    learnt = _learnt(setup, questions.usable, accelerator)
    setup = _planned(setup, learnt)
    tokenizer, first = _first(setup, base, learnt, accelerator)
    if not _take_stage1(first, setup):
        start.tell_unread(setup.qformer, setup.bert)
    speaks = language.of_family(base.family, base.model.language_model, base.tokenizer())
    model = questions.model(base, first, side, speaks)
    hardware.held(base.model.language_model, setup.held)
    _save_memory(setup, model, base.model.language_model)
    with frozen(base.model.language_model, "language model"):
        make = _batches(setup, base, learnt, side=side)
        say = questions.asked(speaks, tokenizer, n_questions)
        _placed(base.model.language_model, accelerator)

        def write(part: Part) -> Written:
            said = part.said.to(accelerator.device)
            return Written(part.pixels.to(accelerator.device), said.texts, said.ids, said.mask)

        bad = _bad(setup, learnt, "vqa")
        held_out = _held_out(setup, base, learnt, bad, side)
        looks = watch.vqa(held_out, speaks, tokenizer, n_questions, write, setup.samples)
        still = [base.vision, base.model.language_model]
        stage = _Stage("vqa", model, lambda step: make.parts(step, say), write, looks, bad, still, _mass)
        _fit(setup, stage, accelerator, out)
    if accelerator.is_main_process:
        folders.write_stage2(out, base, model, tokenizer)
    accelerator.wait_for_everyone()
    return learnt.held_out


def _learnt(setup: Setup, usable: Usable, accelerator: Accelerator) -> Learnt:
    """The first process unpacks shards and looks for copies; then the others find that done."""
    with accelerator.main_process_first():
        return learnt_of(setup, usable)


def _check_contrasts(setup: Setup, learnt: Learnt) -> None:
    if len({str(record.source) for record in learnt.train}) < 2:
        raise DataError("stage 1 tells pictures from one another, and there is but one to learn from; add more")
    batch, n = setup.sizes.batch, setup.sizes.accumulate
    if batch == n:
        raise DataError(
            f"stage 1 tells the pictures of a part from one another, and of a batch of {batch} in {n} parts each has one; "
            "raise --batch-size, or lower --accumulate"
        )


def _adapt_questions(setup: Setup, lora: Lora, out: Path, side: int, n_questions: int) -> list[Record]:
    """An adapter of the base learns to answer; the base stays as it is, and so does the size of its pictures."""
    accelerator, base = _accelerator(setup), open_base(setup.base, setup.parts)
    _check_answers(setup, base)
    own = base.config.vision_config.image_size
    if side and side != own:
        raise DataError(f"--lora adapts the base as it is, for pictures of {own} pixels; leave --image-size out")
    learnt = _learnt(setup, questions.usable, accelerator)
    setup = _planned(setup, learnt)
    speaks = language.of_family(base.family, base.model.language_model, base.tokenizer())
    tokenizer, embeddings = questions.reads(base)
    hardware.held(base.vision, setup.held)
    hardware.held(base.model.language_model, setup.held)
    model, adapter = _adapted(setup, base, lora, speaks, embeddings)
    _save_memory(setup, model, base.model.language_model)
    with frozen(base.model, "base"):
        shelf = _shelf(setup, base, learnt)
        make = _batches(setup, base, learnt, shelf)
        say = questions.asked(speaks, tokenizer, n_questions)
        eye = Eye(base.vision, accelerator.device, shelf)
        _placed(base.model.language_model, accelerator)

        def write(part: Part) -> Written:
            said = part.said.to(accelerator.device)
            return Written(eye(part), said.texts, said.ids, said.mask)

        bad = _bad(setup, learnt, "vqa")
        held_out = _held_out(setup, base, learnt, bad, shelf=shelf)
        looks = watch.vqa(held_out, speaks, tokenizer, n_questions, write, setup.samples)
        still = [base.vision, base.model.language_model]
        stage = _Stage("vqa", model, lambda step: make.parts(step, say), write, looks, bad, still, _mass)
        _fit(setup, stage, accelerator, out)
    if accelerator.is_main_process:
        folders.write_adapter(out, base, adapter)
    accelerator.wait_for_everyone()
    return learnt.held_out


def _check_answers(setup: Setup, base: Base) -> None:
    """Whether anything of the base can answer."""
    if not base.has_language:
        raise DataError(f"{setup.base}: it has no language model, which answers")
    hardware.check_language(setup.precision, base.family)


def _accelerator(setup: Setup) -> Accelerator:
    if setup.precision not in hardware.PRECISIONS:
        raise DataError(f"the precision `{setup.precision}` is none of {', '.join(hardware.PRECISIONS)}")
    # 16-bit arithmetic is `hardware`'s: the one of `accelerate` refuses fp16 on a CPU.
    # One process converts and evaluates for as long as that takes; the others wait.
    wait = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
    # Unless it is told, `accelerate` lets processes of a CPU that `torchrun` started learn each by itself.
    cpu = not torch.accelerator.is_available()
    return Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[wait])


def _save_memory(setup: Setup, *modules: nn.Module) -> None:
    if setup.checkpointing:
        hardware.recomputed(*modules)


def _run(setup: Setup, name: str, accelerator: Accelerator) -> Run:
    facts = {
        "base": str(setup.base),
        "data": [[str(path), weight] for path, weight in setup.data],
        "held_out": str(setup.held_out),
        "start": [str(setup.bert), str(setup.qformer), setup.n_queries],
        "prompt": setup.prompt,
        "batch": setup.sizes.batch,
        "seed": setup.seed,
        "accumulate": setup.sizes.accumulate,
        "precision": [setup.precision, setup.held],
        "pictures": ["augmented" if setup.augment else "whole", setup.features_type if _rounds(setup) else "float32"],
        "lora": asdict(setup.lora) if setup.lora else None,
        "better": measures.better(name, setup.better)[0],
        **{key: value for key, value in asdict(setup.schedule).items() if key != "betas"},
    }
    more = {
        "log_every": max(1, min(50, setup.schedule.steps // 100)),
        "measure_every": setup.measure_every,
        "patience": setup.patience,
        "measures_first": True,
        "workers": setup.workers,
        "precision": setup.precision,
        "sample_every": setup.sample_every,
        "pictures": setup.sizes.batch,
        "tensorboard": setup.tensorboard,
        "machine": machine.facts(accelerator.device),
    }
    return Run(name, setup.work, setup.schedule, setup.seed, setup.sizes.accumulate, facts=facts, **more)


def _rounds(setup: Setup) -> bool:
    """Whether features that are kept are others than those that are not."""
    return setup.features is not None and setup.features_type != "float32"


def _bad(setup: Setup, learnt: Learnt, name: str) -> Bad:
    n_pictures = len(learnt.train) + len(learnt.held_out)
    return Bad(setup.work / f"{name}_bad_pictures.jsonl", n_pictures, setup.bad_share)


def _planned(setup: Setup, learnt: Learnt) -> Setup:
    """With the steps that its length takes on this data, and how often of them it is measured."""
    setup.sizes.check()
    n_records, batch, schedule = len(learnt.order), setup.sizes.batch, setup.schedule
    if setup.length is not None:
        schedule = setup.length.schedule(schedule, n_records, batch)
    every = setup.measure_every or length.measure_every(schedule.steps, n_records, batch)
    return replace(setup, schedule=schedule, measure_every=every)


def _first(setup: Setup, base: Base, learnt: Learnt, accelerator: Accelerator) -> tuple[Any, Any]:
    """The Q-Former's tokenizer, and the Q-Former as it starts."""
    setup.work.mkdir(parents=True, exist_ok=True)
    given = start.open_qformer(setup.qformer, setup.bert) if setup.qformer else None
    begins = start.Start(setup.bert, given, setup.n_queries)
    with accelerator.main_process_first():
        tokenizer = start.tokenizer(setup.work, begins, _texts(learnt))
    return tokenizer, start.qformer(base, begins, len(tokenizer))


def _texts(learnt: Learnt) -> Iterator[str]:
    """What the Q-Former will read."""
    for record in learnt.train:
        yield from record.captions
        yield from (question.text for question in record.questions)


def _take_stage1(first: nn.Module, setup: Setup) -> bool:
    """Whether there was one in the work folder."""
    file = setup.work / "stage1.pt"
    best = setup.work / "stage1_best.pt"
    if setup.write == "best" and file.exists() and best.exists():
        file = best
    if not file.exists():
        if setup.qformer is None:
            raise DataError(f"{file} is missing; run `train stage1` with the same --work first, or name --qformer")
        return False
    found = loop.read(file)
    kept = {name.removeprefix("qformer."): value for name, value in found["model"].items()}
    loop.fill(dict(first.named_parameters()), kept, file)
    if together.is_first():
        print(
            f"the Q-Former is that of {file}, step {found['step']} of {json.loads(found['facts'])['steps']}",
            file=sys.stderr,
        )
    return True


def _batches(setup: Setup, base: Base, learnt: Learnt, shelf: Shelf | None = None, side: int | None = None) -> Batches:
    look = base.look(side or base.config.vision_config.image_size)
    return Batches(learnt.order, Sight(look, setup.augment, shelf), setup.sizes, setup.seed)


def _shelf(setup: Setup, base: Base, learnt: Learnt) -> Shelf | None:
    """Where features are kept, if they are."""
    if setup.features is None:
        return None
    if setup.augment:
        raise DataError("--cache-features goes with pictures that stay as they are; leave it or --augment out")
    look = base.look(base.config.vision_config.image_size)
    shelf = Shelf(setup.features, base.vision, look, setup.precision, setup.features_type)
    shelf.begin(len(learnt.train) + len(learnt.held_out), setup.features_most)
    return shelf


def _held_out(
    setup: Setup, base: Base, learnt: Learnt, bad: Bad, side: int | None = None, shelf: Shelf | None = None
) -> HeldOut:
    look = base.look(side or base.config.vision_config.image_size)
    # The same, however many processes there are.
    size = min(setup.sizes.batch // setup.sizes.accumulate, _MEASURED_TOGETHER)
    return HeldOut(learnt.held_out, Sight(look, memory=shelf), size, setup.seed, bad.tell)


def _tell(run: Run, stage: _Stage, out: Path | None, accelerator: Accelerator) -> None:
    """What training takes, and how often it is measured; refuses where the disk is too small."""
    told = estimate.of(stage.model, *stage.still)
    if accelerator.is_main_process:
        estimate.check_disk(run.work, run.name, told, out)
        often = (
            f"; it is measured every {run.measure_every} of {run.schedule.steps} steps" if stage.looks.measure else ""
        )
        print(f"{run.name}: {told}{often}", file=sys.stderr)


def _fit(setup: Setup, stage: _Stage, accelerator: Accelerator, out: Path | None) -> None:
    """Trains, and leaves the weights in the model that are to be written."""
    if setup.write not in ("best", "last"):
        raise DataError(f"--write {setup.write}: it is best or last")
    run = _run(setup, stage.name, accelerator)
    _tell(run, stage, out, accelerator)
    fit = Fit(run, stage.task(setup.better), accelerator)
    fit.go()
    if accelerator.is_main_process:
        stage.bad.end()
    said = fit.take(setup.write == "best")
    if accelerator.is_main_process:
        print(said, file=sys.stderr)


def _placed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    return model.to(accelerator.device)


def _captions(eye: Eye, part: Part) -> Captions:
    said = part.said
    rest = (tensor.to(eye.device) for tensor in (said.ids, said.mask, said.picture, said.chances))
    return Captions(eye(part), *rest)


__all__ = ["Learnt", "Setup", "pictures", "train_stage1", "train_stage2"]
