"""On several devices the same numbers as on one: update, engine and supervised update."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from m1jax.config import build
from m1jax.model.config import ModelConfig
from m1jax.rl.engine_local import LocalEngine
from m1jax.rl.update import make_update
from m1jax.sharding import data_mesh, replicated
from m1jax.train.next_token import TokenBatch, make_supervised_update
from m1jax.train.pretrained import init_params
from m1jax.train.router import NO_AUXILIARY_LOSS, RouterConfig
from m1jax.train.state import init_state
from m1jax.types import Sampling
from tests import runs
from tests.model import golden
from tests.model.golden import GOLDENS
from tests.rl import small
from tests.rl.test_update import LOSSES

ROOT = Path(__file__).parents[2]


SGD = optax.sgd(0.1)
"""So that a difference of parameters is a gradient."""


def compute() -> dict[str, np.ndarray]:
    """On all devices there are: parameters after an RL update and a supervised one, those that a run starts from, and
    what the engine samples."""
    model, mesh, prompts = small.config(), data_mesh(), small.prompts(4)
    params = small.params(model)
    routed = small.routed(prompts, small.rollouts(prompts), model)
    found = updated("cispo", model, routed, replay=True, router=RouterConfig(0.1, 0.1))

    with tempfile.TemporaryDirectory() as folder:
        for path, config in (
            (runs.save_bigram(Path(folder)), build(ModelConfig, runs.MODEL)),
            (GOLDENS / "m1_tiny", golden.config()),
        ):
            given, _ = init_params(str(path), config, replicated(mesh))
            started = init_state(0, config, SGD, mesh, given)
            found |= _named(f"start/{config.num_layers}/", started.params)

    batch = small.batch(prompts, small.rollouts(prompts), updates=2, micro_rows=4)
    rows = TokenBatch(batch.tokens[0], batch.segment_ids[0], batch.weights[0])
    supervised = make_supervised_update(model, SGD, mesh, router=RouterConfig(balance_coefficient=0.1))
    state, metrics = supervised(init_state(0, model, SGD, mesh, params), rows)
    found |= _named("supervised", state.params) | {"supervised_loss": metrics["loss"]}

    engine = LocalEngine(model, prompt_tokens=4, rows=16, stop_ids=(1,), mesh=mesh, record_experts=True)
    engine.set_weights(params, 0)
    groups = engine.generate(prompts, 4, Sampling(max_tokens=8), seed=3)
    for p, group in enumerate(groups):
        for r, rollout in enumerate(group):
            found |= {f"ids/{p}/{r}": rollout.token_ids, f"logprobs/{p}/{r}": rollout.rollout_logprobs}
            found |= {f"ids/{p}/{r}/experts": rollout.expert_ids}
    return found


def of_every_loss(model: ModelConfig) -> dict[str, np.ndarray]:
    """All but `compute`'s."""
    found, rollouts = {}, small.rollouts(small.prompts(4))
    for name in sorted(set(LOSSES) - {"cispo"}):
        found |= updated(name, model, rollouts)
    return found


def updated(name: str, model: ModelConfig, rollouts: list, *, replay=False, router=NO_AUXILIARY_LOSS) -> dict:
    """Parameters and metrics after two RL updates by a loss."""
    loss, mesh = LOSSES[name], data_mesh()
    batch = small.batch(small.prompts(4), rollouts, updates=2, micro_rows=4, loss=loss, router_replay=replay)
    update = make_update(model, loss, SGD, mesh, temperature=1.0, passes=1, router=router, replay=replay)
    state, metrics = update(init_state(0, model, SGD, mesh, small.params(model)), batch)
    return _named(f"update/{name}/", state.params) | _named(f"metrics/{name}/", metrics)


def _named(head: str, tree) -> dict:
    return {
        head + jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_several_devices_compute_what_one_does(tmp_path):
    check(4, "compute()", compute(), tmp_path)


@pytest.mark.slow
def test_several_devices_compute_what_one_does_for_every_loss(tmp_path):
    """They differ in what they sum over: one layer will do."""
    check(4, "of_every_loss(t.small.one_layer())", of_every_loss(small.one_layer()), tmp_path)


@pytest.mark.heavy
def test_another_number_of_devices_and_every_loss_over_both_kinds_of_layers(tmp_path):
    check(2, "compute()", compute(), tmp_path)
    check(4, "of_every_loss(t.small.config())", of_every_loss(small.config()), tmp_path)


def check(devices: int, call: str, single: dict[str, np.ndarray], tmp_path: Path) -> None:
    file = tmp_path / "found.npz"
    program = (
        f"import jax, numpy; from tests.rl import test_multi_device as t; assert jax.device_count() == {devices}; "
        f"numpy.savez({str(file)!r}, **t.{call})"
    )
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=600)
    several = dict(np.load(file))
    assert set(several) == set(single)
    for name, value in several.items():
        if name.startswith("ids/"):
            assert value.tolist() == np.asarray(single[name]).tolist(), name
        elif name.startswith(("update", "supervised")):
            assert np.linalg.norm(value - single[name]) <= 1e-5 * np.linalg.norm(single[name]), name
        else:
            np.testing.assert_allclose(value, single[name], rtol=1e-4, atol=1e-6, err_msg=name)
