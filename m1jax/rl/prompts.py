"""Prompts in their order: one global index names every prompt of a run, and the index is all there is to resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grain
from grain.sources import RandomAccessDataSource

from m1jax.errors import UserError
from m1jax.types import HELDOUT_INDEX, Problem, Prompt

Tokenize = Callable[[str], tuple[int, ...]]


class PromptSource:
    """All training prompts of a run in shuffled order, again and again: `source[index]` for index = 0, 1, 2, ...

    Args:
        problems: a random-access source of problems.
        tokenize: question to prompt ids.
        window: longest prompt allowed, in tokens.
        seed: of the order; every pass over the problems is shuffled anew.
        distinct: ask the first so many problems only, again and again; 0 asks all. The index goes on, so that the
            sampling noise is another one every time.
    """

    def __init__(
        self, problems: RandomAccessDataSource[Problem], tokenize: Tokenize, window: int, seed: int, distinct: int = 0
    ):
        self._distinct = distinct
        self._order = grain.MapDataset.source(problems).seed(seed).shuffle().repeat()
        self._tokenize, self._window = tokenize, window

    def __getitem__(self, index: int) -> Prompt:
        problem = self._order[index % self._distinct if self._distinct else index]
        assert problem is not None  # a filter could leave gaps; there is none
        return make_prompt(index, problem, self._tokenize, self._window)

    def take(self, cursor: int, count: int) -> list[Prompt]:
        """Prompts cursor, ..., cursor + count - 1."""
        return [self[index] for index in range(cursor, cursor + count)]


def heldout_prompts(problems: Sequence[Problem], tokenize: Tokenize, window: int) -> list[Prompt]:
    """Prompts of held-out problems, numbered apart from all training prompts."""
    return [make_prompt(HELDOUT_INDEX + i, problem, tokenize, window) for i, problem in enumerate(problems)]


def make_prompt(index: int, problem: Problem, tokenize: Tokenize, window: int) -> Prompt:
    """A problem as a prompt.

    Raises:
        UserError: it is longer than the window.
    """
    token_ids = tokenize(problem.question)
    if len(token_ids) > window:
        kind = "held-out prompt" if index >= HELDOUT_INDEX else "prompt"
        raise UserError(
            f"{kind} {index % HELDOUT_INDEX} of task {problem.task} has {len(token_ids)} tokens, the window {window}: "
            f"{problem.question[:40]!r}...; raise config.problems.max_prompt_tokens"
        )
    return Prompt(index, problem, token_ids)
