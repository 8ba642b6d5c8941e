"""What the study's notebook and table compute from the logged runs. NumPy only; the measure is the README's.

runs = load(RESULTS / "study")
ratios(runs, "cispo", "dapo")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m1jax.errors import UserError
from m1jax.train.logged import Logged, read_logged

RESULTS = Path(__file__).parent / "results"
ALGORITHMS = ("cispo", "dapo", "grpo")
FINAL = 4
"""Evaluations that the final score is the mean of."""
WINDOW = 3
"""Consecutive evaluations whose mean has to reach a threshold."""
DRAWS = 10_000
"""Bootstrap draws."""
CPU_LIMIT = 180
"""CPU seconds that a run may take."""
CLAIM = 0.5
"""The ratio that the paper reports."""
TIE = 2e-5
"""Results hold accuracies to five digits. One answer of 512 moves the difference between a mean of three and a mean of
four by at least 1.6e-4, so what differs by less than this is equal."""

REDUCE: Mapping[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(values.mean()),
    "first": lambda values: float(values[0]),
    "last": lambda values: float(values[-FINAL:].mean()),
    "largest": lambda values: float(values.max()),
    "total": lambda values: float(values.sum()),
    "lowest share of first": lambda values: float(values.min() / values[0]),
}
"""Ways to make one number of a metric over a run's steps. "last" is the last four, as for the final score."""


class LoggedRun(Logged):
    """One run of the study."""

    def reduced(self, name: str, how: str) -> float:
        """One number of a metric over the steps, by REDUCE; NaN where it was never recorded."""
        values = self.curve(name)[1]
        return REDUCE[how](values) if values.size else float("nan")

    def spent(self, name: str) -> np.ndarray:
        """What a metric that counts by step has added up to by the end of steps 0, 1, 2, ..."""
        return np.cumsum([row.get(name, 0.0) for row in self.rows])

    @property
    def cell(self) -> tuple[str, int, str]:
        """(task, seed, algorithm)."""
        return self.about["task"], self.about["seed"], self.about["algorithm"]

    @property
    def accuracy(self) -> np.ndarray:
        """Held-out accuracy at steps 0, 1, 2, ..."""
        return self.curve(f"heldout/{self.about['task']}/mean")[1]

    @property
    def final(self) -> float:
        """Mean of the last evaluations."""
        return float(self.accuracy[-FINAL:].mean())


def load(folder: Path) -> list[LoggedRun]:
    """All runs of a phase, by name; none where there is no folder.

    Raises:
        UserError: a file is no result, or does not hold an evaluation of every step.
    """
    runs = []
    for path in sorted(folder.glob("*.jsonl")):
        try:
            about, rows = read_logged(path)
            run = LoggedRun(about, rows)
            name, steps = f"heldout/{about['task']}/mean", int(about["config"]["steps"])
            complete = [row["step"] for row in rows if name in row] == list(range(steps + 1)) and len(rows) == steps + 1
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a result of this study; delete it and run it again") from error
        if not complete:
            raise UserError(f"{path}: does not hold evaluations of steps 0 to {steps}; delete it and run it again")
        runs.append(run)
    return runs


def check_pairs(runs: Sequence[LoggedRun], folder: Path) -> None:
    """Every task and seed that is there has one run of each algorithm.

    Raises:
        UserError: there are no runs, one is missing, or one is there twice.
    """
    if not runs:
        raise UserError(f"{folder}: no results; run python -m experiments.cispo_vs_dapo_vs_grpo.run first")
    cells = [run.cell for run in runs]
    tasks, seeds = sorted({t for t, _, _ in cells}), sorted({s for _, s, _ in cells})
    for cell in ((t, s, a) for t in tasks for s in seeds for a in ALGORITHMS):
        if cells.count(cell) != 1:
            task, seed, algorithm = cell
            raise UserError(
                f"{folder}: {cells.count(cell)} results of {task}, seed {seed}, {algorithm}, expected one; "
                "run python -m experiments.cispo_vs_dapo_vs_grpo.run again"
            )


def tuning_scores(runs: Sequence[LoggedRun]) -> dict[tuple[str, str], dict[float, list[float]]]:
    """Final scores of all seeds, by (task, algorithm) and learning rate, rates ascending.

    Raises:
        UserError: two cells were not tuned on the same rates and seeds: the tuning is unfinished.
    """
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    tried: dict[tuple[str, str], set[tuple[float, int]]] = {}
    for run in sorted(runs, key=lambda run: run.about["learning_rate"]):
        task, seed, algorithm = run.cell
        scores.setdefault((task, algorithm), {}).setdefault(run.about["learning_rate"], []).append(run.final)
        tried.setdefault((task, algorithm), set()).add((run.about["learning_rate"], seed))
    for cell, here in tried.items():
        if missing := sorted(set().union(*tried.values()) - here):
            rate, seed = missing[0]
            raise UserError(
                f"{' '.join(cell)} was not tuned at rate {rate:g}, seed {seed}; run with --phase=tune again"
            )
    return scores


def best_rates(runs: Sequence[LoggedRun]) -> dict[tuple[str, str], float]:
    """The learning rate with the highest mean final score, by (task, algorithm); of equal ones the lowest.

    Raises:
        UserError: as `tuning_scores`.
    """
    scores = tuning_scores(runs)
    # Sums, rounded: every rate has as many seeds, and a tie must not hang on the order of additions.
    return {cell: max(by_rate, key=lambda r: round(sum(by_rate[r]), 9)) for cell, by_rate in scores.items()}


def steps_to(accuracy: np.ndarray, threshold: float) -> float:
    """First point at which the mean of WINDOW consecutive evaluations reaches `threshold`; inf where it never does.

    Args:
        accuracy: at steps 0, 1, 2, ...; the mean of evaluations t - 2 to t counts as of step t.
        threshold: an accuracy.

    Returns:
        Steps, between two of them by linear interpolation; 2 at the least.
    """
    smooth = np.convolve(accuracy, np.ones(WINDOW) / WINDOW, mode="valid")
    reached = np.flatnonzero(smooth >= threshold - TIE)
    if not reached.size:
        return float("inf")
    i = reached[0]
    if i == 0:
        return float(WINDOW - 1)
    part = min((threshold - smooth[i - 1]) / (smooth[i] - smooth[i - 1]), 1.0)
    return float(WINDOW - 2 + i + part)


def ratios(
    runs: Sequence[LoggedRun], ours: str, theirs: str, task: str | None = None, share: float = 1.0
) -> list[dict[str, Any]]:
    """By (task, seed): steps of `ours` and of `theirs` to the final score of `theirs`, and their ratio.

    A `share` below 1 asks for that part of the way from its first evaluation to its final score.

    Where `ours` never gets there the ratio is infinite. `theirs` can miss its own final score too, since that is a mean
    of four evaluations and no mean of three need reach it. It then counts as all of its steps: it took more, so that
    the ratio is an upper bound.
    """
    by_cell = {run.cell: run for run in runs}
    pairs = []
    for t, seed in sorted({(t, s) for t, s, _ in by_cell if task in (None, t)}):
        one, other = by_cell.get((t, seed, ours)), by_cell.get((t, seed, theirs))
        if one is None or other is None:
            continue
        threshold = other.accuracy[0] + share * (other.final - other.accuracy[0]) if share < 1 else other.final
        steps, reference = steps_to(one.accuracy, threshold), steps_to(other.accuracy, threshold)
        every = len(other.accuracy) - 1
        pairs.append(
            {
                "task": t, "seed": seed, "threshold": threshold, "ours": steps, "theirs": reference,
                "ratio": steps / min(reference, every), "ratio_to_all": steps / every,
            }
        )  # fmt: skip
    return pairs


def holds(low: float, high: float) -> bool:
    """Whether the claim of the paper holds, by the interval of the pooled ratio: below 1, and 0.5 in it."""
    return high < 1 and low <= CLAIM <= high


def final_differences(runs: Sequence[LoggedRun], ours: str, theirs: str, task: str | None = None) -> np.ndarray:
    """Final score of `ours` less that of `theirs`, of the same task and seed, in the order of `ratios`."""
    finals = {run.cell: run.final for run in runs}
    pairs = ratios(runs, ours, theirs, task)
    return np.array([finals[p["task"], p["seed"], ours] - finals[p["task"], p["seed"], theirs] for p in pairs])


def select(runs: Sequence[LoggedRun], task: str, algorithm: str) -> list[LoggedRun]:
    """The runs of one task and algorithm, by seed."""
    return sorted((run for run in runs if run.cell[::2] == (task, algorithm)), key=lambda run: run.cell[1])


def tasks_of(runs: Sequence[LoggedRun]) -> list[str]:
    """The tasks that occur, sorted."""
    return sorted({run.cell[0] for run in runs})


def median_with_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median and its 95% percentile interval over bootstrap draws; infinite values stay in.

    The ends are order statistics of the draws: to interpolate next to an infinite one would give no number.
    """
    array = np.asarray(values, float)
    medians = np.sort(np.median(np.random.default_rng(seed).choice(array, (DRAWS, len(array))), axis=1))
    return float(np.median(array)), float(medians[int(0.025 * DRAWS)]), float(medians[int(0.975 * DRAWS) - 1])


def mean_with_interval(values: Any, seed: int = 0) -> tuple[Any, Any, Any]:
    """Mean over runs, the first axis, and its 95% percentile interval over bootstrap draws, for each further index."""
    array = np.asarray(values, float)
    means = array[np.random.default_rng(seed).integers(0, len(array), (DRAWS, len(array)))].mean(axis=1)
    return array.mean(axis=0), np.percentile(means, 2.5, axis=0), np.percentile(means, 97.5, axis=0)


def bands(runs: Sequence[LoggedRun], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, low, high) of the sum of some metrics, at the steps at which every run recorded all of them."""
    by_run = [
        {row["step"]: sum(row[n] for n in names) for row in run.rows if all(n in row for n in names)} for run in runs
    ]
    steps = sorted(set.intersection(*map(set, by_run)))
    if not steps:
        none = np.zeros(0)
        return none, none, none, none
    return np.array(steps), *mean_with_interval([[values[s] for s in steps] for values in by_run])


def bands_against(runs: Sequence[LoggedRun], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(spent, mean, low, high) of held-out accuracy against what a metric that counts by step has added up to.

    Every run is interpolated to the same places, up to what the run that spent least has spent.
    """
    spent = [run.spent(name) for run in runs]
    places = np.linspace(max(s[0] for s in spent), min(s[-1] for s in spent), 60)
    curves = [np.interp(places, s, run.accuracy) for s, run in zip(spent, runs, strict=True)]
    return places, *mean_with_interval(curves)
