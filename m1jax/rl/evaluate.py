"""Held-out accuracy: the run's own engine and verifiers on problems that no run trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from m1jax.rewards.format import format_reward
from m1jax.types import ENDINGS, Engine, Prompt, Rollout, Sampling


@dataclass(frozen=True)
class Answered:
    """One held-out prompt with its response, as text too, and whether it was right."""

    prompt: Prompt
    rollout: Rollout
    text: str
    correct: bool


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    score: Callable[[Sequence[Prompt], Sequence[Sequence[Rollout]]], tuple[Sequence[str], Iterable[float]]],
) -> list[Answered]:
    """Answer every prompt once.

    Args:
        engine, prompts, sampling, seed: what is asked of whom.
        score: the reward stage, rollouts to (texts, correctness) in order.
    """
    if not prompts:
        return []
    rollouts = engine.generate(prompts, 1, sampling, seed)
    texts, correct = score(prompts, rollouts)
    return [Answered(p, r, t, c >= 1.0) for p, (r,), t, c in zip(prompts, rollouts, texts, correct, strict=True)]


def accuracy_by_task(answers: Sequence[Answered]) -> dict[str, tuple[int, int]]:
    """Per task (right answers, answers), in the order of first appearance."""
    table: dict[str, tuple[int, int]] = {}
    for answer in answers:
        right, n = table.get(answer.prompt.problem.task, (0, 0))
        table[answer.prompt.problem.task] = (right + answer.correct, n + 1)
    return table


def manner(answers: Sequence[Answered]) -> dict[str, Any]:
    """How answers are, right or wrong: share in exact form, mean length in tokens, share of each ending."""
    n = max(len(answers), 1)
    return {
        "format": sum(format_reward(a.text) for a in answers) / n,
        "mean_length": sum(len(a.rollout.token_ids) for a in answers) / n,
        "endings": {ending: sum(a.rollout.ending == ending for a in answers) / n for ending in ENDINGS},
    }
