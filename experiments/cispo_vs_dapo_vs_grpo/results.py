"""What the study's notebook and table compute from the logged runs. NumPy only.

runs = load(RESULTS / "study")
ratios(runs, "cispo", "dapo")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
ALGORITHMS = ("cispo", "dapo", "grpo")
FINAL = 4
"""Evaluations that the final score is the mean of."""
WINDOW = 3
"""Consecutive evaluations whose mean has to reach a threshold."""
DRAWS = 10_000
"""Bootstrap draws."""


@dataclass(frozen=True)
class LoggedRun:
    """One run: `about` it, and its rows of metrics."""

    about: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, where it was recorded."""
        points = [(row["step"], row[name]) for row in self.rows if name in row]
        return np.array([s for s, _ in points]), np.array([v for _, v in points], float)

    @property
    def accuracy(self) -> np.ndarray:
        """Held-out accuracy at steps 0, 1, 2, ..."""
        return self.curve(f"heldout/{self.about['task']}/mean")[1]

    @property
    def final(self) -> float:
        """Mean of the last evaluations."""
        return float(self.accuracy[-FINAL:].mean())


def load(folder: Path) -> list[LoggedRun]:
    """All runs of a phase, by name."""
    files = [path.read_text().splitlines() for path in sorted(folder.glob("*.jsonl"))]
    return [LoggedRun(json.loads(about), [json.loads(row) for row in rows]) for about, *rows in files]


def best_rates(runs: Sequence[LoggedRun]) -> dict[tuple[str, str], float]:
    """The learning rate with the highest mean final score, by (task, algorithm)."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        cell = scores.setdefault((run.about["task"], run.about["algorithm"]), {})
        cell.setdefault(run.about["learning_rate"], []).append(run.final)
    return {cell: max(by_rate, key=lambda r: float(np.mean(by_rate[r]))) for cell, by_rate in scores.items()}


def steps_to(accuracy: np.ndarray, threshold: float) -> float:
    """First point at which the mean of WINDOW consecutive evaluations reaches `threshold`; inf where it never does.

    Args:
        accuracy: at steps 0, 1, 2, ...; the mean of evaluations t - 2 to t counts as of step t.

    Returns:
        Steps, between two of them by linear interpolation.
    """
    smooth = np.convolve(accuracy, np.ones(WINDOW) / WINDOW, mode="valid")
    reached = np.flatnonzero(smooth >= threshold)
    if not reached.size:
        return float("inf")
    i = reached[0]
    part = 0.0 if i == 0 else (threshold - smooth[i - 1]) / (smooth[i] - smooth[i - 1]) - 1
    return float(WINDOW - 1 + i + part)


def ratios(runs: Sequence[LoggedRun], ours: str, theirs: str, task: str | None = None) -> list[dict[str, Any]]:
    """By (task, seed): steps of `ours` and of `theirs` to the final score of `theirs`, and their ratio."""
    by_cell = {(r.about["task"], r.about["seed"], r.about["algorithm"]): r for r in runs}
    pairs = []
    for t, seed in sorted({(t, s) for t, s, _ in by_cell if task in (None, t)}):
        one, other = by_cell.get((t, seed, ours)), by_cell.get((t, seed, theirs))
        if one is None or other is None:
            continue
        steps, reference = steps_to(one.accuracy, other.final), steps_to(other.accuracy, other.final)
        pairs.append(
            {
                "task": t, "seed": seed, "threshold": other.final, "ours": steps, "theirs": reference,
                "ratio": steps / reference, "ratio_to_all": steps / (len(other.accuracy) - 1),
            }
        )  # fmt: skip
    return pairs


def median_with_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median and its 95% percentile interval over bootstrap draws; infinite values stay in."""
    array = np.asarray(values, float)
    medians = np.sort(np.median(np.random.default_rng(seed).choice(array, (DRAWS, len(array))), axis=1))
    return float(np.median(array)), float(medians[int(0.025 * DRAWS)]), float(medians[int(0.975 * DRAWS) - 1])


def mean_with_interval(values_NT: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over runs and its 95% bootstrap band, step by step."""
    index = np.random.default_rng(seed).integers(0, len(values_NT), (2000, len(values_NT)))
    means = values_NT[index].mean(axis=1)
    return values_NT.mean(axis=0), np.percentile(means, 2.5, axis=0), np.percentile(means, 97.5, axis=0)
