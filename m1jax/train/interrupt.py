"""SIGTERM and Ctrl-C as a flag that the loop polls between steps, so that a run stops where it can be resumed.

    with StopSignal() as stop:
        for step in ...:
            ...
            if stop.requested:
                save(step)
                raise Interrupted(stop.exit_code)

The loop saves, the entry point prints and exits; this file only listens. A Ctrl-C after a request does not wait.

Python calls a handler in its main thread, between two of its own instructions: while that thread waits for another
host, for hours maybe, it does not come to it. So the signal's number goes into a pipe as well, which any thread reads.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

_EXIT_CODES = {"SIGTERM": 75, "SIGINT": 130}


class Interrupted(Exception):  # a request that was honoured, not an error
    """The run saved its state because it was asked to stop, or because something it needs is gone for now.

    Attributes:
        exit_code: 75 (EX_TEMPFAIL: a scheduler starts it again) for SIGTERM and for what is gone, 130 for Ctrl-C.
        reason: what is gone, in one line; "" where it was asked to stop.
    """

    def __init__(self, exit_code: int, reason: str = ""):
        super().__init__(reason or f"interrupted, exit code {exit_code}")
        self.exit_code, self.reason = exit_code, reason


class StopSignal:
    """Context manager: while it is open, SIGTERM and the first SIGINT only set `requested`.

    Attributes:
        requested: None, "SIGTERM" or "SIGINT".
    """

    def __init__(self) -> None:
        self._requested: str | None = None
        self._handled = False
        self._previous: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1

    @property
    def requested(self) -> str | None:
        """Asked from any thread."""
        try:
            for number in os.read(self._pipe[0], 64) if self._pipe else b"":
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._requested = self._requested or signal.Signals(number).name
        except OSError:  # nothing new
            pass
        return self._requested

    @property
    def exit_code(self) -> int:
        """The exit code that belongs to the signal received; 0 where none was."""
        return _EXIT_CODES[self.requested] if self.requested else 0

    def __enter__(self) -> StopSignal:
        # Python lets only the main thread set handlers; elsewhere (a notebook's worker) the flag stays None.
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous.clear()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_fd)
            pipe, self._pipe = self._pipe, None
            for end in pipe:
                os.close(end)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._handled:
            raise KeyboardInterrupt
        self._handled = True
        self._requested = self._requested or signal.Signals(number).name
