"""Claims about worked_solutions.py: every text ends in the right answer, slips come and are taken back."""

from random import Random

import pytest

from m1jax.data.problems import parse_tasks
from m1jax.data.worked_solutions import SOLVERS, worked_solution
from m1jax.errors import UserError
from m1jax.rewards.format import extract_answer, format_reward
from m1jax.rewards.reasoning_gym import score
from m1jax.types import Problem

SPECS = [
    "count_bits(max_n=2047)",
    "chain_sum(max_terms=4, max_digits=1)",
    "chain_sum(allow_negation=True)",
    "basic_arithmetic(max_terms=4, max_digits=1, operators=('+',), allow_parentheses=False, allow_negation=False)",
    "basic_arithmetic(max_terms=3, operators=('+', '-'), allow_parentheses=False, allow_negation=False)",
    "gcd(max_numbers=4)",
    "base_conversion(min_value=1, max_base=36)",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("reflection", [0.0, 0.5])
def test_every_answer_gets_full_credit(spec, reflection):
    (task,) = parse_tasks(spec)
    rng = Random(0)
    for problem in map(task.__getitem__, range(300)):
        text = worked_solution(problem, rng, reflection)
        assert format_reward(text) == 1.0
        assert score(extract_answer(text), problem.row) == 1.0, text


def problem(dataset, **metadata):
    return Problem("t", "q", "a", {"dataset": dataset, "entry": {"metadata": metadata}})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (problem("count_bits", number=345), "345:1 172:1 86:1 43:2 21:3 10:3 5:4 2:4 1:5</think><answer>5"),
        (problem("chain_sum", expression="4 + 3 - 7 + 2"), "4+3=7 7-7=0 0+2=2</think><answer>2"),
        (problem("chain_sum", expression="-4 - -3 + 1"), "-4--3=-1 -1+1=0</think><answer>0"),
        (problem("gcd", numbers=[48, 36, 8]), "48%36=12 36%12=0 12%8=4 8%4=0</think><answer>4"),
        (
            problem("base_conversion", source_base=2, target_base=3, source_repr="10100", target_repr="202"),
            "1 2 5 10 20 : 20%3=2 6%3=0 2%3=2</think><answer>202",
        ),
    ],
)
def test_by_hand(given, text):
    assert worked_solution(given, Random(0), 0.0) == f"<think> {text}</answer>"


def test_a_slip_is_a_wrong_number_taken_back_at_once():
    given = problem("count_bits", number=345)
    words = worked_solution(given, Random(0), 1.0).removeprefix("<think> ").split("</think>")[0].split()
    right = ["345:1", "172:1", "86:1", "43:2", "21:3", "10:3", "5:4", "2:4", "1:5"]
    assert [after for before, after in zip(words, words[1:], strict=False) if before == "wait"]
    for at, word in enumerate(words):
        if word == "wait":
            assert words[at - 1] != words[at + 1].split(":")[0]
    assert [word for word in words if ":" in word] == right


def test_slips_have_their_probability():
    given = problem("count_bits", number=1023)  # 9 halvings
    rng = Random(0)
    slips = sum(worked_solution(given, rng, 0.2).count("wait") for _ in range(1000))
    assert 1600 < slips < 1900  # 9000 * 0.2, less the one in four at "1" that would read the same


def test_tasks_without_solutions_are_named():
    (task,) = parse_tasks("sudoku")
    with pytest.raises(UserError, match="sudoku.*count_bits, chain_sum"):
        worked_solution(task[0], Random(0), 0.0)
    assert "sudoku" not in SOLVERS
