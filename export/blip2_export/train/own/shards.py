"""WebDataset shards: tar archives whose members of one name belong together, a picture with its text.

Their heads are read once; pictures are then read where they lie, in any order, so a run goes on in the middle of a shard as anywhere else.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2_export.train.own.sources import DataError, Member

if TYPE_CHECKING:
    from blip2_export.train.own.records import Record

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LONGEST_TEXT = 1 << 20


def are_meant(data: Path) -> bool:
    """Whether this names shards: one, a range, or a folder that has nothing else."""
    return data.suffix == ".tar" or (data.is_dir() and any(data.glob("*.tar")))


def read(data: Path) -> list[Record]:
    """The pictures with texts of all shards, ordered by key."""
    found: list[Record] = []
    for shard in _shards(data):
        found += _of_shard(shard)
    if not found:
        raise DataError(f"{data}: no member is a picture that has a text of its name")
    return sorted(found, key=lambda record: record.key)


def _shards(data: Path) -> list[Path]:
    if data.is_dir():
        return sorted(data.glob("*.tar"))
    if not (found := _RANGE.search(str(data))):
        return [data]
    first, last = found.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [Path(f"{str(data)[: found.start()]}{number}{str(data)[found.end() :]}") for number in numbers]


def _of_shard(shard: Path) -> list[Record]:
    from blip2_export.train.own.records import PICTURES, Record

    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    found = []
    try:
        with tarfile.open(shard, "r:") as opened:
            for member in opened:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    groups.setdefault(f"{folder}/{stem}".lstrip("/"), {})[f".{ending.lower()}"] = member
            for stem, members in groups.items():
                picture = next((members[ending] for ending in PICTURES if ending in members), None)
                captions = list(_captions(opened, shard, members))
                if picture is not None and captions:
                    source = Member(shard, picture.offset_data, picture.size)
                    found.append(Record(f"{shard.name}/{stem}", source, captions))
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{shard}: not an uncompressed tar archive that can be read ({error})") from error
    return found


def _captions(opened: tarfile.TarFile, shard: Path, members: dict[str, tarfile.TarInfo]) -> Iterator[str]:
    """Of `.txt`, every line; else of `.json`, its `caption` or `text`."""
    if ".txt" in members:
        yield from (line for line in _text(opened, shard, members[".txt"]).splitlines() if line.strip())
    elif ".json" in members:
        try:
            said: Any = json.loads(_text(opened, shard, members[".json"]))
            text = said.get("caption", said.get("text"))
        except (json.JSONDecodeError, AttributeError) as error:
            raise DataError(f"{shard}: {members['.json'].name} is no JSON object ({error})") from error
        yield from (text if isinstance(text, list) else [text] if isinstance(text, str) else [])


def _text(opened: tarfile.TarFile, shard: Path, member: tarfile.TarInfo) -> str:
    if member.size > _LONGEST_TEXT:
        raise DataError(f"{shard}: {member.name} has {member.size} bytes; that is no caption")
    file = opened.extractfile(member)
    try:
        return file.read().decode() if file else ""
    except UnicodeDecodeError as error:
        raise DataError(f"{shard}: {member.name} is not text ({error})") from error
