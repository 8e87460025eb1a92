"""Ctrl-C and SIGTERM: the step is finished, the run saved. A second one ends it at once, with what was saved before."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from blip2_export.train.own import together

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A run that was asked to end, saved itself and ended; `status` is what a shell expects of a program that a signal ended."""

    def __init__(self, name: str, step: int, steps: int, number: int) -> None:
        super().__init__(f"{name}: stopped at step {step} of {steps} and saved; the same command goes on from there")
        self.status = 128 + number


class Interrupted(BaseException):
    """A signal, where nothing is lost by ending at once."""


class Stop:
    """Listens while it is entered; outside the main thread, where Python hears no signals, it never hears one."""

    def __init__(self) -> None:
        self.signal: int = signal.SIGTERM
        self.asked = self._ends_at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What takes long and changes nothing is not waited for; several processes do wait, for they end together."""
        self._ends_at_once = together.size() == 1
        if self.asked and self._ends_at_once:
            raise Interrupted
        yield
        self._ends_at_once = False

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.asked, self.signal = True, number
        self.__exit__()
        if self._ends_at_once:
            self._ends_at_once = False
            raise Interrupted
