"""The CISPO loss on numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.rl.loss import LossConfig, cispo, importance_ratio


def test_hand_worked_value():
    """Two tokens at ratio 2 and 1/2, cap 5: weights pass uncapped.

    -(0.5 * 2 * 1 * log 0.4  +  0.25 * 0.5 * (-2) * log 0.1) = 0.916291 - 0.575646
    """
    policy, anchor = jnp.log(jnp.array([0.4, 0.1])), jnp.log(jnp.array([0.2, 0.2]))
    value = cispo(policy, anchor, jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25]), weight_cap=5.0)
    np.testing.assert_allclose(value, 0.9162907 - 0.5756463, rtol=1e-6)


def test_ratio_above_the_cap_is_weighted_by_the_cap():
    """Ratio 0.8 / 0.1 = 8 counts as 5, whatever the sign of the advantage."""
    policy, anchor = jnp.log(jnp.array([0.8])), jnp.log(jnp.array([0.1]))
    for advantage in (1.0, -1.0):
        value = cispo(policy, anchor, jnp.array([advantage]), jnp.ones(1), weight_cap=5.0)
        np.testing.assert_allclose(value, -5.0 * advantage * np.log(0.8), rtol=1e-6)


@pytest.mark.parametrize(("advantage", "sign"), [(1.0, -1), (-1.0, 1)])
def test_rare_token_far_above_the_cap_keeps_its_gradient(advantage, sign):
    """log-prob -3, ratio e^4: dL/dlogp = -cap * advantage. A clip without the log-prob would give 0, a loss without
    the stop-gradient r (1 + logp) = -2 r: the wrong sign."""
    gradient = jax.grad(lambda p: cispo(p, jnp.array([-7.0]), jnp.array([advantage]), jnp.ones(1), 5.0))(
        jnp.array([-3.0])
    )
    np.testing.assert_allclose(gradient, [sign * 5.0], rtol=1e-6)


@pytest.mark.parametrize("logprob", [-0.1, -0.5, -1.0, -2.0, -4.0])
def test_on_policy_gradient_is_reinforce(logprob):
    """At ratio 1 the gradient is -advantage at every log-prob: the stop-gradient is there."""
    at = jnp.array([logprob])
    gradient = jax.grad(lambda p: cispo(p, at, jnp.array([1.5]), jnp.ones(1), 5.0))(at)
    np.testing.assert_allclose(gradient, [-1.5], rtol=1e-6)


def test_gradient_agrees_with_finite_differences_of_the_frozen_weight_loss():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        policy, anchor = -rng.exponential(2, 6), -rng.exponential(2, 6)
        advantages, weights = rng.normal(size=6), rng.uniform(0.1, 1, 6)
        frozen = np.minimum(np.exp(policy - anchor), 2.0)
        reference = lambda p: -np.sum(weights * frozen * advantages * p)  # noqa: E731
        gradient = jax.grad(cispo)(jnp.asarray(policy), anchor, advantages, jnp.asarray(weights), 2.0)
        for i in range(6):
            step = np.zeros(6)
            step[i] = 1e-6
            numeric = (reference(policy + step) - reference(policy - step)) / 2e-6
            np.testing.assert_allclose(gradient[i], numeric, rtol=1e-8)


def test_tokens_of_weight_zero_count_for_nothing_whatever_stands_there():
    junk = jnp.array([-jnp.inf, jnp.nan, 1e30])
    policy = jnp.concatenate([jnp.array([-1.0]), junk])
    anchor = jnp.concatenate([jnp.array([-1.0]), -junk])
    weights = jnp.array([1.0, 0.0, 0.0, 0.0])
    value, gradient = jax.value_and_grad(cispo)(policy, anchor, jnp.array([2.0, 0.0, 0.0, 0.0]), weights, 5.0)
    np.testing.assert_allclose(value, 2.0)
    np.testing.assert_array_equal(gradient, [-2.0, 0.0, 0.0, 0.0])


def test_ratio_is_clamped_before_the_exp():
    ratio = importance_ratio(jnp.array([0.0, -500.0]), jnp.array([-500.0, 0.0]), jnp.array([True, True]))
    np.testing.assert_allclose(ratio, [np.exp(20.0), np.exp(-20.0)], rtol=1e-5)


def test_cap_below_one_is_refused_and_the_band_is_told():
    with pytest.raises(ValueError, match="weight_cap: 0.2 would scale down even on-policy tokens"):
        LossConfig(weight_cap=0.2)
    assert "[0, 5] (eps_high = 4, no lower bound)" in LossConfig(weight_cap=5.0).describe()


@pytest.mark.parametrize("field", ["aggregation", "ratio_anchor"])
def test_unknown_choice_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}: 'mean' must be one of"):
        LossConfig(**{field: "mean"})
