"""What calibration saw of the values that weights are multiplied with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Channels(NamedTuple):
    """Of every channel (last axis) of a value, over all calibration data: the largest magnitude and the mean one; float32."""

    largest: np.ndarray
    mean: np.ndarray


Statistics = dict[str, list[Channels]]  # of each graph by its name, in the order of `Graph.linear_inputs`
