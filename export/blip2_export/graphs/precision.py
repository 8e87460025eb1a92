"""The precisions that graphs can have, and which part of the model has which."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    """Of weights and of what is multiplied with them."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"  # weights by output channel, activations by row
    INT8_BLOCKS = "int8-blocks"  # both by blocks of a row
    INT4_BLOCKS = "int4-blocks"  # weights; activations as above


FLOATS = (Precision.FLOAT32, Precision.FLOAT16, Precision.BFLOAT16)


@dataclass(frozen=True)
class Precisions:
    """Of the three parts of a model; None is what is natural for the target."""

    vision: Precision | None = None
    qformer: Precision | None = None
    language: Precision | None = None

    def chosen(self, natural: Precision) -> set[Precision]:
        """Those of the parts, on a target whose natural one this is."""
        return {precision or natural for precision in (self.vision, self.qformer, self.language)}


EXACT = Precisions(*[Precision.FLOAT32] * 3)
