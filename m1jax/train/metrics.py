"""Where numbers go: one small protocol, and sinks for a file, for TensorBoard and for a person watching.

    sink.write(step, {"reward/mean": 0.41, "time/tokens_per_second": 9100.0})

Names are `stage/what`; which names there are is the loop's affair, save for the few that the progress line shows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np

PROGRESS = {
    "reward/mean": "reward {:.3f}",
    "reward/accuracy": "accuracy {:.3f}",
    "rollout/length_mean": "length {:.1f}",
    "rollout/entropy": "entropy {:.3f}",
    "time/tokens_per_second": "{:,.0f} tokens/s",
}
"""Metrics of RL's progress line, in its order; one that a step does not have is left out."""

SUPERVISED_PROGRESS = {"train/loss": "loss {:.4f}", "time/tokens_per_second": "{:,.0f} tokens/s"}
"""The same for steps without a reward."""


@runtime_checkable
class MetricSink(Protocol):
    """Anything that takes the numbers of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step; several calls for a step add to each other."""
        ...

    def close(self) -> None:
        """Flush and let go; no write follows."""
        ...


class JsonlSink:
    """One JSON object per line: {"step": 3, "time": unix seconds, "reward/mean": 0.41, ...}.

    Args:
        path: the file; made if absent, appended to else.
        resume_step: keep rows up to this step only. A resumed run computes the later ones again, and a line that a
            kill cut in half goes too. 0 starts afresh but for rows of step 0; None keeps all.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and resume_step is not None:
            kept = [row for row in read_jsonl(path) if row["step"] <= resume_step]
            staging = path.with_name(path.name + ".new")
            staging.write_text("".join(json.dumps(row) + "\n" for row in kept))
            staging.replace(path)
        self._file: IO[str] = path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": int(step), "time": round(time.time(), 3)} | {name: _number(v) for name, v in metrics.items()}
        # One write per line, so that a kill cuts the last line at worst.
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict]:
    """Rows of a metrics file in order; a last line that a kill cut in half is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class TensorBoardSink:
    """Event files by tensorboard's own writer; tensorflow is not needed.

    Args:
        directory: folder of the event files.
        resume_step: TensorBoard hides what an earlier process wrote after this step; None hides nothing.
    """

    def __init__(self, directory: str | os.PathLike[str], resume_step: int | None = None):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Any: the messages are generated at import, so a type checker does not see them.
        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._writer = EventFileWriter(os.fspath(directory))
        if resume_step is not None:
            session = self._event.SessionLog(status=self._event.SessionLog.START)
            self._writer.add_event(self._event.Event(wall_time=time.time(), step=resume_step + 1, session_log=session))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Summary.Value(tag=name, simple_value=float(v)) for name, v in metrics.items()]
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=int(step), summary=summary))

    def close(self) -> None:
        self._writer.close()


class ConsoleSink:
    """One line a step: step/total, a few metrics, time left; a step that has none of them has no line.

    Args:
        total: steps of the whole run.
        first: step this process starts after; the time left is reckoned from the steps it has done itself.
        shown: metric name to format, in order; by default that of RL, or of supervised steps.
        stream: a text stream; standard output by default.
    """

    def __init__(
        self, total: int, first: int = 0, shown: Mapping[str, str] | None = None, stream: IO[str] | None = None
    ):
        self._total, self._first, self._shown, self._stream = total, first, shown, stream
        self._started = time.monotonic()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = self._shown or (PROGRESS if "reward/mean" in metrics else SUPERVISED_PROGRESS)
        parts = [form.format(float(metrics[name])) for name, form in shown.items() if name in metrics]
        if not parts:
            return
        done = max(step - self._first, 1)
        left = (time.monotonic() - self._started) / done * max(self._total - step, 0)
        width = len(str(self._total))
        print(f"{step:{width}d}/{self._total}  {'  '.join(parts)}  {_clock(left)} left", file=self._stream, flush=True)

    def close(self) -> None:
        pass


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[MetricSink]):
        self._sinks = tuple(sinks)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def _number(value: float) -> int | float | None:
    """A JSON number; NaN and infinities, which JSON lacks, are null."""
    if isinstance(value, int | np.integer):
        return int(value)
    value = float(value)
    return value if np.isfinite(value) else None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
