"""Weights of 8 bits: every row of a matrix is whole numbers from -127 to 127 times a float16 of its own, its scale.

A float32 holds every such product exactly, so what training has rounded is stored as numbers and scales without loss.
Rows go along the first axis; the other axes count as one.
"""

from __future__ import annotations

import numpy as np

_MOST = 127
_SMALLEST, _LARGEST = (np.float32(v) for v in (np.finfo(np.float16).smallest_normal, np.finfo(np.float16).max))
_BLOCK = 64  # rows looked at together; the first block tells nearly every matrix that was not rounded


def round_to_grid(array: np.ndarray) -> np.ndarray:
    """The nearest numbers times the scales that give each row's largest value the number 127; float32."""
    rows = _rows(array.astype(np.float32))
    scales = np.clip(np.abs(rows).max(1) / np.float32(_MOST), _SMALLEST, _LARGEST).astype(np.float16)
    return _product(_numbers(rows, scales), scales).reshape(array.shape)


def on_grid(array: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """int8 numbers in the array's shape and float16 scales [rows], whose products are the array bit for bit; else None."""
    if array.dtype != np.float32 or array.ndim < 2 or array.size == 0:
        return None
    rows, found = _rows(array), []
    for start in range(0, len(rows), _BLOCK):
        block = _find(rows[start : start + _BLOCK])
        if block is None:
            return None
        found.append(block)
    numbers, scales = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return numbers.reshape(array.shape), scales


def _find(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Tries every number for the largest value of a row: a slice of a matrix need not have the columns with the largest."""
    numbers, scales = np.zeros(rows.shape, np.int8), np.ones(len(rows), np.float16)
    peaks = np.abs(rows).max(1)
    left = np.flatnonzero(_bits(rows).any(1))
    for most in range(_MOST, 0, -1):
        with np.errstate(over="ignore"):
            tried = (peaks[left] / np.float32(most)).astype(np.float16)
        usable = (tried >= _SMALLEST) & (tried <= _LARGEST)
        exact = usable & (tried.astype(np.float32) * np.float32(most) == peaks[left])
        at, tried = left[exact], tried[exact]
        found = _numbers(rows[at], tried)
        same = (_bits(_product(found, tried)) == _bits(rows[at])).all(1)
        numbers[at[same]], scales[at[same]] = found[same], tried[same]
        left = np.setdiff1d(left, at[same])
        if left.size == 0:
            return numbers, scales
    return None


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def _numbers(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(rows / scales[:, None].astype(np.float32)), -_MOST, _MOST).astype(np.int8)


def _product(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32) * scales[:, None].astype(np.float32)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.int32)
