"""Converts a checkpoint to a bundle. Everything is written aside and renamed at the end."""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blip2_export.graphs import language, qformer, retrieval, vision
from blip2_export.graphs.builder import OPSET, Graph, Output, sha256
from blip2_export.graphs.cpu import CpuGraph
from blip2_export.graphs.precision import Precision, Precisions
from blip2_export.graphs.statistics import Statistics
from blip2_export.graphs.targets import TARGETS
from blip2_export.loss import tolerances
from blip2_export.loss.yardstick import Yardstick, beside, place
from blip2_export.read import adapter, configuration, lavis, leftovers, processor, tokenizers
from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.reference import golden

FORMAT_VERSION = 4
_FACTS = "bundle.json"
_ONNXRUNTIME = "1.31"
_MOST_BEAMS = 64
_BEAMS, _STAGE_1_BEAMS = 5, 3  # of the paper's evaluations (section 4) and of LAVIS' `blip2_qformer.py`


@dataclass(frozen=True)
class Choices:
    """What the caller decides; everything else comes from the checkpoint. Prompts that are None are the model's usual ones."""

    name: str
    caption_prompt: str | None = None
    ask_prompt: str | None = None
    caption_tokens: int = 30
    ask_tokens: int = 10
    beams: int | None = None  # of both tasks; None: as the papers evaluate each
    golden: bool = True
    force: bool = False
    image_size: int | None = None  # other than the checkpoint's
    parts: lavis.Parts = lavis.Parts()  # what a LAVIS file does not hold
    adapters: tuple[Path, ...] = ()  # merged in this order
    ignored_tensors: tuple[str, ...] = ()  # patterns of names that may be left out
    target: str = CpuGraph.target  # whose operators the graphs have
    precisions: Precisions = Precisions()
    weight_bits: int = 8  # of int8
    calibration: Path | None = None  # a folder of pictures; None: drawn ones
    loss: bool = True  # whether it is measured

    def check(self) -> None:
        if self.ask_prompt is not None and self.ask_prompt.count("{}") != 1:
            raise CheckpointError("the prompt for questions needs exactly one {} for the question")
        if self.caption_prompt is not None and "{}" in self.caption_prompt:
            raise CheckpointError("the prompt for captions has a {}, but there is no question to take its place")
        if any("\ud800" <= letter <= "\udfff" for text in self._texts() for letter in text):
            raise CheckpointError("the name and the prompts must be valid UTF-8")
        if self.beams is not None and not 1 <= self.beams <= _MOST_BEAMS:
            raise CheckpointError(f"{self.beams} beams: 1 (greedy search) to {_MOST_BEAMS} are possible")
        for task, n_tokens in (("caption", self.caption_tokens), ("answer", self.ask_tokens)):
            if n_tokens < 1:
                raise CheckpointError(f"a most of {n_tokens} new tokens leaves no {task}; 1 is the least")
        if self.calibration is not None:
            self._check_calibration()

    def _check_calibration(self) -> None:
        if self._chosen == {Precision.FLOAT32}:
            raise CheckpointError(
                "--calibration is for fewer bits, but all parts are float32; choose a precision besides"
            )
        if not (self.is_calibrated or self.loss):
            raise CheckpointError(
                f"--calibration: graphs for {self.target} are fitted to no pictures in these precisions, and no loss is "
                "measured on them; leave out --calibration or --no-loss"
            )

    @property
    def is_calibrated(self) -> bool:
        """Whether a part is made with what calibration saw."""
        return not self._chosen.isdisjoint(TARGETS[self.target].calibrated)

    @property
    def _chosen(self) -> set[Precision]:
        return self.precisions.chosen(TARGETS[self.target].natural)

    def _texts(self) -> list[str]:
        return [self.name, self.caption_prompt or "", self.ask_prompt or ""]


def convert(source: Path, out: Path, choices: Choices) -> None:
    """Writes the bundle `out` from a Hugging Face folder or a LAVIS file. On any failure `out` is as it was before."""
    choices.check()
    for given in (source, *choices.parts.given(), *choices.adapters):
        if out.resolve() in (given.resolve(), *given.resolve().parents):
            raise CheckpointError(f"{out}: the bundle would take the place of {given}; give another folder")
    checkpoint = open_checkpoint(source, choices.parts, choices.adapters)
    with _aside(out, choices.force) as aside, beside(aside) as other:
        exact = yardstick(checkpoint, other, choices)
        facts, _ = _build(checkpoint, aside, choices, exact.statistics() if choices.is_calibrated else None)
        leftovers.check(checkpoint, choices.ignored_tensors)
        if choices.golden:
            print("golden: recording the reference", file=sys.stderr)
            golden.record(checkpoint, aside, facts)
        if any(graph["precision"] != Precision.FLOAT32 for graph in facts["graphs"].values()):
            _save(aside, facts)
            facts |= _lost(aside, exact, choices)
        facts["files"] = {
            str(p.relative_to(aside)): _file(p) for p in sorted(aside.rglob("*")) if p.is_file() and p.name != _FACTS
        }
        _save(aside, facts)


def _save(folder: Path, facts: dict[str, Any]) -> None:
    (folder / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def yardstick(checkpoint: Checkpoint, folder: Path, choices: Choices) -> Yardstick:
    def build(into: Path) -> list[Graph]:
        plain = replace(choices, target=CpuGraph.target, precisions=Precisions())
        facts, graphs = _build(checkpoint, into, plain)
        _save(into, facts)
        return graphs

    return Yardstick(folder, build, checkpoint.processor_folder, choices.calibration)


def _lost(bundle: Path, exact: Yardstick, choices: Choices) -> dict[str, Any]:
    """The `loss` of a bundle; its goldens allow as much."""
    if choices.golden:
        tolerances.loosen(bundle, place())
    found = exact.loss(bundle) if choices.loss else None
    return {} if found is None else {"loss": found}


def open_checkpoint(source: Path, parts: lavis.Parts, adapters: tuple[Path, ...] = ()) -> Checkpoint:
    if source.is_file():
        return adapter.adapted(lavis.LavisCheckpoint(source, parts), adapters)
    if parts != lavis.Parts():
        raise CheckpointError(
            f"{source}: --vision-weights, --llm and --tokenizer go with a LAVIS file, not with a folder"
        )
    return adapter.open_folder(source, adapters)


def _build(
    checkpoint: Checkpoint, out: Path, choices: Choices, statistics: Statistics | None = None
) -> tuple[dict[str, Any], list[Graph]]:
    cfg = configuration.read(checkpoint)
    side = cfg.vision_config.image_size if choices.image_size is None else choices.image_size
    image = processor.image_facts(checkpoint.processor_folder, side, choices.image_size is not None)
    n_positions = vision.n_positions(cfg.vision_config, side)
    if checkpoint.is_retrieval:
        tokenizer = retrieval.write_tokenizer(checkpoint, out, cfg.qformer_config.vocab_size)
    else:
        processor.check_queries(checkpoint.processor_folder, cfg.num_query_tokens)
        tokenizers.write(checkpoint.tokenizer_folder, out / "tokenizer.json", cfg.text_config.vocab_size)
    print("vision: building", file=sys.stderr)
    output = Output(out, TARGETS[choices.target], weight_bits=choices.weight_bits, statistics=statistics)
    eye = vision.build(output.at(choices.precisions.vision), checkpoint, cfg.vision_config, side)
    print("qformer: building", file=sys.stderr)
    if checkpoint.is_retrieval:
        stage = retrieval.Stage1(checkpoint, cfg, tokenizer, n_positions)
        graphs, facts = retrieval.build(output.at(choices.precisions.qformer), stage)
        if stage.writes:
            facts |= _captions(checkpoint, choices)
    else:
        graphs, facts = _generation(checkpoint, cfg, n_positions, output, choices)
    _check_room(facts)
    graphs = [eye, *graphs]
    described = {
        "format_version": FORMAT_VERSION,
        "name": choices.name,
        "family": facts.pop("family"),
        "tasks": facts.pop("tasks"),
        "image": image,
        "vision": {"n_positions": n_positions, "hidden": cfg.vision_config.hidden_size},
        **facts,
        "graphs": {g.name: g.describe() for g in graphs},
        "requires": {"onnxruntime": _ONNXRUNTIME, "opset": OPSET, "domains": ["", "com.microsoft"]},
        "target": choices.target,
        "made_by": {name: version(name) for name in ("onnx", "transformers", "numpy")},
        "source": _source(checkpoint, cfg),
    }
    return described, graphs


def _generation(
    checkpoint: Checkpoint, cfg: language.Config, n_positions: int, out: Output, choices: Choices
) -> tuple[list[Graph], dict[str, Any]]:
    """The graphs behind the image encoder, and what `bundle.json` says of them."""
    text, kind = cfg.text_config, checkpoint.config["model_type"]
    shape = qformer.Shape(cfg.num_query_tokens, n_positions, language.width(text))
    bridge = qformer.build(out.at(choices.precisions.qformer), checkpoint, cfg.qformer_config, shape)
    bridge_facts: dict[str, Any] = {"n_queries": cfg.num_query_tokens, "hidden": cfg.qformer_config.hidden_size}
    if qformer.reads_text(cfg.qformer_config):
        bridge_facts["text"] = tokenizers.question_facts(
            checkpoint.tokenizer_folder, out.folder, cfg.qformer_config, kind
        )
    print(f"{text.model_type}: building", file=sys.stderr)
    mouth = language.build(language.at(out, choices.precisions.language, text), checkpoint, cfg)
    return [bridge, *mouth.graphs], {
        "family": mouth.family,
        "tasks": ["caption", "ask"],
        "qformer": bridge_facts,
        "language": mouth.facts,
        "prompts": _prompts(choices, kind, text.model_type),
        "generation": {
            "caption": {"max_new_tokens": choices.caption_tokens, "beams": choices.beams or _BEAMS},
            "ask": {
                "max_new_tokens": choices.ask_tokens,
                "beams": choices.beams or _BEAMS,
                "length_penalty": -1.0 if text.model_type == "t5" else 0.0,
            },
        },
    }


def _captions(checkpoint: Checkpoint, choices: Choices) -> dict[str, Any]:
    """How the Q-Former of stage 1 writes: behind its start token, as LAVIS' `generate()` of it."""
    if choices.caption_prompt:
        raise CheckpointError(f"{checkpoint.folder}: captions of a stage-1 checkpoint take no prompt")
    return {
        "prompts": {"caption": ""},
        "generation": {"caption": {"max_new_tokens": choices.caption_tokens, "beams": choices.beams or _STAGE_1_BEAMS}},
    }


def _check_room(facts: dict[str, Any]) -> None:
    """Whether the positions of the language model hold as many new tokens as the tasks ask for at most."""
    for task, how in facts["generation"].items():
        room = facts["language"]["max_positions"] - facts["qformer"]["n_queries"]
        if how["max_new_tokens"] >= room:
            raise CheckpointError(
                f"{how['max_new_tokens']} new tokens at most of a {task}: the language model has room for {room} behind "
                f"the queries, its prompt included; choose fewer with --{task}-tokens"
            )


def _source(checkpoint: Checkpoint, cfg: language.Config) -> dict[str, str]:
    source = {"model_type": checkpoint.config["model_type"]}
    return source if checkpoint.is_retrieval else {**source, "language_model_type": cfg.text_config.model_type}


def _prompts(choices: Choices, kind: str, language_kind: str) -> dict[str, str]:
    usual, chosen = usual_prompts(kind, language_kind), {"caption": choices.caption_prompt, "ask": choices.ask_prompt}
    return {task: prompt if chosen[task] is None else chosen[task] for task, prompt in usual.items()}


def usual_prompts(kind: str, language_kind: str) -> dict[str, str]:
    """Those that the papers evaluate this kind of model with."""
    long = kind == "blip-2" and language_kind != "t5"
    return {
        "caption": "" if kind == "blip-2" else "A short image description:",
        "ask": "Question: {} Answer:" if long else "Question: {} Short answer:",
    }


def _file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


@contextmanager
def _aside(out: Path, force: bool) -> Iterator[Path]:
    """A sibling folder that becomes `out` when all went well. Those of dead processes are removed."""
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists; give another folder or --force to replace it")
    if out.exists() and not (out.is_dir() and ((out / "bundle.json").is_file() or not any(out.iterdir()))):
        raise CheckpointError(f"{out} exists and is not a bundle; it is left alone")
    home = next(folder for folder in out.absolute().parents if folder.exists())
    if not home.is_dir():
        raise CheckpointError(f"{home}: not a folder, so that no bundle can lie in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
        if not _alive(left):
            shutil.rmtree(left, ignore_errors=True)
    aside = out.parent / f".{out.name}.{os.getpid()}.part"
    aside.mkdir()
    try:
        yield aside
        if out.exists():
            old = aside.with_suffix(".old")
            out.rename(old)
            aside.rename(out)
            shutil.rmtree(old)
        else:
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _alive(left: Path) -> bool:
    try:
        os.kill(int(left.name.split(".")[-2]), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
