"""Texts as files have them, and which of them can be learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blip2_export.train.own.captions import LONGEST, clean
from blip2_export.train.own.sources import DataError

_BYTES = 8 << 30


def of_file(file: Path) -> str:
    """A whole file of UTF-8, with or without a mark at its start, or of UTF-16 with one; every line ends with `\\n`."""
    try:
        if not file.is_file() or file.stat().st_size > _BYTES:
            raise DataError(f"{file}: it is no file that can be read at once")
        return decoded(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: it cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: it is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); "
            "convert it, for example with `iconv -f latin1 -t utf-8`"
        ) from error


def decoded(data: bytes) -> str:
    """A `UnicodeDecodeError` if it is neither."""
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if marked else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def lines(text: str) -> list[str]:
    """Cut at line feeds alone: JSON and captions may hold other separators of Unicode."""
    return text.split("\n")


def parsed(text: str, where: str) -> Any:
    """JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error


def why_not(text: object) -> str:
    """Why this cannot be learnt; nothing if it can."""
    if text is None:
        return "missing"
    if not isinstance(text, str):
        return "not text"
    if len(text) > LONGEST:
        return f"longer than {LONGEST} characters"
    if not is_unicode(text):
        return "not valid Unicode"
    return "" if clean(text) else "empty"


def is_unicode(text: str) -> bool:
    """Whether it can be written down: JSON can name halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
