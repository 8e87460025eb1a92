"""The engine on processors that this machine is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_engine import ENGINE, ROOT

from blip2_export.check import emulation
from blip2_export.graphs.builder import Output
from blip2_export.graphs.cpu import CpuGraph
from blip2_export.graphs.precision import Precision

_STEP = 1 / 127  # of an activation, of its row's largest


def saturating(folder: Path) -> None:
    """A bundle whose image features are products of magnitudes of pixels with weights of two values, the largest of 8 bits.

    Its reference is computed in whole numbers. The kernels of processors without VNNI add such products in too few bits.
    """
    shutil.copytree(ROOT / "tests" / "bundles" / "stage1", folder)
    facts = json.loads((folder / "bundle.json").read_text())
    (pixels,), (features,) = facts["graphs"]["vision"]["inputs"], facts["graphs"]["vision"]["outputs"]
    n_in, n_out = np.prod(pixels["shape"][1:]), np.prod(features["shape"][1:])
    weight = np.random.default_rng(0).choice(np.float32([-127, 127]), (n_out, n_in))
    graph = Output(folder, CpuGraph, Precision.INT8).graph("vision")
    seen = graph.op("Abs", [graph.input(pixels["name"], pixels["dtype"], pixels["shape"])])
    rows = graph.op("Reshape", [seen, graph.constant([0, 1, -1])])
    product = graph.op("Reshape", [graph.times(rows, weight), graph.constant([0, *features["shape"][1:]])])
    graph.output(product, features["name"], features["dtype"], features["shape"])
    graph.save()
    for case in json.loads((folder / "golden" / "golden.json").read_text())["cases"]:
        row = np.abs(np.fromfile(folder / case["pixels"]["file"], np.float32))
        numbers = np.rint(row / row.max() / np.float32(_STEP)).astype(np.int64)
        exact = weight.astype(np.int64) @ numbers * (_STEP * float(row.max()))
        exact.astype(np.float32).tofile(folder / case["features"]["file"])
    for name, said in facts["files"].items():
        content = (folder / name).read_bytes()
        said |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "bundle.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("processor", ["this", "avx2"])
def test_sums_of_8_bit_products_are_exact(tmp_path: Path, processor: str) -> None:
    emulator = [] if processor == "this" else emulation.avx2()
    if emulator is None:
        pytest.skip(emulation.MISSING)
    saturating(tmp_path / "bundle")
    command = [*emulator, str(ENGINE), "verify", str(tmp_path / "bundle"), "--provider", "cpu", "--threads", "1"]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    found = [float(line.split()[5].rstrip(",")) for line in said.stdout.splitlines() if " features: " in line]
    assert len(found) == 3, said.stdout + said.stderr
    assert max(found) < 1e-6
