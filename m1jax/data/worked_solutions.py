"""Worked solutions for the SFT cold start, with slips that are noticed and mended.

Of `How many 1 bits are there in the binary representation of the number 345?`:

    <think> 345:1 172:1 86:1 43:2 21:3 10:3 5:4 2:4 1:5</think><answer>5</answer>

and with a slip at the fifth step: `... 43:2 22 wait 21:3 10:3 ...`. A step may only go wrong in its new number, and
the next words take it back, so that every text still ends in the right answer. A new task is a function
`(entry, slip) -> (steps, answer)` in `SOLVERS`. Nothing here knows tokens, lengths or how SFT mixes these texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from m1jax.errors import UserError
from m1jax.types import Problem

Slip = Callable[[int], str]
"""From the right number to what is written in its place: `21`, or now and then `22 wait 21`."""


def worked_solution(problem: Problem, rng: Random, reflection: float) -> str:
    """Return `<think>…</think><answer>…</answer>` (no end token) for a problem of a reasoning_gym task.

    Args:
        problem: its `row` is that of `m1jax.data.problems.GymTask`.
        rng: draws the slips.
        reflection: probability, step by step, of a slip and its correction.

    Raises:
        UserError: no solver for this task; the message names those there are.
    """
    name = problem.row.get("dataset", problem.task)
    if name not in SOLVERS:
        raise UserError(f"task {problem.task}: no worked solutions for {name}; there are some for {', '.join(SOLVERS)}")

    def slip(number: int) -> str:
        if rng.random() >= reflection:
            return str(number)
        wrong = number + rng.choice([-2, -1, 1, 2])
        return f"{abs(wrong) if number >= 0 else wrong} wait {number}" if wrong != -number else str(number)

    steps, answer = SOLVERS[name](problem.row["entry"], slip)
    return f"<think> {' '.join(steps)}</think><answer>{answer}</answer>"


def _count_bits(entry: Mapping[str, Any], slip: Slip) -> tuple[list[str], str]:
    """Halve until 1, with the ones seen so far: `5:1 2:1 1:2`."""
    number, ones, steps = entry["metadata"]["number"], 0, []
    while number:
        ones += number % 2
        steps.append(f"{slip(number) if steps else number}:{ones}")
        number //= 2
    return steps, str(ones)


def _chain_sum(entry: Mapping[str, Any], slip: Slip) -> tuple[list[str], str]:
    """Running totals: `4 + 3 - 7` is `4+3=7 7-7=0`."""
    first, *rest = re.findall(r"[+-]?\s*-?\d+", entry["metadata"]["expression"])
    total, steps = int(first), []
    for term in rest:
        sign, number = term[0], int(term[1:])
        after = total + number if sign == "+" else total - number
        steps.append(f"{total}{sign}{number}={slip(after)}")
        total = after
    return steps or [str(total)], str(total)


def _basic_arithmetic(entry: Mapping[str, Any], slip: Slip) -> tuple[list[str], str]:
    """As `_chain_sum`, which is what it is without products and parentheses."""
    expression = entry["metadata"]["expression"]
    if set(expression) - set("0123456789+- "):
        raise UserError(
            f"basic_arithmetic: worked solutions know sums only, not {expression!r}; "
            f"set operators=('+', '-'), allow_parentheses=False, allow_negation=False"
        )
    return _chain_sum(entry, slip)


def _gcd(entry: Mapping[str, Any], slip: Slip) -> tuple[list[str], str]:
    """Euclid by remainders, folded over the numbers: gcd(48, 36) is `48%36=12 36%12=0`."""
    first, *rest = entry["metadata"]["numbers"]
    steps = []
    for other in rest:
        while other:
            steps.append(f"{first}%{other}={slip(first % other)}")
            first, other = other, first % other
    return steps, str(first)


def _base_conversion(entry: Mapping[str, Any], slip: Slip) -> tuple[list[str], str]:
    """Horner into decimal, then digits by division, last first: `1 2 5 10 20 : 20%3=2 6%3=0 2%3=2`."""
    meta = entry["metadata"]
    source, target = meta["source_base"], meta["target_base"]
    value, steps = 0, []
    for digit in meta["source_repr"]:
        value = value * source + int(digit, 36)
        steps.append(slip(value))
    steps.append(":")
    while value:
        steps.append(f"{value}%{target}={slip(value % target)}")
        value //= target
    return steps, meta["target_repr"]


SOLVERS: dict[str, Callable[[Mapping[str, Any], Slip], tuple[list[str], str]]] = {
    "count_bits": _count_bits,
    "chain_sum": _chain_sum,
    "basic_arithmetic": _basic_arithmetic,
    "gcd": _gcd,
    "base_conversion": _base_conversion,
}
