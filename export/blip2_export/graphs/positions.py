"""Learned position embeddings of a square grid of patches, for another grid."""

from __future__ import annotations

import numpy as np

_A = -0.75  # PyTorch's cubic kernel (Keys 1981, with this free parameter)


def resize(table: np.ndarray, n_out: int, align_corners: bool) -> np.ndarray:
    """[1, 1 + n², width] → [1, 1 + n_out², width] in float32: the class token's row is kept, the grid is interpolated.

    Bicubic with the border repeated, as `torch.nn.functional.interpolate`.
    """
    width = table.shape[2]
    n_in = round((table.shape[1] - 1) ** 0.5)
    grid = table[0, 1:].reshape(n_in, n_in, width).astype(np.float64)
    weights = _weights(n_in, n_out, align_corners)
    grid = np.einsum("yi,xj,ijw->yxw", weights, weights, grid, optimize=True)
    return np.concatenate([table[:, :1], grid.reshape(1, -1, width)], axis=1).astype(np.float32)


def _weights(n_in: int, n_out: int, align_corners: bool) -> np.ndarray:
    """[n_out, n_in]: what each input position gives to each output position."""
    at = np.arange(n_out)
    source = at * ((n_in - 1) / max(n_out - 1, 1)) if align_corners else (at + 0.5) * (n_in / n_out) - 0.5
    first = np.floor(source).astype(np.int64)
    weights = np.zeros((n_out, n_in))
    for offset in (-1, 0, 1, 2):
        near = np.clip(first + offset, 0, n_in - 1)
        np.add.at(weights, (at, near), _cubic(np.abs(source - first - offset)))
    return weights


def _cubic(distance: np.ndarray) -> np.ndarray:
    inner = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    outer = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    return np.where(distance <= 1, inner, outer)
