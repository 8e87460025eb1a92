"""`transformers` in the scenarios of `blip2 bench`: a record for every query, and what is known of the run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2_export.measure import machine, records
from blip2_export.measure.peer import Peer, Written
from blip2_export.measure.progress import say
from blip2_export.measure.records import Files, Log, Record
from blip2_export.measure.work import Input, Work

_STABLE, _WINDOW = 0.1, 3  # latencies that lie this close, so many in a row, are stable


@dataclass(frozen=True)
class Scenario:
    """One of `stage`, `single` and `offline`."""

    name: str
    peer: Peer
    work: Work

    def measure(self, engine: Path, files: Files, command: list[str]) -> str:
        """Leaves records and report in `files`, also where Ctrl-C comes; gives the report's table."""
        self._check()
        before, began, started = machine.Load.now(), time.perf_counter(), int(time.time())
        log, is_complete, n = Log(files.records), False, 0
        try:
            for record in itertools.chain(self._warm_up(), self._measured()):
                log.note(record)
                n += not record["warm_up"]
            is_complete = True
        except KeyboardInterrupt:
            if not n:
                say("stopped before anything was measured")
                raise
        log.close()
        about = {
            "command": command,
            "started": started,
            "took_s": time.perf_counter() - began,
            "is_complete": is_complete,
            "load": [before.told, machine.Load.now().since(before)],
            "subject": self.peer.subject,
            "work": self._work(),
            "peak_resident_bytes": machine.peak_memory(),
        }
        table = records.report(engine, files, about)
        if not is_complete:
            print(table)
            raise KeyboardInterrupt
        return table

    @property
    def _n_together(self) -> int:
        return self.work.n_pictures if self.name == "offline" else 1

    def _work(self) -> dict[str, Any]:
        n = self._n_together
        alone = "every stage in turn" if self.name == "stage" else "one at a time"
        return {
            "scenario": self.name,
            "task": self.work.task,
            "inputs": len(self.work.inputs),
            "pictures": 1,
            "arrivals": alone if n == 1 else f"{n} at a time",
            "concurrency": n,
            "seed": 0,
            "search": self.work.search,
            "objectives": {},
        }

    def _check(self) -> None:
        lengths = {self.peer.n_prompt_tokens(self.peer.prompt(one.question)) for one in self.work.inputs}
        if len(lengths) > 1 and self._n_together > 1:
            raise SystemExit("offline writes texts of several questions together: give --text with as many tokens each")
        if self.name != "stage":
            return
        first, most = self.peer.first_past(self.peer.prompt(self.work.inputs[0].question)), self.peer.most_positions
        for _, past in self.work.past:
            if past < first or (most is not None and past >= most):
                room = f"{first} to {most - 1}" if most is not None else f"{first} or more"
                raise SystemExit(f"--past {past}: this model has {room} positions before a step")

    def _warm_up(self) -> Iterator[Record]:
        """Until latencies stay, or the time is over; two batches at least, for the first may take all of it to compile."""
        latencies: list[float] = []
        least = 2 if self.work.warm_up else 0
        for batch in self._batches(lambda _, spent: spent < self.work.warm_up or len(latencies) < least):
            yield from ({**record, "warm_up": True} for record in batch)
            latencies.append(batch[0]["done_ms"] - batch[0]["sent_ms"])
            last = latencies[-_WINDOW:]
            if len(last) == _WINDOW and max(last) <= min(last) * (1 + _STABLE):
                return

    def _measured(self) -> Iterator[Record]:
        n = self.work.n_queries
        for batch in self._batches(lambda index, spent: index < n or spent < self.work.duration):
            yield from ({**record, "warm_up": False} for record in batch)

    def _batches(self, goes_on: Callable[[int, float], bool]) -> Iterator[list[Record]]:
        """The next when one has ended."""
        pictures = {one.picture: one.picture.read_bytes() for one in self.work.inputs}
        turn, start, index = itertools.cycle(self.work.inputs), time.perf_counter(), 0
        while goes_on(index, time.perf_counter() - start):
            batch = list(itertools.islice(turn, self._n_together))
            sent = (time.perf_counter() - start) * 1e3
            if self.name == "stage":
                yield [self._stages(index, batch[0], pictures, sent)]
            else:
                written = self._write(batch, pictures, self.work.n_tokens, self.work.n_beams)
                yield list(_records(index, batch, written, sent))
            index += len(batch)

    def _write(self, batch: Sequence[Input], pictures: dict[Path, bytes], n_tokens: int, n_beams: int) -> Written:
        prompts = [self.peer.prompt(one.question) for one in batch]
        return self.peer.write([pictures[one.picture] for one in batch], prompts, n_tokens, n_beams)

    def _stages(self, index: int, one: Input, pictures: dict[Path, bytes], sent: float) -> Record:
        """One round: each stage of a text, and the steps that are asked for, each from a greedy text of so many rows.

        The record lasts as long as its stages; what else a round takes is left out.
        """
        first = self.peer.first_past(self.peer.prompt(one.question))
        lengths = {rows: max(past for n, past in self.work.past if n == rows) - first + 2 for rows, _ in self.work.past}
        alone = self._write([one], pictures, lengths.get(1, 2), 1)
        found = {1: alone} | {n: self._write([one] * n, pictures, lengths[n], 1) for n in lengths if n != 1}
        stages = {name: time for name, time in alone.stages.items() if name != "decode"}
        stages |= {f"step_{rows}x{past}": found[rows].gaps[past - first] for rows, past in self.work.past}
        done = sent + sum(stages.values())
        return _record(index, one, alone.texts[0], sent, done) | {"n_tokens": 0, "stages_ms": list(stages.items())}


def _records(index: int, batch: Sequence[Input], written: Written, sent: float) -> Iterator[Record]:
    for i, (one, text) in enumerate(zip(batch, written.texts, strict=True)):
        yield _record(index + i, one, text, sent, sent + written.total) | {
            "first_token_ms": sent + written.first_token,
            "gaps_ms": written.gaps,
            "n_tokens": len(written.tokens[i]),
            "tokens": [written.tokens[i]],
            "stages_ms": list(written.stages.items()),
        }


def _record(index: int, one: Input, text: str, sent: float, done: float) -> Record:
    about = {"index": index, "input": one.name, "n_pictures": 1, "output": text}
    return about | {"scheduled_ms": sent, "sent_ms": sent, "done_ms": done}
