"""What was measured, as Markdown tables; plain values in, the same as in results.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.bench.peers.workloads import RL, WORKLOADS, Decode

Reply = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A number taken from the reply of one round.

    Attributes:
        unit: as the table names it.
        value: from a reply.
        higher_is_better: a rate, not a cost.
    """

    unit: str
    value: Callable[[Reply], float]
    higher_is_better: bool = False


def figures(name: str) -> list[Figure]:
    """What is told of a workload; CPU seconds too, since they hardly change when other programs want the cores."""
    work = WORKLOADS[name]
    if isinstance(work, RL):
        return [
            Figure("CPU s per update", lambda reply: reply["cpu"] / reply["updates"]),
            Figure("wall s per update", lambda reply: reply["wall"] / reply["updates"]),
        ]
    if isinstance(work, Decode):
        return [
            Figure("tokens per s", lambda reply: reply["tokens"] / reply["wall"], higher_is_better=True),
            Figure("tokens per CPU s", lambda reply: reply["tokens"] / reply["cpu"], higher_is_better=True),
        ]
    return [Figure("wall s", lambda reply: reply["wall"]), Figure("CPU s", lambda reply: reply["cpu"])]


def ratio(ours: Sequence[float], theirs: Sequence[float], higher_is_better: bool) -> tuple[float, float, float]:
    """How many times better ours is: of the medians, and the lowest and highest of any round's own pair."""
    better = (lambda a, b: a / b) if higher_is_better else (lambda a, b: b / a)
    pairs = [better(a, b) for a, b in zip(ours, theirs, strict=True)]
    return better(statistics.median(ours), statistics.median(theirs)), min(pairs), max(pairs)


def lines(results: Mapping[str, Any]) -> list[str]:
    """The tables of everything in `results`."""
    machine = results["machine"]
    out = [
        f"{machine['cpu']}, {machine['cores']} core(s) to run on, load {machine['load_before']:.1f} before; "
        f"medians (lowest to highest) of interleaved rounds",
        "",
    ]
    out += [
        f"- {side}: {', '.join(f'{n} {v}' for n, v in found.items())}" for side, found in results["versions"].items()
    ]
    if results["workloads"]:
        out += ["", "| workload | | m1jax | peer | times better |", "| --- | --- | ---: | ---: | ---: |"]
    for name, sides in results["workloads"].items():
        (_, ours), (peer, theirs) = sides.items()
        for number, figure in enumerate(figures(name)):
            a, b = ([figure.value(reply) for reply in side["rounds"]] for side in (ours, theirs))
            middle, low, high = ratio(a, b, figure.higher_is_better)
            out.append(
                f"| {name if number == 0 else ''} | {figure.unit} | {_spread(a)} | {peer} {_spread(b)} | "
                f"**{middle:.2f}** ({low:.2f} to {high:.2f}) |"
            )
    if results["workloads"]:
        out += ["", "| workload | side | parameters | to prepare, wall s | setting | last round |"]
        out.append("| --- | --- | ---: | ---: | --- | --- |")
    for name, sides in results["workloads"].items():
        for side, values in sides.items():
            about, last = values["prepare"], values["rounds"][-1]
            more = ", ".join(f"{key} {_number(value)}" for key, value in last.items() if key not in ("wall", "cpu"))
            out.append(
                f"| {name} | {side} | {about['parameters']:,} | {about['wall']:.1f} | {about['setting']} | {more} |"
            )
    if parity := results.get("parity"):
        out += [
            "",
            f"The same log-probabilities, advantages and mask through m1jax's CISPO and TRL's: loss "
            f"{parity['loss']:.6f}, difference {parity['loss_difference']:.1e}; largest gradient "
            f"{parity['largest_gradient']:.1e}, largest difference {parity['largest_gradient_difference']:.1e}",
        ]
    return out


def _spread(values: Sequence[float]) -> str:
    return f"{_number(statistics.median(values))} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    """Three digits that count; whole numbers with commas."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
