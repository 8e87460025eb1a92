"""Makes the bundles of this folder: small models of every family with random weights, stored as float16.

`python tests/bundles/make.py`, with the environment of `export/`, rewrites them all.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "export"))

from blip2_export.check import random_checkpoint, random_retrieval  # noqa: E402
from blip2_export.bundle import Choices, convert  # noqa: E402

BUNDLES = {"t5": "t5", "instruct-llama": "instruct-llama", "vqa-opt": "vqa-opt", "stage1": "itg-tiny"}


def main() -> None:
    for name, shape in BUNDLES.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            writer = random_retrieval if name == "stage1" else random_checkpoint
            writer.write(checkpoint, shape, seed=5, dtype=torch.float16)
            for target in ("cpu", "webgpu"):
                of_target = name if target == "cpu" else f"{target}-{name}"
                shutil.rmtree(HERE / of_target, ignore_errors=True)
                convert(checkpoint, HERE / of_target, Choices(of_target, target=target))


if __name__ == "__main__":
    main()
