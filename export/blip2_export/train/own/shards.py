"""WebDataset shards: tar archives whose members of one name belong together, a picture with its text.

Their heads are read once; pictures are then read where they lie, in any order, so a run goes on in the middle of a shard as
anywhere else. Nothing is ever unpacked under a name that an archive chose.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import lzma
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from blip2_export.train.own import forms, texts
from blip2_export.train.own.aside import beside, sweep
from blip2_export.train.own.forms import Said
from blip2_export.train.own.sources import PICTURES, DataError, Member

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MOST_SHARDS = 100_000
_LONGEST_TEXT = 1 << 20
_OPENERS = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Pictures are compressed already; what shrinks more than this is not made of them.
_MOST_SHRUNK = 50
_BLOCK = 1 << 20


def are_meant(data: Path) -> bool:
    """Whether this names shards: one, several by braces or a pattern, or a folder that has some."""
    if data.is_dir():
        return any(_is_shard(path.name) for path in data.iterdir())
    return _is_shard(data.name)


def read(data: Path, work: Path | None = None) -> Iterator[tuple[Member, Said]]:
    """Pictures with what is said of each, from all shards; compressed ones are unpacked into `work` first."""
    empty = True
    shards = _shards(data)
    top = os.path.commonpath([shard.parent for shard in shards]) if shards else ""
    for shard in shards:
        plain = shard if shard.suffix == ".tar" else _unpacked(shard, work)
        for found in _of_shard(shard, plain, shard.relative_to(top).as_posix()):
            empty = False
            yield found
    if empty:
        raise DataError(f"{data}: no member is a picture")


def _is_shard(name: str) -> bool:
    return re.search(r"\.(tar|tar\.\w+|tgz)$", name) is not None and not name.startswith(".")


def _shards(data: Path) -> list[Path]:
    if data.is_dir():
        return sorted(path for path in data.iterdir() if _is_shard(path.name))
    named = [Path(name) for name in _braces(str(data))]
    found = [path for name in named for path in ([name] if name.exists() else sorted(map(Path, glob.glob(str(name)))))]
    missing = [name for name in named if not name.exists() and not glob.glob(str(name))]
    if missing:
        raise DataError(f"{missing[0]}: there is no such shard ({len(missing)} of {len(named)} are missing)")
    return found


def _braces(name: str) -> list[str]:
    """`{000..099}` and `{a,b}`, anywhere and several times."""
    names = [name]
    while any(map(_BRACES.search, names)):
        names = [each for one in names for each in _opened(one)]
        if len(names) > _MOST_SHARDS:
            raise DataError(f"{name}: these are more than {_MOST_SHARDS} shards")
    return names


def _opened(name: str) -> list[str]:
    """The first pair of braces."""
    if (found := _BRACES.search(name)) is None:
        return [name]
    first, last, listed = found.groups()
    if first and int(last) - int(first) >= _MOST_SHARDS:
        raise DataError(f"{name}: these are more than {_MOST_SHARDS} shards")
    each = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)] if first else listed.split(",")
    return [name[: found.start()] + one + name[found.end() :] for one in each]


def _of_shard(shard: Path, plain: Path, name: str) -> Iterator[tuple[Member, Said]]:
    """`name`: the shard's, by which those of several folders are told from each other."""
    try:
        with tarfile.open(plain, "r:") as opened:
            for key, members in _samples(opened, shard):
                picture = next((members[ending] for ending in PICTURES if ending in members), None)
                if picture is not None:
                    source = Member(plain, picture.offset_data, picture.size)
                    yield source, _said(opened, f"{name}/{key}", picture, members)
        _check_end(plain, shard)
    except (OSError, EOFError, tarfile.TarError, RecursionError) as error:
        raise DataError(f"{shard}: it is no tar archive, or is cut off ({error}); fetch it again") from error


def _samples(opened: tarfile.TarFile, shard: Path) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Ordinary members by name. A name that comes again begins a new sample: the second of two pictures is no less one."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    again: dict[str, int] = {}
    for member in opened:
        if member.size < 0:
            raise DataError(f"{shard}: a member has a size of {member.size}; fetch it again")
        folder, _, name = member.name.rpartition("/")
        if not member.isreg() or name.startswith(".") or not texts.is_unicode(member.name):
            continue
        stem, _, ending = name.partition(".")
        base = f"{folder}/{stem}".lstrip("/")
        key = f"{base}~{again[base]}" if base in again else base
        if f".{ending.lower()}" in groups.get(key, {}):
            again[base] = again.get(base, 1) + 1
            key = f"{base}~{again[base]}"
        groups.setdefault(key, {})[f".{ending.lower()}"] = member
    return list(groups.items())


def _said(opened: tarfile.TarFile, key: str, picture: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> Said:
    """Of `.txt`, every line; else of `.json`, what a row of a list would say."""
    if picture.issparse():
        return Said(key, refused="a picture that is stored with holes")
    member = members.get(".txt") or members.get(".json")
    if member is None:
        return Said(key, refused="no text beside the picture")
    if member.size > _LONGEST_TEXT:
        return Said(key, refused=f"{member.size} bytes of text")
    try:
        file = opened.extractfile(member)
        text = texts.decoded(file.read() if file else b"")
        if member is members.get(".txt"):
            return Said(key, tuple([line for line in texts.lines(text) if line.strip()] or [""]))
        return forms.row(key, texts.parsed(text, key), key)
    except UnicodeDecodeError:
        return Said(key, refused="text that is not UTF-8")
    except DataError as error:
        return Said(key, refused=str(error).removeprefix(f"{key}: "))


def _check_end(plain: Path, shard: Path) -> None:
    """An archive that was cut between two members looks whole but for its end."""
    with plain.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 512))
        if opened.read().strip(b"\0"):
            raise DataError(f"{shard}: it has no end, so it is cut off; fetch it again")


def _unpacked(shard: Path, work: Path | None) -> Path:
    """An archive without its compression, once; pictures cannot be read from the middle of a compressed one."""
    opener = _OPENERS.get(shard.suffix)
    if opener is None or work is None:
        raise DataError(f"{shard}: a shard of this compression is not read; unpack it to .tar")
    known = shard.stat()
    name = hashlib.sha256(f"{shard.resolve()} {known.st_size} {known.st_mtime_ns}".encode()).hexdigest()[:16]
    plain = work / "unpacked" / f"{name}.tar"
    if not plain.exists():
        print(f"{shard}: unpacking it into {plain.parent}", file=sys.stderr)
        plain.parent.mkdir(parents=True, exist_ok=True)
        sweep(plain.parent.glob(".*.part"))
        aside = beside(plain)
        try:
            with opener(shard, "rb") as packed, aside.open("wb") as out:
                _copy(packed, out, max(_BLOCK << 6, _MOST_SHRUNK * known.st_size), shard)
            os.replace(aside, plain)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
            raise (
                error if isinstance(error, DataError) else DataError(f"{shard}: it cannot be unpacked ({error})")
            ) from error
        finally:
            aside.unlink(missing_ok=True)
    return plain


def _copy(packed: BinaryIO, out: BinaryIO, most: int, shard: Path) -> None:
    size = 0
    while block := packed.read(_BLOCK):
        size += len(block)
        if size > most:
            raise DataError(
                f"{shard}: it unpacks to more than {_MOST_SHRUNK} times its size; that is no shard of pictures"
            )
        out.write(block)
