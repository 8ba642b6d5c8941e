"""The run folder: what a run leaves for people and for other programs, and how to read it back.

    config.json       the resolved config; who claims the folder with another one is refused
    metrics.jsonl     one line a step (m1jax.train.metrics)
    summary.json      the outcome: held-out accuracy before and after, seconds by stage, final metrics
    curves.png        the same as a picture
    samples.md        answers before and after
    checkpoints/      m1jax.train.checkpoint

Everything is drawn from plain numbers by name, and a number that is not there is not drawn: this file knows no model,
no loop and no task.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from m1jax.config import changed_keys, to_dict
from m1jax.errors import UserError
from m1jax.train import curves
from m1jax.train.checkpoint import restore_params
from m1jax.train.metrics import read_jsonl
from m1jax.types import Params

CONFIG, METRICS, SUMMARY, CURVES, SAMPLES = (
    "config.json", "metrics.jsonl", "summary.json", "curves.png", "samples.md",
)  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """A run folder read back.

    Attributes:
        folder: where it is.
        config: the resolved config as plain values.
        metrics: one mapping per step, with "step" in it.
        summary: summary.json, or {} while the run has not written one.
    """

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    @cached_property
    def params(self) -> Params:
        """Parameters of the newest good checkpoint, read when first asked for."""
        return restore_params(self.folder)[0]


@dataclass(frozen=True)
class Sample:
    """One held-out question with the answers before and after training.

    Attributes:
        task, question, answer: as the task states them; `answer` is None where a verifier checks a property only.
        before, after: what the model wrote.
        before_score, after_score: what the verifier said.
    """

    task: str
    question: str
    answer: str | None
    before: str
    before_score: float
    after: str
    after_score: float


def claim_run_folder(workdir: str | os.PathLike[str], config: Any, apart: Sequence[str] = ()) -> bool:
    """Make `workdir` the folder of a run with this config; True where it already is one (the run is resumed).

    Args:
        workdir: the folder; made if absent.
        config: dataclass or plain values.
        apart: sections that may be others when the run is resumed.

    Raises:
        UserError: the folder belongs to a run with another config; the line names the keys and both values.
    """
    folder, config = Path(workdir), to_dict(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be a run folder ({error.strerror}); give another --workdir") from error
    if not (folder / CONFIG).exists():
        write_json(folder / CONFIG, config)
        return False
    changes = changed_keys(_read_json(folder / CONFIG), json.loads(json.dumps(config)))
    if moved := [key for key, _, _ in changes if key.partition(".")[0] in apart]:
        changes = [change for change in changes if change[0] not in moved]
        if not changes:
            write_json(folder / CONFIG, config)
    if changes:
        told = ", ".join(f"{key} was {old!r} and is {new!r}" for key, old, new in changes)
        raise UserError(f"{folder}: holds a run with another config: {told}; give the old values or another --workdir")
    return True


def load_run(directory: str | os.PathLike[str]) -> RunResult:
    """A run folder as a `RunResult`; works while the run is still going.

    Raises:
        UserError: it is not a run folder.
    """
    folder = Path(directory)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a run folder, it has no {CONFIG}")
    metrics = read_jsonl(folder / METRICS) if (folder / METRICS).exists() else []
    summary = _read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
    return RunResult(folder, _read_json(folder / CONFIG), metrics, summary)


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Write plain values as JSON; a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    staging = path.with_name(path.name + ".new")
    staging.write_text(json.dumps(to_dict(values), indent=2) + "\n")
    staging.replace(path)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion.

        (p + z²/2n ± z sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n),  z = 1.96

    Unlike p ± 1.96 standard errors it stays inside [0, 1] and has a width at p = 0 and 1. With n = 0 nothing is
    known: (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p, square = successes / n, z * z / n
    center, half = p + square / 2, z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    # At p = 0 and 1 the exact bounds are 0 and 1; rounding must neither step over them nor stop short.
    low, high = (center - half) / (1 + square), (center + half) / (1 + square)
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def accuracy(successes: float, n: int) -> dict[str, float]:
    """An accuracy as summary.json has it: {mean, low, high, n}."""
    low, high = wilson_interval(successes, n)
    return {"mean": successes / n if n else 0.0, "low": low, "high": high, "n": n}


def write_samples(path: str | os.PathLike[str], samples: Sequence[Sample], title: str = "Before and after") -> None:
    """Write answers before and after training as Markdown."""
    lines = [f"# {title}", ""]
    for number, sample in enumerate(samples, 1):
        lines += [f"## {number}. {sample.task}", "", *_block(sample.question), ""]
        if sample.answer is not None:
            lines += [f"Reference answer: `{sample.answer}`", ""]
        for when, text, score in (
            ("Before", sample.before, sample.before_score),
            ("After", sample.after, sample.after_score),
        ):
            lines += [f"{when}, score {score:g}:", "", *_block(text), ""]
    path = Path(path)
    staging = path.with_name(path.name + ".new")
    staging.write_text("\n".join(lines))
    staging.replace(path)


def draw_curves(folder: str | os.PathLike[str]) -> bool:
    """Draw curves.png from the metrics.jsonl of a run folder; False (and no file) where there is nothing to draw."""
    folder = Path(folder)
    rows = read_jsonl(folder / METRICS) if (folder / METRICS).exists() else []
    return curves.draw_curves(folder / CURVES, rows, title=folder.resolve().name)


def _block(text: str) -> list[str]:
    """A fenced block; the fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + "text", text, fence]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); mend it or use another run folder") from error
