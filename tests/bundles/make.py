"""Makes the bundles of this folder: small models of every family with random weights, stored as float16.

`python tests/bundles/make.py`, with the environment of `export/`, rewrites them all, or those that are named.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "export"))

from blip2_export.check import random_checkpoint, random_retrieval  # noqa: E402
from blip2_export.bundle import Choices, convert  # noqa: E402
from blip2_export.graphs.precision import Precision, Precisions  # noqa: E402

SHAPES = {"t5": "t5", "instruct-llama": "instruct-llama", "vqa-opt": "vqa-opt", "stage1": "itg-tiny"}
INT8 = Precision.INT8
KINDS = {
    "": Choices(""),
    "webgpu-": Choices("", target="webgpu"),
    "int8-": Choices("", precisions=Precisions(INT8, INT8, INT8)),
}
ALL = [kind + name for kind in KINDS for name in SHAPES if (kind, name) != ("int8-", "instruct-llama")]


def main(wanted: list[str]) -> None:
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            writer = random_retrieval if name == "stage1" else random_checkpoint
            writer.write(checkpoint, shape, seed=5, dtype=torch.float16)
            for kind, choices in KINDS.items():
                if (bundle := kind + name) in wanted:
                    shutil.rmtree(HERE / bundle, ignore_errors=True)
                    convert(checkpoint, HERE / bundle, replace(choices, name=bundle))


if __name__ == "__main__":
    main(sys.argv[1:] or ALL)
