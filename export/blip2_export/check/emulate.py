"""The `emulate` command: bundles in every recipe for processors, verified on one that this machine is not."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from blip2_export.bundle import Choices, convert
from blip2_export.check import emulation, random_checkpoint, random_retrieval
from blip2_export.graphs.cpu import CpuGraph
from blip2_export.graphs.precision import Precision, Precisions

_ROOT = Path(__file__).parents[3]
_WIDE = {"hidden_size": 128, "intermediate_size": 128}  # whole blocks of every recipe
_SHAPE: dict[str, Any] = {"vision_config": _WIDE, "qformer_config": _WIDE}
_BLOCK = 32
_LANGUAGES = {
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 128},
    "t5": {"model_type": "t5", "d_model": 128, "d_kv": 32, "d_ff": 128},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("processor", choices=sorted(_PROCESSORS), help="`avx2` has no VNNI")
    parser.add_argument("bundles", type=Path, nargs="*", help="default: those of models/ and tests/, and one a recipe")
    parser.add_argument(
        "--engine", type=Path, help="default: target/release/blip2, or the one that tests/arm64.sh builds"
    )
    parser.add_argument(
        "--work", type=Path, default=_ROOT / "target" / "emulated", metavar="DIR", help="holds the recipes"
    )


def run(args: argparse.Namespace) -> int:
    emulator, engine = _PROCESSORS[args.processor]
    command = emulator()
    if command is None:
        print(f"skipped: {emulation.MISSING}")
        return 0
    failed = 0
    for bundle in args.bundles or chain(_shipped(), _recipes(args.work)):
        start = time.monotonic()
        typed = [*command, str(args.engine or engine), "verify", str(bundle), "--provider", "cpu", "--threads", "1"]
        done = subprocess.run(typed, capture_output=True, encoding="utf-8", check=False)
        failed += done.returncode != 0
        print(f"{'WRONG' if done.returncode else 'ok   '} {bundle}, {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr, flush=True)
    return 4 if failed else 0


def _shipped() -> Iterator[Path]:
    for facts in sorted([*_ROOT.glob("models/*/bundle.json"), *_ROOT.glob("tests/bundles/*/bundle.json")]):
        if json.loads(facts.read_text())["target"] == CpuGraph.target:
            yield facts.parent


def _recipes(work: Path) -> Iterator[Path]:
    """Random models of every kind in every precision, made when they are asked for."""
    shutil.rmtree(work, ignore_errors=True)
    for family, language in [*_LANGUAGES.items(), ("stage1", None)]:
        checkpoint = work / family
        if language:
            random_checkpoint.write(checkpoint, {**_SHAPE, "text_config": language}, seed=0)
        else:
            random_retrieval.write(checkpoint, _SHAPE, seed=4)
        _round(checkpoint)
        for precision, n_bits in _precisions():
            bundle = work / f"{family}-{precision}-{n_bits}"
            choices = Choices(bundle.name, precisions=Precisions(*[precision] * 3), weight_bits=n_bits)
            convert(checkpoint, bundle, choices)
            yield bundle


def _round(checkpoint: Path) -> None:
    """As 4-bit blocks round weights, which then lose nothing more: of random ones too little is left to tell right from wrong."""
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if weight.ndim == 2 and weight.shape[1] % _BLOCK == 0:
                rows = weight.reshape(len(weight), -1, _BLOCK)
                scales = rows.abs().amax(-1, keepdim=True) / 7
                tensors[name] = ((rows / scales).round() * scales).reshape(weight.shape)
        save_file(tensors, file, metadata={"format": "pt"})


def _precisions() -> Iterator[tuple[Precision, int]]:
    for precision in CpuGraph.precisions:
        yield from ((precision, n_bits) for n_bits in ((7, 8) if precision is Precision.INT8 else (8,)))


_PROCESSORS = {
    "avx2": (emulation.avx2, _ROOT / "target" / "release" / "blip2"),
    "arm64": (emulation.arm64, _ROOT / "target" / "arm64" / "bin" / "blip2"),
}
