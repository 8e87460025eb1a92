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

IN_BLOCKS = {"text_config": {"model_type": "t5", "d_model": 128, "d_ff": 256, "num_layers": 4}}
SHAPES = {
    "t5": "t5",
    "instruct-llama": "instruct-llama",
    "vqa-opt": "vqa-opt",
    "stage1": "itg-tiny",
    "t5-in-blocks": IN_BLOCKS,
}
INT8, INT4 = Precision.INT8, Precision.INT4_BLOCKS
KINDS = {
    "": Choices(""),
    "webgpu-": Choices("", target="webgpu"),
    "int8-": Choices("", precisions=Precisions(INT8, INT8, INT8)),
    "int4-": Choices("", precisions=Precisions(INT8, INT8, INT4), golden=False, loss=False),
}
PLAIN = [name for name in SHAPES if name != "t5-in-blocks"]
ALL = [*PLAIN, *(f"webgpu-{name}" for name in PLAIN), "int8-t5", "int8-vqa-opt", "int8-stage1", "int4-t5-in-blocks"]


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
