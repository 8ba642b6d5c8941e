"""Prompts in their order: one global index names every prompt of a run, and the index is all there is to resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grain

from m1jax.types import Problem, Prompt

HELDOUT_INDEX = 1 << 31
"""Held-out prompts are numbered from here, so that their sampling noise is never that of a training prompt."""


class PromptSource:
    """All training prompts of a run in shuffled order, again and again: `source[index]` for index = 0, 1, 2, ...

    Args:
        problems: a random-access source of problems.
        tokenize: question to prompt ids.
        seed: of the order; every pass over the problems is shuffled anew.
    """

    def __init__(self, problems: Sequence[Problem], tokenize: Callable[[str], tuple[int, ...]], seed: int):
        self._order = grain.MapDataset.source(problems).seed(seed).shuffle().repeat()
        self._tokenize = tokenize

    def __getitem__(self, index: int) -> Prompt:
        problem: Problem = self._order[index]
        return Prompt(index, problem, self._tokenize(problem.question))

    def take(self, cursor: int, count: int) -> list[Prompt]:
        """Prompts cursor, ..., cursor + count - 1."""
        return [self[index] for index in range(cursor, cursor + count)]


def heldout_prompts(problems: Sequence[Problem], tokenize: Callable[[str], tuple[int, ...]]) -> list[Prompt]:
    """Prompts of held-out problems, numbered apart from all training prompts."""
    return [Prompt(HELDOUT_INDEX + i, problem, tokenize(problem.question)) for i, problem in enumerate(problems)]
