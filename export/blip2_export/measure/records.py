"""Records of queries and what is known of their run, for `blip2 bench report`, which makes the report."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]
Report = dict[str, Any]
ABOUT = ("command", "started", "took_s", "is_complete", "machine", "load", "subject", "work", "peak_resident_bytes")


@dataclass(frozen=True)
class Files:
    """One run's, side by side in a folder."""

    stem: Path

    @property
    def records(self) -> Path:
        return self._with(".jsonl")

    @property
    def about(self) -> Path:
        return self._with(".about.json")

    @property
    def report(self) -> Path:
        return self._with(".json")

    @property
    def is_there(self) -> bool:
        """Whether there is a report; who is killed leaves an empty file."""
        return self.report.is_file() and self.report.stat().st_size > 0

    def read(self) -> Report:
        return json.loads(self.report.read_text())

    def logged(self) -> list[Record]:
        # `splitlines` would also cut at U+0085 and U+2028, which a model may write and JSON leaves as they are.
        return [json.loads(line) for line in self.records.read_text(encoding="utf-8").split("\n") if line]

    def _with(self, end: str) -> Path:
        return self.stem.with_name(self.stem.name + end)


class Log:
    """A file of records that grows with every query, so that a stop keeps what was measured."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open_to_write(path)

    def note(self, record: Record) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        self._file.close()


def open_to_write(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def report(engine: Path, files: Files, about: dict[str, Any]) -> str:
    """Writes the report beside the records; gives its table."""
    with open_to_write(files.about) as file:
        json.dump(about, file, indent=1)
    command = [str(engine), "bench", "report", str(files.records), "--about", str(files.about)]
    done = subprocess.run([*command, "--json", str(files.report)], capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or f"{engine}: bench report failed")
    return done.stdout


def joined(engine: Path, runs: Iterable[Files], files: Files, command: list[str]) -> Report | None:
    """One report of several runs of the same work. A run begins where the one before ended, so that rates count no time between."""
    there = [run for run in runs if run.is_there]
    if not there:
        return None
    reports, log = [run.read() for run in there], Log(files.records)
    for record in _one_after_another([run.logged() for run in there]):
        log.note(record)
    log.close()
    peaks = [one["peak_resident_bytes"] for one in reports if one["peak_resident_bytes"]]
    about = {
        **{name: reports[0][name] for name in ABOUT},
        "command": command,
        "took_s": sum(one["took_s"] for one in reports),
        "is_complete": all(one["is_complete"] for one in reports),
        "load": [reports[0]["load"][0], reports[-1]["load"][1]],
        "peak_resident_bytes": max(peaks, default=None),
        "limits": [one["limits"] for one in reports if "limits" in one],
    }
    report(engine, files, about)
    return files.read()


def _one_after_another(logs: list[list[Record]]) -> Iterator[Record]:
    """Warm-ups are left to the runs: their clock is another one."""
    end, index = 0.0, 0
    for log in logs:
        counted = [record for record in log if not record.get("warm_up")]
        shift = end - min((record["scheduled_ms"] for record in counted), default=0.0)
        for record in counted:
            times = ("scheduled_ms", "sent_ms", "first_token_ms", "done_ms")
            moved = {name: record[name] + shift for name in times if name in record}
            yield {**record, **moved, "index": index}
            end, index = max(end, moved["done_ms"]), index + 1


def _unwritable(path: Path, error: OSError) -> SystemExit:
    return SystemExit(f"{path} cannot be written: {error.strerror}")
