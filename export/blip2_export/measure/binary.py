"""The engine timed by its own account: what the binary's JSON says of each text.

Every process writes one text or batch more than is counted, to warm up, except where many questions are asked at once: their
batch is the first thing a process does.
"""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2_export.engine import run_engine
from blip2_export.measure.samples import Samples
from blip2_export.measure.work import TEMPLATE, Work

_Line = dict[str, Any]
_BATCHES = 3  # of a run; the first warms up


@dataclass
class Engine:
    """One bundle, and the flags that it is run with. `written`: the tokens of every caption, by picture and search."""

    binary: Path
    bundle: Path
    n_threads: int
    flags: tuple[str, ...] = ()
    written: dict[str, list[int]] = field(default_factory=dict)

    def describe(self) -> dict[str, str]:
        """Its version, that of the ONNX Runtime that it finds, and the processor's instructions."""
        said = self.doctor()
        own, instructions, runtime = (
            found[1] if (found := re.search(pattern, said, re.MULTILINE)) else "unknown"
            for pattern in (r"^blip2 +(\S+)", r"^processor +[^,]+, (.+)", r"^ONNX Runtime +([^\s,]+)")
        )
        return {"engine": f"blip2 {own}, ONNX Runtime {runtime}", "instruction set, engine": instructions}

    def doctor(self) -> str:
        """What `doctor` says, which refuses flags that cannot be followed here."""
        command = [str(self.binary), "doctor", *self.flags]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            lines = (line for line in done.stdout.splitlines() if line.startswith(self.flags[1:2]))
            raise SystemExit(f"{' '.join(command)}: {next(lines, done.stderr.strip())}")
        return done.stdout

    def measure(self, work: Work, i: int) -> Samples:
        """The i-th round: every caption greedily, and of the i-th picture what takes longer."""
        image = work.images[i % len(work.images)]
        captions = self._captions(work, work.images, "", 1)
        beams = self._captions(work, [image], "", work.n_beams)
        alone = self._captions(work, [image] * 2, work.prompts[0], 1)
        together = self._ask(work, image, len(work.questions), 1)
        asked_rows = self._ask(work, image, work.n_beams, 1)
        asked_beams = self._ask(work, image, 1, work.n_beams)
        stages = [one["timings_ms"] for one in captions]
        return {
            "preprocess": [times["decode_image"] + times["preprocess"] for times in stages],
            **{name: [times[name] for times in stages] for name in ("vision", "qformer", "prefill")},
            "step": [gap for one in captions for gap in one["token_gaps_ms"]],
            "caption": [times["total"] for times in stages],
            "beams": [one["timings_ms"]["total"] for one in beams],
            "batch": [self._batch(work)],
            "alone": [_tokens_per_second([one]) for one in alone],
            "together": [_tokens_per_second(together)],
            "step of rows": [_mean_step(asked_rows[0])],
            "step of beams": [_mean_step(asked_beams[0])],
        }

    def _batch(self, work: Work) -> float:
        """Milliseconds between batches of captions: from the last line of the first one to that of the last."""
        n = str(work.n_tokens)
        search = ("--beams", "1", "--max-new-tokens", n, "--min-new-tokens", n, "--prompt", "")
        pictures = map(str, work.batch * _BATCHES)
        command = [str(self.binary), "caption", *self._machine, *search, "--batch", str(work.n_pictures), *pictures]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                ends = [time.perf_counter() for line in process.stdout or () if line.startswith(b"{")]
            except KeyboardInterrupt:
                process.kill()
                raise
        if process.returncode or len(ends) != work.n_pictures * _BATCHES:
            raise SystemExit(f"{self.binary}: wrote {len(ends)} of {work.n_pictures * _BATCHES} captions")
        return (ends[-1] - ends[work.n_pictures - 1]) * 1e3 / (_BATCHES - 1)

    def _captions(self, work: Work, images: tuple[Path, ...] | list[Path], prompt: str, n_beams: int) -> list[_Line]:
        """One process; its first text does not count."""
        options = ("--prompt", prompt, "--beams", str(n_beams), "--batch", "1")
        _, *lines = self._run(work, "caption", *options, str(images[0]), *map(str, images))
        if not prompt:
            self.written |= {f"{line['image']}, {n_beams} beams": line["tokens"] for line in lines}
        return lines

    def _ask(self, work: Work, image: Path, n: int, n_beams: int) -> list[_Line]:
        """The first `n` questions in one batch. Times are of all together."""
        asked = [work.questions[k % len(work.questions)] for k in range(n)]
        return self._run(work, "ask", "--prompt", TEMPLATE, "--beams", str(n_beams), str(image), *asked)

    @property
    def _machine(self) -> tuple[str, ...]:
        return ("--json", "--model", str(self.bundle), "--threads", str(self.n_threads), *self.flags)

    def _run(self, work: Work, command: str, *more: str) -> list[_Line]:
        n = str(work.n_tokens)
        lines = run_engine(self.binary, command, *self._machine, "--max-new-tokens", n, "--min-new-tokens", n, *more)
        if wrong := next((line for line in lines if len(line["tokens"]) != work.n_tokens), None):
            raise SystemExit(f"{self.binary}: wrote {len(wrong['tokens'])} tokens where {n} were asked for")
        return lines


def _mean_step(line: _Line) -> float:
    """Of one text, whose first token comes from prefill. What beams have settled says nothing of the time of a step."""
    return line["timings_ms"]["decode"] / (len(line["tokens"]) - 1)


def _tokens_per_second(lines: list[_Line]) -> float:
    """Of the language model alone, until the last of these texts ends."""
    each = (line["timings_ms"] for line in lines)
    slowest = max(times["waiting"] + times["prefill"] + times["decode"] for times in each)
    return sum(len(line["tokens"]) for line in lines) * 1e3 / slowest
