"""What a tiny base model reads: questions of the tasks as a scruffy web would answer them.

Most pages guess, many work the answer out without saying so in the asked form, and few do both:

    guess    60%    <think></think><answer>4</answer>                    right about one time in four, else near
    notes    25%    345:1 172:1 86:1 43:2 21:3 10:3 5:4 2:4 1:5          no tags, no answer
    worked   15%    <think> 345:1 172:1 ... 1:5</think><answer>5</answer>

So the base model can do the work and seldom does: the first token of a thought is a fork whose good branch is rare,
which is the case that MiniMax-M1 (section 3.1) makes against dropping tokens. Nothing here is weighted towards answers.
"""

from __future__ import annotations

import re
from random import Random

from m1jax.data.worked_solutions import worked_solution
from m1jax.errors import UserError
from m1jax.types import Problem

GUESS, NOTES = 0.60, 0.25


def page(problem: Problem, rng: Random, reflection: float) -> str:
    """What follows the question on one page of the corpus.

    Args:
        problem: of a task that has worked solutions.
        rng: draws the kind of page, the guess and the slips.
        reflection: share of steps with a slip and its correction.

    Raises:
        UserError: no worked solutions for the task, or its answers are no integers, so that no guess is near one.
    """
    worked = worked_solution(problem, rng, reflection)
    kind = rng.random()
    if kind < GUESS:
        if not re.fullmatch(r"-?\d+", problem.answer or ""):
            raise UserError(f"task {problem.task}: pages need integers as answers, and one is {problem.answer!r}")
        answer = int(problem.answer or 0)
        guess = answer if rng.random() < 0.25 else abs(answer + rng.choice([-3, -2, -1, 1, 2, 3]))
        return f"<think></think><answer>{guess}</answer>"
    if kind < GUESS + NOTES:
        return worked.removeprefix("<think>").partition("</think>")[0]
    return worked
