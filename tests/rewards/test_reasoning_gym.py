"""Claims about rewards/reasoning_gym.py: gold gets 1, junk 0, for every task; answers are never executed."""

import contextlib
import json

import pytest
from reasoning_gym.factory import DATASETS

from m1jax.data.problems import GymTask
from m1jax.rewards.reasoning_gym import is_plain_expression, score

JUNK = ["", " ", "junk", "{}", "[]", "()", "[[]]", "nan", "inf", "-1e999", "None", "a" * 5000, "9" * 5000, "0", "1",
        "yes", "- - -", "__import__('os').getpid()"]  # fmt: skip
FAST = ["count_bits", "chain_sum", "gcd", "base_conversion", "game_of_life_halting", "coin_flip", "complex_arithmetic",
        "spell_backward", "countdown", "prime_factorization", "arc_agi", "n_queens", "polynomial_multiplication",
        "string_insertion"]  # fmt: skip

# What verifiers raise on junk; in the grader an error scores 0.
RAISED = (ValueError, TypeError, ArithmeticError, SyntaxError, LookupError, AttributeError)


def sweep(name: str, problems: int) -> None:
    task = GymTask(name, name, "{'seed': 0}")
    for problem in map(task.__getitem__, range(problems)):
        row = json.loads(json.dumps(problem.row))  # what a worker gets
        if problem.answer:
            assert score(problem.answer, row) == 1.0
        for junk in JUNK:
            if junk.strip().lower() != str(problem.answer).lower() and not _same_number(junk, problem.answer):
                with contextlib.suppress(*RAISED):
                    assert score(junk, row) == 0.0, f"{name}: {junk[:30]!r} for {problem.answer!r}"


def _same_number(junk: str, answer: str | None) -> bool:
    try:
        return float(junk) == float(answer)
    except (ValueError, TypeError):
        return False


@pytest.mark.parametrize("name", FAST)
def test_gold_counts_and_junk_does_not(name):
    sweep(name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"composite"}))  # composite has no problems of its own
def test_gold_counts_and_junk_does_not_in_any_task(name):
    sweep(name, 2)


def row(dataset, answer, **metadata):
    return {"dataset": dataset, "params": {"seed": 0}, "entry": {"answer": answer, "metadata": metadata}}


def test_mended_verifiers():
    assert score("True", row("game_of_life_halting", "False")) == 0
    assert score("False", row("game_of_life_halting", "False")) == 1
    assert [score(answer, row("coin_flip", "0.5")) for answer in ("0", "1/2", "0.50", "0.5000001")] == [0, 1, 1, 1]
    assert score("0", row("coin_flip", "3.051757812e-05")) == 0
    assert score("noremopyh or not", row("spell_backward", "noremopyh")) == 0
    assert [score(answer, row("complex_arithmetic", "1 + 2i", result=[1, 2])) for answer in ("nan", "1 + 2i")] == [0, 1]


EVALUATING = ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "puzzle24", "countdown",
              "simple_integration", "intermediate_integration", "polynomial_multiplication"]  # fmt: skip


@pytest.mark.parametrize("name", EVALUATING)
def test_answers_are_never_executed(name, tmp_path):
    touched = tmp_path / "touched"
    problem = GymTask(name, name, "{'seed': 0}")[0]
    for answer in (
        f"open({str(touched)!r}, 'w')",
        f"[open({str(touched)!r}, 'w')]",
        f"S(\"open({str(touched)!r},'w')\")",
    ):
        with contextlib.suppress(*RAISED):
            assert score(answer, problem.row) == 0
    assert not touched.exists()


@pytest.mark.parametrize("text", ["6*x**2 - 3*x + C", "sin(x)**2/2", "(1 + 2) * 3 / 4", "x^3", "2.5*exp(-x)"])
def test_plain_expressions(text):
    assert is_plain_expression(text)


@pytest.mark.parametrize("text", ["x.func", "().a", "f(x)[0]", "lambda: 1", "'a'", "9**9**9", "9**1000", "__x", "abs.x",
                                  "exec(x)", "1" * 501, "x = 1", "2 .real", "1 if x else 2", ""])  # fmt: skip
def test_anything_else_is_refused(text):
    assert not is_plain_expression(text)
