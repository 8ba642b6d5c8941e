"""On several devices the same numbers as on one: update, engine and supervised update."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from m1jax.config import build
from m1jax.model.config import ModelConfig
from tests import runs
from tests.model import golden
from tests.model.golden import GOLDENS
from tests.rl import small
from tests.rl.test_update import LOSSES

ROOT = Path(__file__).parents[2]


def compute(losses: Sequence[str] = ("cispo",)) -> dict[str, np.ndarray]:
    """On all devices there are: parameters after an RL update of some losses and a supervised one, those that a
    run starts from, and what the engine samples."""
    import jax
    import optax

    from m1jax.rl.engine_local import LocalEngine
    from m1jax.rl.update import make_update
    from m1jax.sharding import data_mesh, replicated
    from m1jax.train.next_token import TokenBatch, make_supervised_update
    from m1jax.train.pretrained import init_params
    from m1jax.train.router import RouterConfig
    from m1jax.train.state import init_state
    from m1jax.types import Sampling

    model, mesh, sgd = small.config(), data_mesh(), optax.sgd(0.1)  # SGD: a difference of parameters is a gradient
    params, prompts = small.params(model), small.prompts(4)
    found = {"devices": np.array(jax.device_count())}

    for name in losses:
        loss = LOSSES[name]
        rollouts, router = small.rollouts(prompts), RouterConfig(0.0)
        if name == "cispo":  # and all of the routers
            rollouts, router = small.routed(prompts, rollouts, model), RouterConfig(0.1, 0.1)
        batch = small.batch(prompts, rollouts, updates=2, micro_rows=4, loss=loss, router_replay=name == "cispo")
        update = make_update(model, loss, sgd, mesh, temperature=1.0, passes=1, router=router, replay=name == "cispo")
        state, metrics = update(init_state(0, model, sgd, mesh, params), batch)
        found |= _named(f"update/{name}/", state.params) | _named(f"metrics/{name}/", metrics)

    with tempfile.TemporaryDirectory() as folder:
        for path, config in (
            (runs.save_bigram(Path(folder)), build(ModelConfig, runs.MODEL)),
            (GOLDENS / "m1_tiny", golden.config()),
        ):
            given, _ = init_params(str(path), config, replicated(mesh))
            started = init_state(0, config, sgd, mesh, given)
            found |= _named(f"start/{config.num_layers}/", started.params)

    batch = small.batch(prompts, small.rollouts(prompts), updates=2, micro_rows=4)
    rows = TokenBatch(batch.tokens[0], batch.segment_ids[0], batch.weights[0])
    supervised = make_supervised_update(model, sgd, mesh, router=RouterConfig(balance_coefficient=0.1))
    state, metrics = supervised(init_state(0, model, sgd, mesh, params), rows)
    found |= _named("supervised", state.params) | {"supervised_loss": metrics["loss"]}

    engine = LocalEngine(model, prompt_tokens=4, rows=16, stop_ids=(1,), mesh=mesh, record_experts=True)
    engine.set_weights(params, 0)
    groups = engine.generate(prompts, 4, Sampling(max_tokens=8), seed=3)
    for p, group in enumerate(groups):
        for r, rollout in enumerate(group):
            found |= {f"ids/{p}/{r}": rollout.token_ids, f"logprobs/{p}/{r}": rollout.rollout_logprobs}
            found |= {f"ids/{p}/{r}/experts": rollout.expert_ids}
    return {name: np.asarray(value) for name, value in found.items()}


def _named(head: str, tree) -> dict:
    import jax

    return {
        head + jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def single():
    found = compute()
    assert found["devices"] == 1
    return found


@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_compute_what_one_does(devices, single, tmp_path):
    check(devices, ("cispo",), single, tmp_path)


@pytest.mark.slow
def test_several_devices_compute_what_one_does_for_every_loss(tmp_path):
    check(4, tuple(LOSSES), compute(tuple(LOSSES)), tmp_path)


def check(devices: int, losses: Sequence[str], single: dict[str, np.ndarray], tmp_path: Path) -> None:
    file = tmp_path / "found.npz"
    call = f"test_multi_device.compute({losses!r})"
    program = f"import numpy; from tests.rl import test_multi_device; numpy.savez({str(file)!r}, **{call})"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=300)
    several = dict(np.load(file))
    assert several.pop("devices") == devices and set(several) == set(single) - {"devices"}
    for name, value in several.items():
        if name.startswith("ids/"):
            assert value.tolist() == single[name].tolist(), name
        elif name.startswith(("update", "supervised")):
            assert np.linalg.norm(value - single[name]) <= 1e-5 * np.linalg.norm(single[name]), name
        else:
            np.testing.assert_allclose(value, single[name], rtol=1e-4, atol=1e-6, err_msg=name)
