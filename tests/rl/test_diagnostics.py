"""What an update tells of its tokens, gradient and optimizer, by hand and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.rl.diagnostics import cosine, eps_dominated_share, gradient_magnitudes, sample_entries, token_metrics
from m1jax.rl.loss import LossConfig, LossInput
from m1jax.rl.monitors import update_metrics
from m1jax.rl.update import make_update
from m1jax.sharding import data_mesh
from m1jax.train.optimizer import OptimizerConfig, make_optimizer
from m1jax.train.state import TrainState, init_state
from m1jax.types import Batch
from tests.rl import small


def magnitudes(tree):
    return gradient_magnitudes(sample_entries(tree))


def test_gradient_histogram_by_hand():
    metrics = magnitudes({"a": jnp.array([0.0, 1e-15, -3e-15]), "b": jnp.array([2e-3, 5.0, 1e-30])})
    counts = dict(zip(range(-20, 1), metrics["gradient_histogram"].tolist(), strict=False))
    assert counts[-15] == 2 and counts[-3] == 1 and counts[0] == 1 and counts[-20] == 1
    np.testing.assert_allclose(metrics["gradient_share_below_1e-14"], 3 / 5)
    np.testing.assert_allclose(metrics["gradient_share_zero"], 1 / 6)


def test_gradient_histogram_of_a_large_array_is_that_of_a_sample():
    """A quarter zeros, the rest in two decades; beside it a small array, whose entries count once each."""
    rng = np.random.default_rng(0)
    large = jnp.asarray(rng.choice([0.0, 3e-5, 3e-5, 3e-15], (60, 40, 50)))
    metrics = magnitudes({"large": large, "small": jnp.full(7, 2e-3)})
    counts = dict(zip(range(-20, 1), metrics["gradient_histogram"].tolist(), strict=False))
    deviation = 0.5 / np.sqrt(2**14)  # of a share in a sample, at most
    assert counts[-3] == 7
    assert abs(counts[-5] / large.size - 0.5) < 5 * deviation and abs(counts[-15] / large.size - 0.25) < 5 * deviation
    np.testing.assert_allclose(metrics["gradient_share_below_1e-14"], 1 / 3, atol=5 * deviation)
    np.testing.assert_allclose(metrics["gradient_share_zero"], 1 / 4, atol=5 * deviation)
    again = magnitudes({"large": large, "small": jnp.full(7, 2e-3)})
    np.testing.assert_array_equal(metrics["gradient_histogram"], again["gradient_histogram"])


@pytest.mark.parametrize("size", [1.0, 1e-22])
def test_cosine_is_that_of_the_whole_gradient(size):
    """Far below the square root of the smallest float32 too; a large array counts by all its entries."""
    rng = np.random.default_rng(1)
    one = {"large": rng.normal(size=(300, 200)), "small": 50 * rng.normal(size=9)}
    other = {"large": one["large"] + rng.normal(size=(300, 200)), "small": -one["small"]}
    flat = lambda tree: np.concatenate([x.ravel() for x in tree.values()])  # noqa: E731
    x, y = flat(one), flat(other)
    expected = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    scaled = lambda tree: {k: jnp.asarray(size * v, jnp.float32) for k, v in tree.items()}  # noqa: E731
    entries = [sample_entries(scaled(tree)) for tree in (one, other)]
    np.testing.assert_allclose(cosine(*entries), expected, atol=0.02)
    np.testing.assert_allclose(cosine(entries[0], entries[0]), 1.0, rtol=1e-5)
    assert np.isnan(cosine(entries[0], jax.tree.map(jnp.zeros_like, entries[0])))


def test_denominators_under_eps_are_counted_after_bias_correction():
    """One update: v is (1 - b2) g^2, corrected g^2, so eps is the larger part where |g| < eps.

    An entry whose v underflows counts; one that had no gradient does not.
    """
    config = OptimizerConfig(learning_rate=1e-3, eps=1e-8, max_grad_norm=1e9)
    optimizer = make_optimizer(config)
    params = {"w": jnp.zeros(5)}
    _, opt_state = optimizer.update(
        {"w": jnp.array([1e-21, -0.9e-8, 1.1e-8, 1.0, 0.0])}, optimizer.init(params), params
    )
    state = TrainState(params, opt_state, jnp.ones((), jnp.int32), jax.random.key(0))
    np.testing.assert_allclose(eps_dominated_share(state, config), 2 / 4)


def test_tokens_are_counted_by_the_probability_they_were_sampled_with():
    probabilities = np.array([[0.05, 0.09, 0.2, 0.5, 0.9, 0.01]])
    weights = np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])  # the last is not in the loss
    ratio = np.array([[1.5, 1.1, 1.5, 0.5, 6.0, 9.0]])
    advantages = np.array([[1.0, 1.0, -1.0, -1.0, 1.0, 1.0]])
    anchors = np.log(probabilities)
    zeros = np.zeros((1, 6), np.int32)
    batch = Batch(zeros, zeros, weights, advantages, anchors, zeros)
    x = LossInput(anchors + np.log(ratio), anchors, advantages, weights, zeros)

    dapo = LossConfig(kind="ppo_clip", clip_low=0.2, clip_high=0.28)
    counts = token_metrics(batch, x, np.zeros((1, 6)), dapo)
    assert counts["tokens_by_probability"].tolist() == [2, 1, 2]
    assert counts["dropped_by_probability"].tolist() == [
        1,
        0,
        2,
    ]  # 0.05 up, 0.5 down, 0.9 up
    assert counts["capped_by_probability"].tolist() == [0, 0, 0]
    counts = token_metrics(batch, x, np.zeros((1, 6)), LossConfig(weight_cap=5.0))
    assert counts["dropped_by_probability"].tolist() == [0, 0, 0]
    assert counts["capped_by_probability"].tolist() == [0, 0, 1]


def test_metrics_of_a_step_sum_the_counts_over_its_updates():
    model, prompts = small.config(), small.prompts(4)
    config = OptimizerConfig(learning_rate=5e-2)
    optimizer = make_optimizer(config)
    loss = LossConfig(kind="ppo_clip", clip_low=0.2, clip_high=0.28)
    update = make_update(model, loss, optimizer, data_mesh(), temperature=1.0, passes=2, adam=config)
    batch = small.batch(prompts, small.rollouts(prompts), updates=2)
    _, device = update(init_state(0, model, optimizer, data_mesh()), batch)
    metrics = update_metrics(jax.device_get(device))
    tokens, dropped = (np.asarray(device[f"{what}_by_probability"]) for what in ("tokens", "dropped"))
    assert tokens.shape == (4, 3) and tokens.sum() == metrics["train/tokens"] and dropped.sum() > 0
    for b, name in enumerate(("p_below_0.1", "p_0.1_to_0.5", "p_above_0.5")):
        assert metrics[f"ratio/dropped_share_{name}"] == dropped[:, b].sum() / tokens[:, b].sum()
        assert metrics[f"ratio/capped_share_{name}"] == 0
    assert metrics["rare/gradient_share_later_updates"] == 1 - dropped[1:, 0].sum() / tokens[1:, 0].sum() < 1
    cosines = np.asarray(device["gradient_cosine"])
    assert np.isnan(cosines[0]) and metrics["gradient/cosine_consecutive"] == pytest.approx(cosines[1:].mean())
    # AdamW's eps is 1e-15 and these gradients are large.
    assert metrics["optimizer/eps_dominated_share"] == 0


def test_consecutive_gradients_are_compared_across_the_updates_of_a_batch():
    """Twice the same update with a rate of 0 has twice the same gradient."""
    model, prompts = small.config(), small.prompts(2)
    sgd = optax.sgd(0.0)
    update = make_update(model, LossConfig(weight_cap=5.0), sgd, data_mesh(), temperature=1.0, passes=2)
    params = small.params(model)
    state = TrainState(params, sgd.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))
    _, device = update(state, small.batch(prompts, small.rollouts(prompts)))
    np.testing.assert_allclose(device["gradient_cosine"][1], 1.0, rtol=1e-5)
    assert "eps_dominated_share" not in device
