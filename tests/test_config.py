"""Plain values to dataclasses: what passes, and the one line that each mistake gets."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest

from m1jax.config import MISSING, build, changed_keys, to_dict
from m1jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Loss:
    weight_cap: float = 5.0
    aggregation: Literal["group_tokens", "update_tokens"] = "group_tokens"

    def __post_init__(self):
        if self.weight_cap < 1:
            raise ValueError(f"weight_cap: {self.weight_cap} is below 1; give 1 or more")


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int
    loss: Loss = dataclasses.field(default_factory=Loss)
    tasks: tuple[Task, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None
    remat: bool = False
    source: str | tuple[str, ...] = ""
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)


def test_builds_every_kind_of_field():
    values = {
        "steps": 3,
        "loss": {"weight_cap": 2, "aggregation": "update_tokens"},
        "tasks": [{"name": "gcd"}, {"name": "sum", "weight": 2}],
        "betas": [0, 1],
        "clip": 1,
        "remat": True,
        "source": ["a", "b"],
        "parameters": {"low": 1},
    }
    config = build(Config, values)
    assert config == Config(
        3,
        Loss(2.0, "update_tokens"),
        (Task("gcd"), Task("sum", 2.0)),
        (0.0, 1.0),
        1.0,
        True,
        ("a", "b"),
        {"low": 1},
    )
    # Equality does not see it, a config.json does: an int in a float field has become a float.
    assert [type(x) for x in (config.loss.weight_cap, *config.betas, config.clip)] == [float] * 4


def test_missing_keys_take_the_defaults():
    assert build(Config, {"steps": 3}) == Config(3)
    assert build(Config, {"steps": 3, "clip": None}).clip is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1, "loss": {"wieght_cap": 3}}, "config.loss.wieght_cap: unknown key; did you mean weight_cap?"),
        ({"steps": 1, "tasks": [{"name": "a"}, {"nam": "b"}]}, "config.tasks[1].nam: unknown key; did you mean name?"),
        ({"steps": 1, "loss": {"zzz": 3}}, "config.loss.zzz: unknown key; valid keys: aggregation, weight_cap"),
        ({}, "config.steps: missing; it has no default"),
        ({"steps": 1.5}, "config.steps: expected int, found 1.5 (float)"),
        ({"steps": True}, "config.steps: expected int, found True (bool)"),
        ({"steps": "3"}, "config.steps: expected int, found '3' (str)"),
        ({"steps": 1, "remat": 1}, "config.remat: expected bool, found 1 (int)"),
        ({"steps": 1, "clip": True}, "config.clip: expected float, found True (bool)"),
        ({"steps": 1, "clip": "x"}, "config.clip: expected float, found 'x' (str)"),
        ({"steps": 1, "betas": (0.9,)}, "config.betas: expected 2 values, found 1: (0.9,) (tuple)"),
        ({"steps": 1, "betas": (0.9, "x")}, "config.betas[1]: expected float, found 'x' (str)"),
        ({"steps": 1, "tasks": "gcd"}, "config.tasks: expected a tuple, found 'gcd' (str)"),
        ({"steps": 1, "source": 3}, "config.source: expected str or tuple[str, ...], found 3 (int)"),
        ({"steps": 1, "loss": 3}, "config.loss: expected a section with keys, found 3 (int)"),
        ({"steps": 1, "parameters": {"low": "x"}}, "config.parameters.low: expected int, found 'x' (str)"),
        (
            {"steps": 1, "loss": {"aggregation": "mean"}},
            "config.loss.aggregation: 'mean' (str) is not one of group_tokens, update_tokens",
        ),
        ({"steps": 1, "loss": {"weight_cap": 0.5}}, "config.loss.weight_cap: 0.5 is below 1; give 1 or more"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(values, message):
    with pytest.raises(UserError) as caught:
        build(Config, values)
    assert str(caught.value) == message


def test_a_rule_over_several_keys_is_prefixed_by_the_section():
    @dataclasses.dataclass(frozen=True)
    class Rows:
        rows: int = 3

        def __post_init__(self):
            raise ValueError("3 rows do not divide by 2")

    with pytest.raises(UserError, match="^config: 3 rows do not divide by 2$"):
        build(Rows, {})


def test_to_dict_is_what_json_gives_back():
    config = build(Config, {"steps": 3, "tasks": [{"name": "gcd"}], "parameters": {"low": 1}})
    plain = to_dict(config)
    assert json.loads(json.dumps(plain)) == plain
    assert build(Config, plain) == config


def test_changed_keys_names_each_leaf_with_both_values():
    old = Config(3, Loss(5.0), clip=1.0)
    new = dataclasses.replace(old, steps=4, loss=Loss(6.0))
    assert changed_keys(old, old) == []
    assert changed_keys(old, new) == [("steps", 3, 4), ("loss.weight_cap", 5.0, 6.0)]
    assert changed_keys({"a": {"b": 1}}, {"a": {}, "c": 2}) == [("a.b", 1, MISSING), ("c", MISSING, 2)]
    assert changed_keys({"a": 1}, {"a": True}) == [("a", 1, True)]
    assert changed_keys({"a": (1, 2)}, {"a": [1, 2]}) == []
