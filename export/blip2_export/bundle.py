"""Converts a checkpoint to a bundle. Everything is written aside and renamed at the end."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import Blip2Config

from blip2_export import decoder, golden, processor, qformer, vision
from blip2_export.checkpoint import Checkpoint, CheckpointError
from blip2_export.graph import OPSET, sha256

FORMAT_VERSION = 1
_ONNXRUNTIME = "1.31"


@dataclass(frozen=True)
class Choices:
    """What the caller decides; everything else comes from the checkpoint."""

    name: str
    caption_prompt: str = ""
    ask_prompt: str = "Question: {} Answer:"
    caption_tokens: int = 30
    ask_tokens: int = 10
    golden: bool = True
    force: bool = False


def convert(folder: Path, out: Path, choices: Choices) -> None:
    """Writes the bundle `out`. On any failure `out` is as it was before."""
    if choices.ask_prompt.count("{}") != 1:
        raise CheckpointError("the prompt for questions needs exactly one {} for the question")
    checkpoint = Checkpoint(folder)
    with _aside(out, choices.force) as aside:
        facts = _build(checkpoint, aside, choices)
        if choices.golden:
            print("golden: recording the reference", file=sys.stderr)
            golden.record(folder, aside, facts)
        facts["files"] = {str(p.relative_to(aside)): _file(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        (aside / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n")


def _build(checkpoint: Checkpoint, out: Path, choices: Choices) -> dict[str, Any]:
    cfg = _config(checkpoint)
    text = cfg.text_config
    image = processor.image_facts(checkpoint.folder, cfg.vision_config.image_size)
    processor.write_tokenizer(checkpoint.folder, out, text.vocab_size)
    n_positions = (cfg.vision_config.image_size // cfg.vision_config.patch_size) ** 2 + 1
    print("vision: building", file=sys.stderr)
    eye = vision.build(out, checkpoint, cfg.vision_config)
    print("qformer: building", file=sys.stderr)
    bridge = qformer.build(
        out, checkpoint, cfg.qformer_config, cfg.num_query_tokens, n_positions, text.word_embed_proj_dim
    )
    print("decoder: building", file=sys.stderr)
    mouth = decoder.build(out, checkpoint, text)
    return {
        "format_version": FORMAT_VERSION,
        "name": choices.name,
        "family": "decoder_only",
        "tasks": ["caption", "ask"],
        "image": image,
        "vision": {"n_positions": n_positions, "hidden": cfg.vision_config.hidden_size},
        "qformer": {"n_queries": cfg.num_query_tokens, "hidden": cfg.qformer_config.hidden_size},
        "language": {
            "hidden": text.word_embed_proj_dim,
            "vocab_size": text.vocab_size,
            "max_positions": text.max_position_embeddings,
            "embedding": mouth.embedding,
            "token_ids": _token_ids(cfg, checkpoint),
            "kv_cache": mouth.kv_cache,
        },
        "prompts": {"caption": choices.caption_prompt, "ask": choices.ask_prompt},
        "generation": {
            "caption": {"max_new_tokens": choices.caption_tokens},
            "ask": {"max_new_tokens": choices.ask_tokens},
        },
        "graphs": {g.name: g.describe() for g in (eye, bridge, mouth.graph)},
        "requires": {"onnxruntime": _ONNXRUNTIME, "opset": OPSET, "domains": ["", "com.microsoft"]},
        "target": "cpu",
        "made_by": {name: version(name) for name in ("onnx", "transformers", "numpy")},
        "source": {"model_type": "blip-2", "language_model_type": text.model_type},
    }


def _config(checkpoint: Checkpoint) -> Blip2Config:
    try:
        return Blip2Config(**checkpoint.config)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.folder}: config.json is not understood ({error})") from error


def _token_ids(cfg: Blip2Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """As `generate()` of the reference uses them: the language model's own, not a generation_config.json beside it."""
    text = cfg.text_config
    eos = text.eos_token_id
    if eos is None:
        raise CheckpointError(f"{checkpoint.folder}: config.json has no text_config.eos_token_id")
    image = cfg.image_token_index
    return {
        "bos": text.bos_token_id,
        "eos": eos if isinstance(eos, list) else [eos],
        "pad": text.pad_token_id,
        "image": processor.image_token(checkpoint.folder) if image is None else image,
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
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.*.part"):
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
