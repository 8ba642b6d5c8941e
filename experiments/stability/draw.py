"""stability.png and the tables of README.md, from the logged runs.

python -m experiments.stability.draw [--results=experiments/stability/results] [--to=experiments/stability]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.stability.results import RESULTS, LoggedRun, histogram, load, load_sweep, share_below

HEADS = {
    "head_ordinary_logits_float32": ("as trained", "float32", "tab:blue", "-"),
    "head_ordinary_logits_bfloat16": ("as trained", "bfloat16", "tab:orange", "-"),
    "head_large_logits_float32": ("large", "float32", "tab:blue", "--"),
    "head_large_logits_bfloat16": ("large", "bfloat16", "tab:orange", "--"),
}
"""Name of a result: logits, dtype of the head, colour, line."""
ADAMS = {"paper": "0.9, 0.95, 1e-15", "paper_eps_1e-8": "0.9, 0.95, 1e-8", "defaults": "0.9, 0.999, 1e-8"}
COLOURS = {"paper": "tab:green", "paper_eps_1e-8": "tab:purple", "defaults": "tab:red"}
GRADIENTS = {"ordinary": "as they are", "tiny": "norm clipped to 1e-11"}
PAPER = (0.987, 0.997)
"""Correlation with a bfloat16 and with a float32 head in Figure 3 of MiniMax-M1."""
LAST = 3
"""Steps at the end that a reward is averaged over."""

OUTCOME = ("reward, first step", f"reward, last {LAST}", "held-out, before", "after")

Runs = Mapping[str, Sequence[LoggedRun]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--to", type=Path, default=RESULTS.parent)
    arguments = parser.parse_args()
    runs = load(arguments.results)
    draw(arguments.to / "stability.png", runs, load_sweep(arguments.results))
    for table in tables(runs, load_sweep(arguments.results)):
        print(table, end="\n\n")


def tables(runs: Runs, sweep: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Sweep, E1 and E2 as Markdown; means over the seeds."""
    return [sweep_table(sweep), head_table(runs), adam_table(runs)]


def sweep_table(sweep: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    sizes = sweep["float32"]["size"]
    lines = header("added to the logits", *(f"{s:g}" for s in sizes))
    for head, columns in sweep.items():
        lines.append(f"| {head} head | " + " | ".join(f"{c:.4f}" for c in columns["correlation"]) + " |")
    return "\n".join(lines)


def head_table(runs: Runs) -> str:
    lines = header(
        "logits", "head", "correlation, mean (lowest) of the steps", r"mean \|log r\| at the first update", *OUTCOME
    )
    for name, (logits, head, *_) in HEADS.items():
        if name in runs:
            correlations = np.concatenate([r.curve("mismatch/probability_correlation")[1] for r in runs[name]])
            cells = [
                logits, head, f"{correlations.mean():.4f} ({correlations.min():.4f})",
                f"{mean(r.mean('ratio/abs_log_first_update') for r in runs[name]):.4f}", *outcome(runs[name]),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def adam_table(runs: Runs) -> str:
    lines = header(
        "gradients", "betas and eps", "entries below 1e-14", "denominators under eps", "norm of a step",
        "cosine of consecutive gradients", *OUTCOME,
    )  # fmt: skip
    for size, about in GRADIENTS.items():
        for adam, values in ADAMS.items():
            if found := runs.get(f"adam_{size}_gradients_{adam}"):
                average = lambda metric, found=found: mean(r.mean(metric) for r in found)  # noqa: E731
                cells = [
                    about, values, f"{mean(share_below(histogram(r), -14) for r in found):.2f}",
                    f"{average('optimizer/eps_dominated_share'):.2f}", f"{average('train/update_norm'):.1e}",
                    f"{average('gradient/cosine_consecutive'):.2f}", *outcome(found),
                ]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def header(*cells: str) -> list[str]:
    return ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]


def outcome(runs: Sequence[LoggedRun]) -> list[str]:
    """Reward at the start and at the end, held-out accuracy before and after; each seed behind the mean of several."""
    rewards = [r.curve("reward/mean")[1] for r in runs]
    columns = [
        [r[0] for r in rewards], [r[-LAST:].mean() for r in rewards], [r.heldout[0] for r in runs],
        [r.heldout[1] for r in runs],
    ]  # fmt: skip
    each = lambda values: f" ({', '.join(f'{v:.3f}' for v in values)})" * (len(values) > 1)  # noqa: E731
    return [f"{np.mean(values):.3f}{each(values)}" for values in columns]


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def draw(path: Path, runs: Runs, sweep: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """The page of six panels."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    (ax_sweep, ax_correlation, ax_reward), (ax_histogram, ax_ordinary, ax_tiny) = figure.subplots(2, 3)

    for head, colour in (("float32", "tab:blue"), ("bfloat16", "tab:orange")):
        if head in sweep:
            ax_sweep.plot(sweep[head]["size"], 1 - sweep[head]["correlation"], "o-", color=colour, label=f"{head} head")
    for correlation, text in zip(PAPER, ("bfloat16", "float32"), strict=True):
        ax_sweep.axhline(1 - correlation, color="grey", ls=":", lw=1)
        ax_sweep.text(0, 1.08 * (1 - correlation), f"MiniMax-M1, {text} head", fontsize=7, color="grey")
    ax_sweep.set(yscale="log", xlabel="added to all logits of a token", ylabel="1 - correlation")
    ax_sweep.set_title("E1: engine against trainer, before training", fontsize=10)
    ax_sweep.legend(fontsize=8)

    for name, (logits, head, colour, line) in HEADS.items():
        label = f"{head} head, logits {logits}"
        curve(ax_correlation, runs.get(name, ()), "mismatch/probability_correlation", colour, line, label, gap=True)
        curve(ax_reward, runs.get(name, ()), "reward/mean", colour, line, label)
    ax_correlation.set(yscale="log", xlabel="generation batch", ylabel="1 - correlation")
    ax_correlation.set_title("E1: engine against trainer, in training", fontsize=10)
    ax_reward.set(xlabel="generation batch", ylabel="mean reward")
    ax_reward.set_title("E1: reward", fontsize=10)
    if ax_reward.lines:
        ax_reward.legend(fontsize=7)

    for size, colour in (("ordinary", "tab:blue"), ("tiny", "tab:brown")):
        if found := runs.get(f"adam_{size}_gradients_paper"):
            shares = histogram(found[0])
            ax_histogram.bar([d + 0.5 for d in shares], list(shares.values()), 0.95, color=colour, alpha=0.7,
                             label=f"gradients {GRADIENTS[size]}")  # fmt: skip
    for eps in (-8, -15):
        ax_histogram.axvline(eps, color="black", ls=":", lw=1)
        ax_histogram.text(eps + 0.2, 0.01, f"eps 1e{eps}", fontsize=7, rotation=90, va="bottom")
    ax_histogram.set(
        xlabel="log10 |gradient| as AdamW sees it", ylabel="share of entries", xlim=(-22, 1), ylim=(0, 0.65)
    )
    ax_histogram.set_title("E2: gradients of the first batch", fontsize=10)
    if ax_histogram.patches:
        ax_histogram.legend(fontsize=7)

    for size, axes in (("ordinary", ax_ordinary), ("tiny", ax_tiny)):
        for adam, values in ADAMS.items():
            found = runs.get(f"adam_{size}_gradients_{adam}", ())
            curve(axes, found, "reward/mean", COLOURS[adam], "-", values)
        axes.set(xlabel="generation batch", ylabel="mean reward")
        axes.set_title(f"E2: reward, gradients {GRADIENTS[size]}", fontsize=10)
        if axes.lines:
            axes.legend(fontsize=7)
    top = max(axes.get_ylim()[1] for axes in (ax_reward, ax_ordinary, ax_tiny))
    for axes in (ax_reward, ax_ordinary, ax_tiny):
        axes.set_ylim(0, top)
    figure.savefig(path, dpi=90)


def curve(
    axes: Axes, runs: Sequence[LoggedRun], metric: str, colour: str, line: str, label: str, gap: bool = False
) -> None:
    """Mean over the seeds, each seed thin behind it; `gap` draws 1 - value."""
    if not runs:
        return
    curves = [r.curve(metric) for r in runs]
    steps, values_NT = curves[0][0], np.array([1 - v if gap else v for _, v in curves])
    for values in values_NT if len(values_NT) > 1 else ():
        axes.plot(steps, values, line, color=colour, lw=0.7, alpha=0.4)
    axes.plot(steps, values_NT.mean(axis=0), line, color=colour, lw=1.8, label=label)


if __name__ == "__main__":
    main()
