"""The verifiers of reasoning_gym, made fit for reward: full credit or nothing, and no answer is ever executed.

A row is {"dataset": name, "params": {...}, "entry": {...}}: what makes the data set again, and the item in question.
The package's verifiers give partial credit, some for rubbish; pass@k and group advantages want 0 or 1, so only a full
1.0 counts. Flaws that are mended here, all seen with version 0.1.25:

* some call `eval` on the answer: their modules get `ast.literal_eval` under that name;
* some give the answer to SymPy's `parse_expr`, which evaluates it: arithmetic and the functions that an
  antiderivative may need pass a whitelist first, anything else is refused;
* `game_of_life_halting` takes every text but the empty one for correct, and `spell_backward` now and then the right
  word with more behind it (it sums rounded shares): we compare the text ourselves;
* `coin_flip` gives "0" full credit for 0.5 (it counts equal leading characters): we compare the numbers;
* `complex_arithmetic` takes "nan" for any number (min(1, nan) is 1): no answer of that kind is one.

It knows no budget of time: a verifier that hangs is the grader's business.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import reasoning_gym

_EVAL = ("algorithmic.string_insertion", "algorithmic.spiral_matrix", "algorithmic.binary_matrix", "games.n_queens")
_PARSE_EXPR = {
    "puzzle24",
    "countdown",
    "simple_integration",
    "intermediate_integration",
    "polynomial_multiplication",
}
_SAME_TEXT = {"game_of_life_halting", "spell_backward"}
_TUPLES = {"arc_agi", "rearc"}
_FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "ln", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh", "sec",
              "csc", "cot", "pi", "E", "C", "Abs", "abs"}  # fmt: skip


def score(answer: str, row: Mapping[str, Any]) -> float:
    """Return 1.0 where the data set's own verifier gives `answer` full credit, else 0.0.

    Raises:
        Exception: whatever the verifier raises on this answer; the grader counts it as an error.
    """
    name, entry = row["dataset"], row["entry"]
    if not answer.strip():
        return 0.0
    if name in _SAME_TEXT:
        return float(answer.strip().lower() == entry["answer"].lower())
    if name == "coin_flip":
        return _same_probability(answer.strip(), Fraction(entry["answer"]))
    if name == "complex_arithmetic" and re.search("nan|inf", answer.lower()):
        return 0.0
    if name in _PARSE_EXPR and not is_plain_expression(answer):
        return 0.0
    if name in _TUPLES:  # grids are compared as tuples, which a row of JSON cannot hold
        entry = {**entry, "metadata": {key: _tuples(value) for key, value in entry["metadata"].items()}}
    return float(dataset(name, repr(dict(row["params"]))).score_answer(answer, entry) >= 1.0)


@functools.lru_cache(maxsize=64)
def dataset(name: str, params: str):
    """Return the data set `name` with the keyword arguments whose repr is `params`, its verifier mended.

    Raises:
        ValueError, TypeError, AssertionError: the package does not take these arguments.
    """
    for module in _EVAL:
        vars(importlib.import_module(f"reasoning_gym.{module}"))["eval"] = ast.literal_eval
    return reasoning_gym.create_dataset(name, **ast.literal_eval(params))


def _same_probability(answer: str, gold: Fraction) -> float:
    """1.0 where a decimal or a fraction is within a ten-thousandth part of `gold`."""
    try:
        return float(abs(Fraction(answer) - gold) * 10_000 <= gold)
    except (ValueError, ZeroDivisionError):
        return 0.0


def is_plain_expression(text: str) -> bool:
    """Return whether `text` is short arithmetic over numbers, one-letter names and common functions.

    Attribute access, indexing, keywords and strings never pass, so what `parse_expr` evaluates cannot reach beyond
    the expression. Exponents are at most 999 and hold no power; what still takes long, the grader ends.
    """
    if len(text) > 500 or not re.fullmatch(r"[0-9A-Za-z_+\-*/^(). ]*", text) or "__" in text:
        return False
    if re.search(r"[A-Za-z_)]\s*\.|\.\s*[A-Za-z_(.]", text):
        return False
    if any(len(name) > 1 and name not in _FUNCTIONS for name in re.findall(r"[A-Za-z_]\w*", text)):
        return False
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    powers = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)]
    return all(_small_power(node) for node in powers)


def _small_power(node: ast.BinOp) -> bool:
    """Whether no number in the exponent passes 999 and there is no power in it."""
    numbers = [n.value for n in ast.walk(node.right) if isinstance(n, ast.Constant)]
    nested = any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Pow) for n in ast.walk(node.right))
    return not nested and all(isinstance(n, (int, float)) and abs(n) <= 999 for n in numbers)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
