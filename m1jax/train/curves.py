"""curves.png: the metrics of a run as one page of small panels.

A panel asks for metrics by pattern; what a run does not have is not drawn, and a panel without a curve is left out.
Where `X/mean` comes with `X/low` and `X/high`, the interval is drawn as error bars. This file reads rows and writes a
picture; it knows no run folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Attributes:
        title: what is seen.
        patterns: names of metrics, `*` allowed; every metric that matches one is a curve.
        log: logarithmic axis, where the values are positive and span more than a factor of 10.
        unit: the axis runs from 0 to 1.
    """

    title: str
    patterns: tuple[str, ...]
    log: bool = False
    unit: bool = False


PANELS = (
    Panel("Held-out accuracy (95% interval)", ("heldout/*/mean",), unit=True),
    Panel("Training prompts: reward, accuracy", ("reward/mean", "reward/accuracy", "reward/accuracy/*"), unit=True),
    Panel("Entropy (nats per token)", ("rollout/entropy", "train/entropy")),
    Panel("Response length (tokens)", ("rollout/length_*",)),
    Panel("Endings (share)", ("rollout/share_*",), unit=True),
    Panel("Groups without variance (share)", ("reward/zero_variance_share",), unit=True),
    Panel("Engine against trainer: largest log-prob gap", ("mismatch/largest_logprob_gap",), log=True),
    Panel(
        "Mean |log ratio|, first and later updates",
        ("ratio/abs_log_first_update", "ratio/abs_log_later_updates"),
        log=True,
    ),
    Panel("Importance ratio", ("ratio/mean", "ratio/capped_mean", "ratio/largest"), log=True),
    Panel("Capped tokens by advantage sign (share)", ("ratio/capped_share_positive", "ratio/capped_share_negative")),
    Panel("Dropped tokens by advantage sign (share)", ("ratio/dropped_share_positive", "ratio/dropped_share_negative")),
    Panel("Capped tokens by their probability (share)", ("ratio/capped_share_p_*",)),
    Panel("Dropped tokens by their probability (share)", ("ratio/dropped_share_p_*",)),
    Panel(
        "Busiest expert over the mean, and in its worst layer",
        ("router/load_largest_over_mean", "router/load_largest_over_mean_worst_layer"),
    ),
    Panel(
        "Experts the trainer would not choose (share)",
        ("router/replay_differs", "router/replay_differs_later_updates"),
    ),
    Panel("Age of tokens (generation batches)", ("rollout/staleness_mean", "rollout/staleness_largest")),
    Panel("Requests to servers that failed, servers out", ("engine/faults", "engine/servers_out", "engine/restarts")),
    Panel("Loss", ("train/loss",)),
    Panel("Gradient norm", ("train/grad_norm",), log=True),
    Panel("Tokens per second", ("time/tokens_per_second",)),
    Panel(
        "Seconds by stage",
        tuple(f"time/{stage}" for stage in ("rollout", "reward", "update", "sync", "evaluate", "compile")),
    ),
)
"""The panels in reading order: is it better, does it still explore, is it sound, what does it cost."""


def draw_curves(
    path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], title: str = "", panels: Sequence[Panel] = PANELS
) -> bool:
    """Draw the panels that have data; False (and no file) where none has.

    Args:
        path: the PNG, replaced at once.
        rows: one mapping per step, with "step"; null and absent values are gaps.
        title: head of the page.
        panels: what to draw.
    """
    # The object interface, not pyplot: no global state, no display, no backend to choose.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name, value in row.items() if _drawable(value)} - {"step", "time"})
    chosen = [(panel, curves) for panel in panels if (curves := _matching(names, panel.patterns))]
    if not chosen:
        return False
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    width, height = 4.6 * columns, 2.9 * lines + (0.4 if title else 0.0)  # inches, as all of these
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    # Room for ticks and titles by hand: a layout engine would draw everything once more to measure it.
    side, below, above, gap = 0.62, 0.5, 0.35 + (0.4 if title else 0.0), 0.65
    inside = (width - side - 0.2 - gap * (columns - 1)) / columns, (height - below - above - gap * (lines - 1)) / lines
    figure.subplots_adjust(
        side / width, below / height, 1 - 0.2 / width, 1 - above / height, gap / inside[0], gap / inside[1]
    )
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", y=1 - 0.12 / height)
    colors: dict[str, str] = {}  # what a `*` stands for, a task say, has one color on the whole page
    for place, (panel, curves) in enumerate(chosen, 1):
        axes = figure.add_subplot(lines, columns, place)
        for number, name in enumerate(curves):
            label, starred = _label(name, panel.patterns)
            plain = ("0.25", "C9", "C6", "C8", "C7", "C5")[number % 6]  # apart from the first colors of `colors`
            color = colors.setdefault(label, f"C{len(colors) % 10}") if starred else plain
            _draw(axes, rows, name, label, color)
        _dress(axes, panel, [row[name] for name in curves for row in rows if _drawable(row.get(name))])
        if place > len(chosen) - columns:
            axes.set_xlabel("step", fontsize=9)
    path = Path(path)
    staging = path.with_name(path.name + ".new")
    figure.savefig(staging, format="png")
    staging.replace(path)
    return True


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], name: str, label: str, color: str) -> None:
    points = [(row["step"], row[name], row) for row in rows if _drawable(row.get(name))]
    steps, values = [p[0] for p in points], [p[1] for p in points]
    stem = name.removesuffix("/mean")
    if stem != name and all(_drawable(row.get(f"{stem}/{end}")) for *_, row in points for end in ("low", "high")):
        bars = [[value - row[f"{stem}/low"] for _, value, row in points]]
        bars.append([row[f"{stem}/high"] - value for _, value, row in points])
        axes.errorbar(steps, values, yerr=bars, color=color, marker="o", ms=3.5, lw=1.4, capsize=3, label=label)
    elif len(values) >= 40:
        # Noise in the background, its running mean in front.
        axes.plot(steps, values, color=color, lw=0.8, alpha=0.3)
        axes.plot(steps, _smooth(values, len(values) // 20), color=color, lw=1.6, label=label)
    else:
        axes.plot(steps, values, color=color, lw=1.5, marker="o" if len(values) < 3 else "", ms=3.5, label=label)


def _dress(axes: Any, panel: Panel, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if panel.log and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    if panel.unit:
        axes.set_ylim(-0.02, 1.02)
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1 or (labels and "*" in "".join(panel.patterns)):
        axes.legend(fontsize=7.5, frameon=False, ncols=2 if len(labels) > 4 else 1)


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Names that match, in the order of the patterns, each once."""
    return list(dict.fromkeys(name for pattern in patterns for name in names if fnmatchcase(name, pattern)))


def _label(name: str, patterns: Sequence[str]) -> tuple[str, bool]:
    """`(label, whether a * matched it)`: what `*` stands for, or else the name after its stage."""
    for pattern in patterns:
        if fnmatchcase(name, pattern) and "*" in pattern:
            head, tail = pattern.split("*", 1)
            return name.removeprefix(head).removesuffix(tail), True
    return name.split("/", 1)[-1].replace("_", " "), False


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """Running mean over `reach` values to either side, fewer at the ends."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _drawable(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
