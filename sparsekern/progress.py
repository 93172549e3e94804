"""How a long run talks to the terminal and is stopped from it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any


class Progress:
    """A bar over the steps of a run with the time left; a line now and then where tqdm is missing."""

    def __init__(self, total: int, done: int = 0, unit: str = "step"):
        self.unit = unit
        self.total, self.done, self._first = total, done, done
        self._start = self._said = time.monotonic()
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            self._bar = None
        else:
            # A log file gets a line every few seconds instead of ten a second.
            calm = 0.1 if sys.stderr.isatty() else 5.0
            self._bar = tqdm(total=total, initial=done, unit=unit, mininterval=calm, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, note: str) -> None:
        """One step more; `note` says how the run stands."""
        self.done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        if self.done == self.total or now - self._said >= 5:
            left = (now - self._start) / (self.done - self._first) * (self.total - self.done)
            print(f"{self.unit} {self.done}/{self.total}, {left:.0f} s left, {note}", file=sys.stderr, flush=True)
            self._said = now


class StopRequest:
    """While entered, the first Ctrl-C (or SIGTERM) only sets `requested`; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True
        self.__exit__()
