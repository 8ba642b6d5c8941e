"""Every config file of configs/: it loads, shrinks, builds and, shrunk, runs."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from configs import algorithms
from experiments import cli
from m1jax.config import build, to_dict
from m1jax.errors import UserError
from m1jax.rl import loop
from m1jax.rl.loss import LossConfig
from m1jax.rl.settings import RLConfig
from m1jax.train import sft
from tests import runs

ROOT = Path(__file__).parents[1]
BLOCKS = {"__init__.py", "algorithms.py", "models.py"}
"""Files of configs/ that others use and nothing runs."""

RUNNABLE = sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.name not in BLOCKS)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # paths inside configs are relative to the checkout


def built(spec: str):
    """The dataclass of a config; its sections say whose it is."""
    values = cli.load_config(f"configs/{spec}")
    return build(RLConfig if "rollout" in values else sft.SFTConfig, values)


def test_the_other_files_are_blocks():
    for name in BLOCKS:
        tree = ast.parse((ROOT / "configs" / name).read_text())
        functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert "get_config" not in functions
    assert len(RUNNABLE) >= 2


@pytest.mark.parametrize("name", RUNNABLE)
def test_config_builds_whole_and_shrunk(name):
    whole, shrunk = built(name), built(f"{name}:smoke")
    assert type(whole) is type(shrunk) and shrunk.steps <= 3 < whole.steps
    with pytest.raises(UserError, match="unknown argument 'smok'; there (is|are 80k and) smoke"):
        built(f"{name}:smok")


@pytest.mark.parametrize("name", RUNNABLE)
def test_shrunk_config_runs(name, tmp_path):
    config = built(f"{name}:smoke")
    run = loop.train if isinstance(config, RLConfig) else sft.train
    result = run(config, tmp_path, log=lambda _: None)
    assert result.summary["steps"] == config.steps == result.metrics[-1]["step"]
    assert result.config == to_dict(config)
    if isinstance(config, RLConfig):
        assert all(t["after"]["n"] == config.evaluation.problems for t in result.summary["heldout"].values())


ALGORITHMS = [name for name, make in vars(algorithms).items() if inspect.isfunction(make)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_one_override(name):
    """The block takes the place of the section, a value after it, or before it, that of the block's."""
    word = "--config.loss.ratio_anchor=trainer"
    words = ["--config=configs/rl_tiny_cpu.py", "--workdir=x", word, f"--config.loss={name}"]
    built_loss = build(RLConfig, cli.parse(words).config).loss
    assert built_loss == build(LossConfig, getattr(algorithms, name)() | {"ratio_anchor": "trainer"})


def test_no_such_algorithm():
    with pytest.raises(
        UserError, match="config.loss: 'ppo' is not in configs/algorithms.py; it has cispo, cispo_long, dapo, dr_"
    ):
        cli.parse(["--config=configs/rl_tiny_cpu.py", "--workdir=x", "--config.loss=ppo"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains(name, tmp_path):
    """From the same start, two updates a batch: every recipe moves the policy and tells what it does."""
    said = []
    config = runs.rl_config(tmp_path, loss=getattr(algorithms, name)(), init_from=runs.save_bigram(tmp_path))
    result = loop.train(config, tmp_path / "run", log=said.append)
    assert config.loss.describe() in said
    assert result.metrics[-1]["step"] == 3 and result.summary["updates"] > 3
    assert all(row["train/update_norm"] > 0 for row in result.metrics[1:])
