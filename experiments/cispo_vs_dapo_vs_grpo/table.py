"""Every number of the study's README, computed again from the logged runs, as Markdown.

    python -m experiments.cispo_vs_dapo_vs_grpo.table [--results=FOLDER] [--figure[=FILE.png]]

FOLDER has `tune/` and `study/` (default: the `results/` beside this file). --figure draws the overview, too (default:
`results.png` beside this file). Intervals are 95% bootstrap intervals over seeds, or over pairs of runs with one seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.cispo_vs_dapo_vs_grpo import figures
from experiments.cispo_vs_dapo_vs_grpo.results import (
    ALGORITHMS,
    CLAIM,
    CPU_LIMIT,
    RESULTS,
    LoggedRun,
    best_rates,
    check_pairs,
    final_differences,
    holds,
    load,
    mean_with_interval,
    median_with_interval,
    ratios,
    select,
    steps_to,
    tasks_of,
    tuning_scores,
)
from m1jax.errors import UserError

SHARES_OF_GAIN = (0.25, 0.5, 0.75, 0.9)
FIGURE = Path(__file__).parent / "results.png"
NAMES = [a.upper() for a in ALGORITHMS]


@dataclass(frozen=True)
class Measure:
    """One line of a table.

    Attributes:
        label: what it is.
        metric: its name in the rows of a result.
        how: over the steps of a run, by `results.REDUCE`.
        over_runs: "mean" with its interval, or "max" or "min", which has none.
    """

    label: str
    metric: str
    how: str
    over_runs: str = "mean"


BINS = (("p < 0.1", "p_below_0.1"), ("0.1 ≤ p < 0.5", "p_0.1_to_0.5"), ("p ≥ 0.5", "p_above_0.5"))
SIGNS = (("advantage > 0", "positive"), ("advantage < 0", "negative"))
WHAT = (("capped", "capped"), ("without gradient", "dropped"))

SHARES = (
    *(Measure(f"{w}, {label}", f"ratio/{k}_share_{name}", "mean") for w, k in WHAT for label, name in SIGNS),
    *(Measure(f"{w}, {label}", f"ratio/{k}_share_{name}", "mean") for w, k in WHAT for label, name in BINS),
    Measure("p < 0.1 with a gradient, updates 2 to 16", "rare/gradient_share_later_updates", "mean"),
)
RATIOS = (
    Measure("mean abs log r, updates 2 to 16", "ratio/abs_log_later_updates", "mean"),
    Measure("largest r of all runs", "ratio/largest", "largest", "max"),
    Measure("cosine of consecutive gradients", "gradient/cosine_consecutive", "mean"),
    Measure("AdamW: share with eps above sqrt(v)", "optimizer/eps_dominated_share", "mean"),
)
POLICY = (
    Measure("entropy, step 1", "rollout/entropy", "first"),
    Measure("entropy, all steps", "rollout/entropy", "mean"),
    Measure("entropy, last four", "rollout/entropy", "last"),
    Measure("perplexity, last four", "rollout/perplexity", "last"),
    Measure("length, step 1", "rollout/length_mean", "first"),
    Measure("length, last four", "rollout/length_mean", "last"),
    Measure("length of right answers, last four", "rollout/length_correct", "last"),
    Measure("length of wrong answers, last four", "rollout/length_incorrect", "last"),
)
FAILURES = (
    Measure("cut for repetition, all steps", "rollout/share_repetition", "mean"),
    Measure("cut for repetition, worst step of all runs", "rollout/share_repetition", "largest", "max"),
    Measure("window full, all steps", "rollout/share_length", "mean"),
    Measure("window full, worst step of all runs", "rollout/share_length", "largest", "max"),
    Measure("lowest mean length over that of step 1, worst run", "rollout/length_mean", "lowest share of first", "min"),
)
COST = (Measure("generated tokens of a run", "rollout/tokens", "total"),)
MEASURES = (*SHARES, *RATIOS, *POLICY, *FAILURES, *COST)


def main(argv: Sequence[str]) -> None:
    from experiments import cli

    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", default=str(RESULTS), metavar="FOLDER")
    parser.add_argument("--figure", nargs="?", const=str(FIGURE), metavar="FILE.png")
    arguments = parser.parse_args(argv)
    print(page(Path(arguments.results)))
    if arguments.figure:
        figures.save(figures.overview(load(Path(arguments.results) / "study")), Path(arguments.figure))


def page(folder: Path) -> str:
    """All tables.

    Raises:
        UserError: results are missing, a pair is incomplete, or a run did not use the rate that was tuned for it.
    """
    tuning, runs = load(folder / "tune"), load(folder / "study")
    check_pairs(runs, folder / "study")
    best = best_rates(tuning)
    for run in runs:
        (task, seed, algorithm), rate = run.cell, run.about["learning_rate"]
        if (task, algorithm) not in best:
            raise UserError(f"{folder}/tune: no results of {task}, {algorithm}; run with --phase=tune first")
        if rate != best[task, algorithm]:
            raise UserError(
                f"{folder}/study: {task}, seed {seed}, {algorithm} ran at rate {rate:g}, but the tuning gives "
                f"{best[task, algorithm]:g}; delete it and run the study again"
            )
    parts = [
        ("Tuning: final score by learning rate, the one that was taken in bold", tuning_table(tuning)),
        ("Final score, mean over seeds", finals_table(runs)),
        ("Final score, paired difference", differences_table(runs)),
        ("Steps to DAPO's final score, as a ratio to DAPO's", ratio_table(runs)),
        ("The same, pair by pair", pairs_table(runs)),
        ("Not in the protocol: the ratio of steps to a part of DAPO's gain", shares_table(runs)),
        (
            "Tokens that a bound acts on (shares of all tokens, or of those of a probability p)",
            measures_table(runs, SHARES),
        ),
        ("Ratios and gradients", measures_table(runs, RATIOS)),
        ("Entropy (nats a token) and length (tokens)", measures_table(runs, POLICY)),
        ("Failure modes (shares of responses)", measures_table(runs, FAILURES)),
        ("Cost", measures_table(runs, COST) + "\n\n" + cpu_table(tuning, runs)),
    ]
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts)


def tuning_table(tuning: Sequence[LoggedRun]) -> str:
    """Means by rate, the chosen one in bold."""
    scores, best = tuning_scores(tuning), best_rates(tuning)
    rates = sorted({rate for by_rate in scores.values() for rate in by_rate})
    rows = []
    for task in tasks_of(tuning):
        for algorithm in ALGORITHMS:
            by_rate = scores[task, algorithm]
            means = {rate: f"{np.mean(by_rate[rate]):.3f}" for rate in rates}
            means[best[task, algorithm]] = f"**{means[best[task, algorithm]]}**"
            rows.append([task, algorithm.upper(), len(by_rate[rates[0]]), *means.values()])
    edges = [f"{t} {a.upper()}" for (t, a), rate in sorted(best.items()) if rate in (rates[0], rates[-1])]
    note = f"\n\nChosen at the edge of the grid: {', '.join(edges)}." if edges and len(rates) > 1 else ""
    return markdown(["task", "algorithm", "seeds", *(f"{rate:g}" for rate in rates)], rows) + note


def finals_table(runs: Sequence[LoggedRun]) -> str:
    """By task and algorithm."""
    rows = []
    for task in tasks_of(runs):
        start = np.mean([run.accuracy[0] for run in runs if run.cell[0] == task])
        scores = [[run.final for run in select(runs, task, algorithm)] for algorithm in ALGORITHMS]
        rows.append(
            [task, len(scores[0]), f"{start:.3f}", *(interval(mean_with_interval(x), "{:.3f}") for x in scores)]
        )
    return markdown(["task", "seeds", "step 0", *NAMES], rows)


def differences_table(runs: Sequence[LoggedRun]) -> str:
    """By task and over all pairs."""
    rows = []
    for task in [*tasks_of(runs), None]:
        cells = [mean_with_interval(final_differences(runs, ours, "dapo", task)) for ours in ("cispo", "grpo")]
        rows.append([task or "all", *(interval(c, "{:+.3f}") for c in cells)])
    return markdown(["task", "CISPO - DAPO", "GRPO - DAPO"], rows)


def ratio_table(runs: Sequence[LoggedRun]) -> str:
    """The measure, by task and over all pairs, and whether the claim holds."""
    rows, verdict = [], ""
    for ours in ("cispo", "grpo"):
        for task in [*tasks_of(runs), None]:
            pairs = ratios(runs, ours, "dapo", task)
            measured = median_with_interval([p["ratio"] for p in pairs])
            to_all = median_with_interval([p["ratio_to_all"] for p in pairs])
            censored = sum(math.isinf(p["ours"]) for p in pairs)
            own = sum(math.isinf(p["theirs"]) for p in pairs)
            name = "all" if task is None else task
            rows.append(
                [f"{ours.upper()} / DAPO", name, len(pairs), interval(measured), censored, own, interval(to_all)]
            )
            if ours == "cispo" and task is None:
                _, low, high = measured
                verdict = (
                    f"The claim of the paper, a ratio of {CLAIM:g}, {'holds' if holds(low, high) else 'does not hold'} "
                    f"here: the interval over all pairs {'lies' if high < 1 else 'does not lie'} below 1 and "
                    f"{'contains' if low <= CLAIM <= high else 'does not contain'} {CLAIM:g}."
                )
    head = ["", "task", "pairs", "median ratio", "censored", "DAPO never there", "median ratio to all of DAPO's steps"]
    return markdown(head, rows) + "\n\n" + verdict


def shares_table(runs: Sequence[LoggedRun]) -> str:
    """The ratio at a part of DAPO's gain, where fewer runs are censored. Not in the protocol."""
    rows = []
    for ours in ("cispo", "grpo"):
        for task in [*tasks_of(runs), None]:
            by_share = [[p["ratio"] for p in ratios(runs, ours, "dapo", task, share)] for share in SHARES_OF_GAIN]
            cells = [interval(median_with_interval(values)) for values in by_share]
            rows.append([f"{ours.upper()} / DAPO", "all" if task is None else task, *cells])
    return markdown(["", "task", *(f"{share:.0%} of DAPO's gain" for share in SHARES_OF_GAIN)], rows)


def pairs_table(runs: Sequence[LoggedRun]) -> str:
    """Steps of the three runs of each task and seed, and both ratios."""
    by_cell = {run.cell: run for run in runs}
    rows = []
    for cispo, grpo in zip(ratios(runs, "cispo", "dapo"), ratios(runs, "grpo", "dapo"), strict=True):
        task, seed, threshold = cispo["task"], cispo["seed"], cispo["threshold"]
        steps = [steps_to(by_cell[task, seed, algorithm].accuracy, threshold) for algorithm in ALGORITHMS]
        numbers = [*steps, cispo["ratio"], grpo["ratio"]]
        rows.append([task, seed, f"{threshold:.3f}", *(number(x, "{:.2f}") for x in numbers)])
    steps = [f"{name}, steps" for name in NAMES]
    return markdown(["task", "seed", "DAPO's final score", *steps, "CISPO / DAPO", "GRPO / DAPO"], rows)


def measures_table(runs: Sequence[LoggedRun], measures: Iterable[Measure]) -> str:
    """One line a measure and task."""
    rows = []
    for task in tasks_of(runs):
        for measure in measures:
            cells = []
            for algorithm in ALGORITHMS:
                values = [run.reduced(measure.metric, measure.how) for run in select(runs, task, algorithm)]
                if measure.over_runs == "mean":
                    cells.append(interval(mean_with_interval(values), "{:.3g}" if max(values) < 1000 else "{:,.0f}"))
                else:
                    cells.append(number({"max": max, "min": min}[measure.over_runs](values)))
            rows.append([task, measure.label, *cells])
    return markdown(["task", "", *NAMES], rows)


def cpu_table(tuning: Sequence[LoggedRun], runs: Sequence[LoggedRun]) -> str:
    """CPU seconds of a run, median and largest, by task and algorithm, and the largest of all, tuning included."""
    rows = []
    for task in tasks_of(runs):
        seconds = [[run.about["cpu_seconds"] for run in select(runs, task, algorithm)] for algorithm in ALGORITHMS]
        rows.append(
            [task, "CPU seconds of a run: median, largest", *(f"{np.median(x):.0f}, {max(x):.0f}" for x in seconds)]
        )
    everything = [run.about["cpu_seconds"] for run in [*tuning, *runs]]
    note = (
        f"Largest of all {len(everything)} runs, tuning included: {max(everything):.1f} CPU seconds "
        f"({'within' if max(everything) <= CPU_LIMIT else 'over'} the bound of {CPU_LIMIT})."
    )
    return markdown(["task", "", *NAMES], rows) + "\n\n" + note


def number(value: float, form: str = "{:.3g}") -> str:
    """As text: ∞ for what never happened, – for what was not recorded."""
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else form.format(value)


def interval(triple: tuple[float, float, float], form: str = "{:.2f}") -> str:
    """`middle [low, high]`, or `middle` alone where nothing varies."""
    middle, low, high = (number(float(x), form) for x in triple)
    return middle if low == middle == high else f"{middle} [{low}, {high}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    from experiments import cli

    cli.exit_with(main, uses_jax=False)
