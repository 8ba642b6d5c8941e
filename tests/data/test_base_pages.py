"""Pages that a base model reads: three kinds in their shares, guesses near the answer."""

from collections import Counter
from random import Random

import pytest

from m1jax.data.base_pages import page
from m1jax.data.problems import parse_tasks
from m1jax.errors import UserError
from m1jax.rewards.format import extract_answer
from m1jax.types import Problem


def test_pages_come_in_their_shares():
    (task,) = parse_tasks("count_bits(min_n=1, max_n=2047)")
    kinds, right, n = Counter(), Counter(), 2000
    for i in range(n):
        problem = task[i]
        text = page(problem, Random(i), 0.0)
        kind = "guess" if text.startswith("<think></think>") else "worked" if text.startswith("<think>") else "notes"
        kinds[kind] += 1
        right[kind] += extract_answer(text) == problem.answer
        if kind == "guess":
            assert abs(int(extract_answer(text)) - int(problem.answer)) <= 3
        if kind == "notes":
            assert "<" not in text and extract_answer(text) is None and text.split()[-1].startswith("1:")
    # Within four standard deviations of a share.
    for kind, share in (("guess", 0.60), ("notes", 0.25), ("worked", 0.15)):
        assert abs(kinds[kind] / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert right["worked"] == kinds["worked"] and right["notes"] == 0
    assert 0.2 < right["guess"] / kinds["guess"] < 0.35


def test_answers_that_are_no_integers_are_refused():
    entry = {"metadata": {"source_base": 10, "target_base": 16, "source_repr": "10", "target_repr": "a"}}
    problem = Problem("t", "q", "a", {"dataset": "base_conversion", "entry": entry})
    with pytest.raises(UserError, match="task t: pages need integers as answers, and one is 'a'"):
        for seed in range(20):
            page(problem, Random(seed), 0.0)
