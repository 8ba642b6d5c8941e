"""The schedule, by hand: its unit is an update, and the first one is not lost."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from m1jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer


def rates(count=8, **values):
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, **values))
    return [float(schedule(update)) for update in range(count)]


def test_the_first_update_has_a_rate():
    np.testing.assert_allclose(rates(warmup_updates=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert rates(1) == [1.0] and rates(2, warmup_updates=1) == [1.0, 1.0]


def test_decay_begins_after_the_warm_up_and_ends_at_its_fraction():
    linear = rates(warmup_updates=2, schedule="linear", decay_updates=4, final_fraction=0.2)
    np.testing.assert_allclose(linear, [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2], rtol=1e-6)
    cosine = rates(5, schedule="cosine", decay_updates=4, final_fraction=0.0)
    np.testing.assert_allclose(cosine, (1 + np.cos(np.pi * np.arange(5) / 4)) / 2, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(schedule="linear"), "decay_updates: 0 must be at least 1 for schedule 'linear'"),
        (dict(schedule="step"), "schedule: 'step' must be one of"),
        (dict(warmup_updates=-1), "warmup_updates: -1 must be at least 0"),
        (dict(moments="float16"), "moments: 'float16' must be one of"),
    ],
)
def test_senseless_schedules_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(learning_rate=1.0, **values)


@pytest.mark.parametrize("moments", ["", "float32", "bfloat16"])
@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
def test_adamw_is_the_formula_with_moments_of_any_dtype(moments, parameters):
    """In float64, rounded where moments and parameters are stored. Rounding of bfloat16 is the tolerance there: a sum
    that lies near the middle of two numbers goes either way.
    """
    stored = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(moments or parameters, np.float32))
    config = OptimizerConfig(learning_rate=0.1, b1=0.9, b2=0.95, eps=1e-15, weight_decay=0.01, max_grad_norm=1e9,
                             moments=moments)  # fmt: skip
    rng = np.random.default_rng(0)
    params: Any = jnp.asarray(rng.normal(size=50), parameters)
    optimizer, p = make_optimizer(config), np.asarray(params, np.float64)
    state = optimizer.init(params)
    m, v = np.zeros(50), np.zeros(50)
    for t in range(1, 6):
        grads = jnp.asarray(rng.normal(size=50) * 10.0 ** rng.integers(-6, 0, 50), parameters)
        changes, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, changes)
        g = np.asarray(grads, np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-15)
        p = p - 0.1 * (step + 0.01 * p)
        m, v = (x.astype(stored).astype(np.float64) for x in (m, v))
        p = p.astype(params.dtype).astype(np.float64)
    for name, x in (("mu", m), ("nu", v)):
        found: Any = optax.tree.get(state, name)
        assert found.dtype == stored
        ulps = 3e-6 if stored == np.float32 and parameters == "float32" else 2**-6
        np.testing.assert_allclose(np.asarray(found, np.float64), x, rtol=ulps, atol=1e-30)
    assert params.dtype == parameters
    np.testing.assert_allclose(np.asarray(params, np.float64), p, atol=2e-6 if parameters == "float32" and
                               stored == np.float32 else 0.02)  # fmt: skip
    assert all(x.dtype == jnp.int32 for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jnp.floating))
