"""Event files as TensorBoard reads them: records of TFRecord (length, its CRC, data, CRC of the data) that hold `Event` messages.

Written here, for the package that has a writer brings a server with it. Field numbers are those of tensorflow's `event.proto`,
`summary.proto` and `tensor.proto`.
"""

from __future__ import annotations

import math
import os
import struct
import time
from pathlib import Path
from typing import Any

from blip2_export.train.own.log import Row
from blip2_export.train.own.sources import DataError

_CASTAGNOLI = 0x82F63B78
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5
_STRINGS = 7  # DT_STRING
_LARGEST = 3.4028234e38  # of float32


class Board:
    """One file for a run, begun anew with all that its log has, so that nothing is doubled after a kill."""

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        self.file = folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = [file for file in folder.glob("events.out.tfevents.*") if file != self.file]
            self.file.write_bytes(_record(_event(0, time.time(), _field(3, b"brain.Event:2"))))
            for file in before:
                file.unlink()
        except OSError as error:
            self.file.unlink(missing_ok=True)
            raise DataError(f"{folder}: no event file can be written there ({error})") from error
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Numbers of steps and of measurements as scalars, samples as text."""
        values = b"".join(_field(1, value) for value in _values(row))
        if not values:
            return
        try:
            with self.file.open("ab") as opened:
                opened.write(_record(_event(row["step"], row.get("at", 0.0), _field(5, values))))
        except OSError as error:
            raise DataError(f"{self.file}: it cannot be written ({error})") from error


def _values(row: Row) -> list[bytes]:
    if "held_out" in row:
        return [_scalar(f"held_out/{key}", value) for key, value in row["held_out"].items() if _is_number(value)]
    if "samples" in row:
        return [_text(f"samples/{n}", f"{one['picture']}: {one['said']}") for n, one in enumerate(row["samples"])]
    if "rate" not in row:
        return []
    numbers = {key: value for key, value in row.items() if key not in ("step", "steps", "at") and _is_number(value)}
    return [_scalar(f"train/{key}", value) for key, value in numbers.items()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _event(step: int, at: float, what: bytes) -> bytes:
    return _tag(1, _DOUBLE) + struct.pack("<d", at) + _tag(2, _VARINT) + _varint(step) + what


def _scalar(name: str, value: float) -> bytes:
    value = value if abs(value) <= _LARGEST else math.copysign(math.inf, value)
    return _field(1, name.encode()) + _tag(2, _FLOAT) + struct.pack("<f", value)


def _text(name: str, text: str) -> bytes:
    plugin = _field(1, _field(1, b"text"))
    shape = _field(2, _field(2, _tag(1, _VARINT) + _varint(1)))
    tensor = _tag(1, _VARINT) + _varint(_STRINGS) + shape + _field(8, text.encode())
    return _field(1, name.encode()) + _field(8, tensor) + _field(9, plugin)


def _field(number: int, content: bytes) -> bytes:
    return _tag(number, _BYTES) + _varint(len(content)) + content


def _tag(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _masked(length) + content + _masked(content)


def _masked(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(content: bytes) -> int:
    """CRC-32 with Castagnoli's polynomial, reflected."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ _CASTAGNOLI * (byte & 1)
    return byte


_TABLE = [_entry(byte) for byte in range(256)]
