"""Seconds by stage, with compilation apart."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Clock:
    """Adds up wall seconds per stage; what JAX spends on tracing, lowering and compiling goes to "compile" instead.

    JAX reports each such span when it ends; spans nest (a trace inside a trace), so the union of them is what counts.
    `compiles` is the number of programs that were compiled, or read from the compilation cache, so far: within a run it
    stands still after the first steps. `running` and `step` are for who watches: the stage of now, and what the loop
    last said.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.compiles, self.running, self.step = 0, "starting", 0
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_span)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; stages do not nest."""
        self._spans, start = [], time.monotonic()
        self.running = name
        try:
            yield
        finally:
            end = time.monotonic()
            compiling, covered = 0.0, start
            for low, high in sorted(self._spans):
                compiling += max(min(high, end) - max(low, covered), 0.0)
                covered = max(covered, high)
            self.seconds["compile"] += compiling
            self.seconds[name] += end - start - compiling
            self.running = "between stages"

    def lap(self) -> dict[str, float]:
        """Seconds by stage since the last lap."""
        lap, self.seconds = dict(self.seconds), defaultdict(float)
        return lap

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_span)

    def _on_span(self, event: str, duration_secs: float, **_: object) -> None:
        self.compiles += event == "/jax/core/compile/backend_compile_duration"
        if event.startswith("/jax/core/compile/"):
            now = time.monotonic()
            self._spans.append((now - duration_secs, now))
