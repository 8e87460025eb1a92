"""Stage 1, stage 2 and questions on own data, from the data to a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blip2_export.train.frozen import frozen
from blip2_export.train.own import batches, folders, ground, hardware, language, questions, start, watch
from blip2_export.train.own.base import Base
from blip2_export.train.own.batches import Part, Telling
from blip2_export.train.own.ground import Ground, Stage
from blip2_export.train.own.language import Language
from blip2_export.train.own.lora import Adapter, Lora, adapt
from blip2_export.train.own.pictures import Sight
from blip2_export.train.own.questions import Asking
from blip2_export.train.own.records import Record
from blip2_export.train.own.setup import Setup
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stage1 import Captions, Stage1
from blip2_export.train.own.stage2 import Stage2, Written
from blip2_export.train.stage2 import query_only


def train_stage1(setup: Setup, out: Path | None) -> list[Record]:
    """ITC + ITM + ITG around the frozen encoder; leaves `stage1.pt` in the work folder and, if wanted, a retrieval folder.

    Of every stage the records that were held out are given back.
    """
    accelerator, base = ground.opened(setup)
    here = ground.laid(setup, base, accelerator, batches.usable)
    _check_contrasts(here)
    tokenizer, first = here.first()
    start.tell_unread(setup.qformer, setup.bert)
    model = Stage1(first, tokenizer)
    hardware.held(base.vision, setup.held)
    here.save_memory(model)
    with frozen(base.vision, "image encoder"):
        eye, bad = here.eye(), here.bad("stage1")
        sight, say = here.sight(eye.shelf), batches.captioned(model.encode)

        def see(part: Part) -> Captions:
            said = part.said
            rest = (tensor.to(here.device) for tensor in (said.ids, said.mask, said.picture, said.chances))
            return Captions(eye(part), *rest)

        looks = watch.stage1(here.held_out(sight, bad), model, see, setup.samples)
        here.fit(Stage("stage1", model, here.parts(sight, say), see, looks, bad, [base.vision]), out)
    if out is not None and accelerator.is_main_process:
        folders.write_stage1(out, base, model.qformer, tokenizer)
    accelerator.wait_for_everyone()
    return here.learnt.held_out


def _check_contrasts(here: Ground) -> None:
    if len({str(record.source) for record in here.learnt.train}) < 2:
        raise DataError("stage 1 tells pictures from one another, and there is but one to learn from; add more")
    batch, n = here.setup.sizes.batch, here.setup.sizes.accumulate
    if batch == n:
        raise DataError(
            f"stage 1 tells the pictures of a part from one another, and of a batch of {batch} in {n} parts each has one; "
            "raise --batch-size, or lower --accumulate"
        )


def train_stage2(setup: Setup, out: Path) -> list[Record]:
    """The language model's loss in front of the frozen model; writes a folder, or an adapter of the base."""
    accelerator, base = ground.opened(setup)
    _check_language(setup, base, "which stage 2 needs")
    here = ground.laid(setup, base, accelerator, batches.usable)
    speaks = language.of_family(base.family, base.model.language_model, base.tokenizer())
    hardware.held(base.vision, setup.held)
    hardware.held(base.model.language_model, setup.held)
    model, adapter = _second(here, speaks)
    here.save_memory(model, base.model.language_model)
    with frozen(base.vision, "image encoder"), frozen(base.model.language_model, "language model"):
        eye, bad = here.eye(), here.bad("stage2")
        sight = here.sight(eye.shelf)
        base.model.language_model.to(here.device)
        telling = Telling(speaks, setup.prompt, splits=base.family == "t5" and not setup.prompt)

        def write(part: Part) -> Written:
            return Written(eye(part), part.said.to(here.device))

        looks = watch.stage2(here.held_out(sight, bad), telling, write, setup.samples, setup.better)
        still = [base.vision, base.model.language_model]
        parts = here.parts(sight, batches.written(telling))
        here.fit(Stage("stage2", model, parts, write, looks, bad, still, _mass), out)
    _write(here, out, model, adapter)
    return here.learnt.held_out


def _second(here: Ground, speaks: Language) -> tuple[Stage2, Adapter | None]:
    """What stage 2 trains; with LoRA that is an adapter of the base as it is."""
    setup = here.setup
    if setup.lora is None:
        _, first = here.first()
        from_stage1 = here.take_stage1(first)
        model = Stage2(query_only(first.qformer), first.query_tokens, speaks)
        if setup.qformer and not from_stage1:
            start.fill_projection(model.language_projection, start.open_qformer(setup.qformer, setup.bert))
        return model, None
    if here.base.config.qformer_config.use_qformer_text_input:
        raise DataError(f"{setup.base}: its Q-Former reads questions; --lora of stage 2 goes with one that does not")
    return _adapted(here, setup.lora, speaks)


def _adapted(here: Ground, lora: Lora, speaks: Language, embeddings: nn.Module | None = None) -> tuple[Stage2, Adapter]:
    """The base as it is, of which an adapter alone is trained. `embeddings`: of what its Q-Former reads, if it does."""
    setup, base = here.setup, here.base
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
    accelerator, base = ground.opened(setup)
    _check_language(setup, base, "which answers")
    side = _side(setup, base, side)
    here = ground.laid(setup, base, accelerator, questions.usable)
    speaks = language.of_family(base.family, base.model.language_model, base.tokenizer())
    hardware.held(base.model.language_model, setup.held)
    learns = _whole(here, speaks, side) if setup.lora is None else _beside(here, setup.lora, speaks)
    model = learns.model
    here.save_memory(model, base.model.language_model)
    with frozen(base.model.language_model, "language model") if setup.lora is None else frozen(base.model, "base"):
        sight, see = learns.sees()
        base.model.language_model.to(here.device)
        asking, bad = Asking(speaks, learns.tokenizer, n_questions), here.bad("vqa")

        def write(part: Part) -> Written:
            said = part.said.to(here.device)
            return Written(see(part), said.texts, said.ids, said.mask)

        looks = watch.vqa(here.held_out(sight, bad), asking, write, setup.samples)
        still = [base.vision, base.model.language_model]
        parts = here.parts(sight, questions.asked(asking))
        here.fit(Stage("vqa", model, parts, write, looks, bad, still, _mass), out)
    _write(here, out, model, learns.adapter, learns.tokenizer)
    return here.learnt.held_out


@dataclass(frozen=True)
class _Learns:
    """A model that learns to answer, and what it reads questions with. `sees`: how pictures are seen, and what it takes of them."""

    model: Stage2
    tokenizer: Any
    sees: Callable[[], tuple[Sight, Callable[[Part], Tensor]]]
    adapter: Adapter | None = None


def _whole(here: Ground, speaks: Language, side: int) -> _Learns:
    """Image encoder and Q-Former."""
    tokenizer, first = here.first()
    if not here.take_stage1(first):
        start.tell_unread(here.setup.qformer, here.setup.bert)
    model = questions.model(here.base, first, side, speaks)
    return _Learns(model, tokenizer, lambda: (here.sight(side=side), lambda part: part.pixels.to(here.device)))


def _beside(here: Ground, lora: Lora, speaks: Language) -> _Learns:
    """An adapter of the base, which stays as it is."""
    tokenizer, embeddings = questions.reads(here.base)
    hardware.held(here.base.vision, here.setup.held)
    model, adapter = _adapted(here, lora, speaks, embeddings)

    def sees() -> tuple[Sight, Callable[[Part], Tensor]]:
        eye = here.eye()
        return here.sight(eye.shelf), eye

    return _Learns(model, tokenizer, sees, adapter)


def _side(setup: Setup, base: Base, side: int) -> int:
    """Of the pictures that are asked about."""
    if setup.lora is not None:
        own = int(base.config.vision_config.image_size)
        if side not in (0, own):
            raise DataError(f"--lora adapts the base as it is, for pictures of {own} pixels; leave --image-size out")
        return own
    side = side or questions.SIDE
    questions.check_side(base, side)
    if setup.features is not None:
        raise DataError("--cache-features with questions goes with --lora; without that the image encoder is trained")
    return side


def _check_language(setup: Setup, base: Base, needed: str) -> None:
    if not base.has_language:
        raise DataError(f"{setup.base}: it has no language model, {needed}")
    hardware.check_language(setup.precision, base.family)


def _mass(part: Part) -> Tensor:
    """Of texts: their tokens, by weight."""
    mass: Tensor = part.said.mass
    return mass


def _write(here: Ground, out: Path, model: Stage2, adapter: Adapter | None, tokenizer: Any = None) -> None:
    """A folder, or an adapter of the base. `tokenizer`: of questions."""
    if here.accelerator.is_main_process:
        if adapter is not None:
            folders.write_adapter(out, here.base, adapter)
        else:
            folders.write_stage2(out, here.base, model, tokenizer)
    here.accelerator.wait_for_everyone()


__all__ = ["Setup", "train_questions", "train_stage1", "train_stage2"]
