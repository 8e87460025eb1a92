"""Attention heads, and the zeros behind each that operators ask for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Heads:
    """Attention heads, padded with zeros to a multiple: GroupQueryAttention takes multiples of 8, with rotary of 16."""

    n: int
    n_kv: int
    width: int
    multiple: int = 1

    @property
    def padded(self) -> int:
        return padded(self.width, self.multiple)

    def rows(self, weight: np.ndarray, n: int) -> np.ndarray:
        """A projection to `n` heads (or its bias) with zero rows behind each head."""
        return pad_groups(weight, n, self.padded)

    def packed_qkv(self, parts: list[np.ndarray]) -> np.ndarray:
        """The projections to queries, keys and values (or their biases) as one."""
        return np.concatenate(
            [self.rows(part, n) for part, n in zip(parts, (self.n, self.n_kv, self.n_kv), strict=True)]
        )

    def columns(self, weight: np.ndarray) -> np.ndarray:
        """The projection of all query heads' outputs, with zero columns where the padding is."""
        return pad_groups(weight.T, self.n, self.padded).T


def padded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def pad_groups(weight: np.ndarray, n_groups: int, width: int) -> np.ndarray:
    """Zeros behind every one of `n_groups` equal groups of rows, so that each has `width` rows."""
    groups = weight.reshape(n_groups, -1, *weight.shape[1:])
    if groups.shape[1] == width:
        return weight
    more = [(0, 0), (0, width - groups.shape[1])] + [(0, 0)] * (weight.ndim - 1)
    return np.pad(groups, more).reshape(n_groups * width, *weight.shape[1:])
