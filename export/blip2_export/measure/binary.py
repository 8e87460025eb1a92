"""The engine measured by itself: a process of `blip2 bench` for every scenario, which leaves records and report."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from blip2_export.measure.records import Files
from blip2_export.measure.work import Work


@dataclass(frozen=True)
class Engine:
    """One bundle, and the flags that it is run with."""

    binary: Path
    bundle: Path
    n_threads: int
    flags: tuple[str, ...] = ()

    def doctor(self) -> None:
        """Refuses flags that cannot be followed here, as `doctor` says."""
        command = [str(self.binary), "doctor", *self.flags]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            lines = (line for line in done.stdout.splitlines() if line.startswith(self.flags[1:2]))
            raise SystemExit(f"{' '.join(command)}: {next(lines, done.stderr.strip())}")

    def measure(self, scenario: str, work: Work, files: Files) -> None:
        bench(self.binary, [scenario, *_work(work), *_own(scenario, work), *self._model], files)

    @property
    def _model(self) -> tuple[str, ...]:
        return ("--model", str(self.bundle), "--threads", str(self.n_threads), *self.flags)


def bench(binary: Path, typed: list[str], files: Files, limit: float | None = None) -> None:
    """Ctrl-C and SIGTERM are passed on: what was measured until then is in `files`. `limit`: seconds that it may take."""
    files.stem.parent.mkdir(parents=True, exist_ok=True)
    outputs = ("--json", str(files.report), "--jsonl", str(files.records))
    command = [str(binary), "bench", *typed, *outputs]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8") as process:
        try:
            _, said = process.communicate(timeout=limit)
        except KeyboardInterrupt:
            process.terminate()
            process.communicate()
            raise
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise SystemExit(f"{' '.join(command)}: is not through within {limit:.0f} s") from error
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {said.strip()}")


def _work(work: Work) -> list[str]:
    texts = [word for question in work.questions for word in ("--text", question)]
    counts = ("--beams", str(work.n_beams), "--queries", str(work.n_queries))
    times = ("--duration", str(work.duration), "--warm-up", str(work.warm_up))
    return [*map(str, work.images), "--task", work.task, *texts, *counts, *times]


def _own(scenario: str, work: Work) -> list[str]:
    """Options of one scenario alone."""
    if scenario == "stage":
        rows, past = (",".join(map(str, dict.fromkeys(values))) for values in zip(*work.past, strict=True))
        return ["--rows", rows, "--past", past]
    tokens = ["--tokens", str(work.n_tokens)]
    return [*tokens, "--concurrency", str(work.n_pictures)] if scenario == "offline" else tokens
