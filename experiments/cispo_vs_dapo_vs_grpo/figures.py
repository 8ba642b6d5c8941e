"""The study's figures. Each function takes logged runs and returns a matplotlib Figure; what runs lack is left out.

Lines are means over seeds, bands their 95% bootstrap intervals. The object interface, not pyplot: no global state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.cispo_vs_dapo_vs_grpo.results import (
    ALGORITHMS,
    CLAIM,
    LoggedRun,
    bands,
    bands_against,
    median_with_interval,
    ratios,
    select,
    tasks_of,
)

COLORS = {"cispo": "#0072b2", "dapo": "#d55e00", "grpo": "#5b8c5a"}  # apart for color-blind eyes, and in gray
SCREEN_DPI, FILE_DPI = 72, 90  # the notebook keeps its figures: under 1 MB
MISSING = "not recorded"


@dataclass(frozen=True)
class Panel:
    """One small plot of metrics against steps.

    Attributes:
        title: what is seen.
        curves: by label, the metrics whose sum is drawn; the second label is dashed, the third dotted.
        log: logarithmic axis, where the values are positive.
    """

    title: str
    curves: dict[str, tuple[str, ...]]
    log: bool = False


BOUNDED = Panel(
    "Tokens above the cap (CISPO)\nor without gradient (DAPO, GRPO)",
    {
        f"advantage {sign} 0": (f"ratio/capped_share_{name}", f"ratio/dropped_share_{name}")
        for sign, name in ((">", "positive"), ("<", "negative"))
    },
)
ENTROPY = Panel("Entropy (nats a token)", {"": ("rollout/entropy",)})
LENGTH = Panel("Mean length (tokens)", {"": ("rollout/length_mean",)})
MECHANISM = (
    BOUNDED,
    Panel(
        "The same,\nof tokens of a probability",
        {
            label: (f"ratio/capped_share_{name}", f"ratio/dropped_share_{name}")
            for label, name in (("p < 0.1", "p_below_0.1"), ("0.1 to 0.5", "p_0.1_to_0.5"), ("p ≥ 0.5", "p_above_0.5"))
        },
    ),
    Panel("Rare tokens (p < 0.1) with\na gradient, updates 2 to 16", {"": ("rare/gradient_share_later_updates",)}),
    Panel("Mean |log r|, updates 2 to 16", {"": ("ratio/abs_log_later_updates",)}, log=True),
    Panel("Largest r", {"": ("ratio/largest",)}, log=True),
)
POLICY = (
    ENTROPY,
    LENGTH,
    Panel("Length by outcome", {"right": ("rollout/length_correct",), "wrong": ("rollout/length_incorrect",)}),
)
FAILURES = (
    Panel("Cut for repetition (share)", {"": ("rollout/share_repetition",)}),
    Panel("Window full (share)", {"": ("rollout/share_length",)}),
    Panel("Mean and 99% length (tokens)", {"mean": ("rollout/length_mean",), "99%": ("rollout/length_p99",)}),
)


def accuracy(runs: Sequence[LoggedRun]) -> Figure:
    """Held-out accuracy against steps, generated tokens and CPU seconds."""
    tasks = tasks_of(runs)
    figure, axes = _grid(len(tasks), 3)
    for row, task in zip(axes, tasks, strict=True):
        _accuracy_by_step(row[0], runs, task)
        for place, name, label in ((row[1], "rollout/tokens", "generated tokens"), (row[2], "time/cpu", "CPU seconds")):
            for algorithm in ALGORITHMS:
                _line(place, *bands_against(select(runs, task, algorithm), name), algorithm)
            _dress(place, "Held-out accuracy", label)
    _name(figure, axes, tasks)
    return figure


def steps_to_threshold(runs: Sequence[LoggedRun]) -> Figure:
    """Left: each seed's steps to DAPO's final score. Right: the ratio to DAPO's steps, its median and interval."""
    tasks = tasks_of(runs)
    figure, ((*places, forest),) = _grid(1, len(tasks) + 1, height=3.4)
    for axes, task in zip(places, tasks, strict=True):
        _steps_by_pair(axes, runs, task)
        axes.set_ylabel(task, fontsize=10)
    _ratio_forest(forest, runs)
    return figure


def panels(runs: Sequence[LoggedRun], chosen: Sequence[Panel]) -> Figure:
    """Metrics against steps, a row a task."""
    tasks = tasks_of(runs)
    figure, axes = _grid(len(tasks), len(chosen), width=4.4 if len(chosen) < 4 else 3.3)
    for row, task in zip(axes, tasks, strict=True):
        for place, panel in zip(row, chosen, strict=True):
            _panel(place, runs, task, panel)
    _name(figure, axes, tasks)
    return figure


def overview(runs: Sequence[LoggedRun]) -> Figure:
    """The outcome on one page: accuracy, steps to the threshold, bounded tokens and entropy by task; then the ratio."""
    tasks = tasks_of(runs)
    figure, axes = _grid(len(tasks) + 1, 4, width=3.7, height=2.7)
    for row, task in zip(axes, tasks, strict=False):
        _accuracy_by_step(row[0], runs, task)
        _steps_by_pair(row[1], runs, task)
        _panel(row[2], runs, task, BOUNDED)
        _panel(row[3], runs, task, ENTROPY)
    grid = axes[-1][0].get_gridspec()
    for place in axes[-1]:
        place.remove()
    _ratio_forest(figure.add_subplot(grid[-1, :]), runs)
    _name(figure, axes, tasks)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    staging = path.with_name(path.name + ".new")
    figure.savefig(staging, format="png", dpi=FILE_DPI)
    staging.replace(path)


# -- parts -------------------------------------------------------------------------------------------------------


def _grid(rows: int, columns: int, width: float = 4.4, height: float = 3.0) -> tuple[Figure, list[list[Any]]]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=SCREEN_DPI)
    FigureCanvasAgg(figure)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _line(axes: Any, x: np.ndarray, mean: Any, low: Any, high: Any, algorithm: str, style: str = "-") -> None:
    marker = "o" if len(x) < 4 else ""
    axes.plot(x, mean, style, color=COLORS[algorithm], lw=1.6, marker=marker, ms=3.5)
    axes.fill_between(x, low, high, color=COLORS[algorithm], alpha=0.15, lw=0)


def _accuracy_by_step(axes: Any, runs: Sequence[LoggedRun], task: str) -> None:
    for algorithm in ALGORITHMS:
        _line(axes, *bands(select(runs, task, algorithm), [f"heldout/{task}/mean"]), algorithm)
    _dress(axes, "Held-out accuracy", "step (16 updates)")


def _panel(axes: Any, runs: Sequence[LoggedRun], task: str, panel: Panel) -> None:
    styles = ("-", "--", ":")
    values: list[float] = []
    for algorithm in ALGORITHMS:
        for names, style in zip(panel.curves.values(), styles, strict=False):
            x, mean, low, high = bands(select(runs, task, algorithm), names)
            if len(x):
                _line(axes, x, mean, low, high, algorithm, style)
                values.extend(mean)
    _dress(axes, panel.title, "step (16 updates)")
    if not values:
        axes.text(0.5, 0.5, MISSING, transform=axes.transAxes, ha="center", color="0.5")
        return
    if not any(values):
        axes.set_ylim(-0.02, 1)  # a line along the bottom, not through the middle of nothing
    if panel.log and min(values) > 0:
        axes.set_yscale("log")
    if len(panel.curves) > 1:
        shown = [
            Line2D([], [], color="0.3", ls=style, label=label)
            for label, style in zip(panel.curves, styles, strict=False)
        ]
        axes.legend(handles=shown, fontsize=7.5, frameon=False)


def _steps_by_pair(axes: Any, runs: Sequence[LoggedRun], task: str) -> None:
    """A line a seed through its three runs; who never gets there stands above the dashed line."""
    by_algorithm = {ours: ratios(runs, ours, "dapo", task) for ours in ALGORITHMS}
    every = max(len(run.accuracy) - 1 for run in runs)
    never = every * 1.12
    steps = np.array([[min(p["ours"], never) for p in by_algorithm[ours]] for ours in ALGORITHMS])
    places = np.arange(len(ALGORITHMS))
    apart = (np.arange(steps.shape[1]) - (steps.shape[1] - 1) / 2) * 0.06  # so that points at "never" can be counted
    axes.plot(places[:, None] + apart, steps, color="0.75", lw=0.9, zorder=1)
    for place, algorithm, values in zip(places, ALGORITHMS, steps, strict=True):
        axes.scatter(place + apart, values, s=22, color=COLORS[algorithm], zorder=2)
    axes.axhline(every * 1.06, color="0.6", lw=0.8, ls="--")
    axes.set_ylim(0, every * 1.18)
    ticks = sorted({0, every // 4, every // 2, 3 * every // 4, every})
    axes.set_yticks([*ticks, never], [*map(str, ticks), "never"])
    _dress(axes, "Steps to DAPO's final score", "")
    axes.set_xticks(places, [a.upper() for a in ALGORITHMS])
    axes.set_xlim(-0.4, len(ALGORITHMS) - 0.6)


def _ratio_forest(axes: Any, runs: Sequence[LoggedRun]) -> None:
    """Every pair's ratio, the median and its interval; an infinite one stands right of the dashed line."""
    lines = [(ours, task) for ours in ("cispo", "grpo") for task in [*tasks_of(runs), None]]
    found = [[p["ratio"] for p in ratios(runs, ours, "dapo", task)] for ours, task in lines]
    finite = [x for values in found for x in values if math.isfinite(x)]
    edge = max([1.5, *finite]) * 1.15
    for y, ((ours, _), values) in enumerate(zip(lines, found, strict=True)):
        median, low, high = (min(x, edge) for x in median_with_interval(values))
        axes.scatter(
            [min(x, edge) for x in values], [y + 0.25] * len(values), s=12, color=COLORS[ours], alpha=0.5, lw=0
        )
        axes.plot([low, high], [y, y], color=COLORS[ours], lw=2)
        axes.plot([median], [y], "D", color=COLORS[ours], ms=6)
    axes.axvline(1, color="0.5", lw=0.9)
    axes.axvline(CLAIM, color="0.5", lw=0.9, ls=":")
    ticks = [x for x in (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8) if x < edge * 0.95]
    if any(not math.isfinite(x) for values in found for x in values):
        axes.axvline(edge * 0.96, color="0.6", lw=0.8, ls="--")
        axes.set_xticks([*ticks, edge], [*(f"{x:g}" for x in ticks), "never"])
    else:
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    _dress(
        axes,
        "Steps over DAPO's: median, 95% interval,\nbelow them the pairs (dotted: the paper's 0.5)",
        "ratio",
        integer=False,
    )
    axes.set_xlim(0, edge * 1.04)
    axes.set_yticks(range(len(lines)), [f"{ours.upper()}, {task or 'all pairs'}" for ours, task in lines])
    axes.invert_yaxis()


def _dress(axes: Any, title: str, label: str, integer: bool = True) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(label, fontsize=8.5)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if integer:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, steps=[1, 2, 4, 5, 10]))


def _name(figure: Figure, axes: Sequence[Sequence[Any]], tasks: Sequence[str]) -> None:
    """The tasks beside their rows, the algorithms above all."""
    for row, task in zip(axes, tasks, strict=False):
        row[0].set_ylabel(task, fontsize=10)
    shown = [Line2D([], [], color=COLORS[algorithm], lw=2, label=algorithm.upper()) for algorithm in ALGORITHMS]
    figure.legend(handles=shown, loc="outside upper center", ncols=len(shown), fontsize=9, frameon=False)
