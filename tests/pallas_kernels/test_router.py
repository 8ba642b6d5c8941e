"""The router's z-loss, the replay of recorded experts and the sums of a routing, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.pallas_kernels.moe import balance_loss, replay, route, routing_sums, z_loss

LOGITS = np.log(np.array([[1.0, 4.0, 2.0], [3.0, 2.0, 1.0], [5.0, 1.0, 1.0], [8.0, 1.0, 1.0]]))
"""Probabilities of sevenths, sixths, sevenths and tenths; sums of exponentials 7, 6, 7 and 10."""

LIVE = np.array([True, True, True, False])


def test_z_loss_by_hand():
    """The mean of (log 7)^2, (log 6)^2 and (log 7)^2; its gradient is 2 log(sum) softmax / 3, nothing on padding."""
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(z_loss)(jnp.asarray(LOGITS), jnp.asarray(LIVE))
        logs = np.log([7.0, 6.0, 7.0])
        np.testing.assert_allclose(value, (logs**2).mean(), rtol=1e-14)
        softmax = np.exp(LOGITS[:3] - logs[:, None])
        np.testing.assert_allclose(gradient[:3], 2 * logs[:, None] * softmax / 3, rtol=1e-13)
        assert (np.asarray(gradient[3]) == 0).all()
        line, step = np.random.default_rng(0).normal(size=LOGITS.shape), 1e-6
        ahead, behind = (float(z_loss(jnp.asarray(LOGITS + sign * step * line), LIVE)) for sign in (1, -1))
        np.testing.assert_allclose((np.asarray(gradient) * line).sum(), (ahead - behind) / (2 * step), rtol=1e-8)
        assert value.dtype == np.float64
    assert z_loss(jnp.asarray(LOGITS, jnp.bfloat16)).dtype == jnp.float32
    assert z_loss(jnp.asarray(LOGITS, jnp.float32), jnp.zeros(4, bool)) == 0
    np.testing.assert_allclose(
        z_loss(jnp.asarray(LOGITS, jnp.float32)), np.mean([*logs**2, np.log(10) ** 2]), rtol=1e-6
    )


def test_recorded_experts_serve_with_the_weights_of_the_own_logits():
    """Token 0 by record: experts 2 and 0 with 2/3 and 1/3. Token 1 has no record, token 2 half a one: their own."""
    recorded = jnp.array([[2, 0], [-1, -1], [-1, 2]], jnp.int8)
    own, weights = route(jnp.asarray(LOGITS[:3]), 2)
    ids, combine = replay(jnp.asarray(LOGITS[:3]), own, recorded)
    assert ids.tolist() == [[2, 0], [0, 1], [0, 1]] and ids.dtype == jnp.int32
    np.testing.assert_allclose(combine[0], [2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(combine[1:], weights[1:])
    # d w0 / d logits = w0 (1 - w0) at the chosen experts 2 and 0, with opposite signs; nothing at expert 1.
    gradient = jax.grad(lambda x: replay(x, own, recorded)[1][0, 0])(jnp.asarray(LOGITS[:3]))
    np.testing.assert_allclose(gradient, [[-2 / 9, 0, 2 / 9], [0, 0, 0], [0, 0, 0]], atol=1e-7)


def test_replaying_the_own_choice_changes_no_bit():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 7)), jnp.float32)
    own, weights = route(logits, 3)
    ids, combine = replay(logits, own, own.astype(jnp.int8))
    np.testing.assert_array_equal(ids, own)
    np.testing.assert_array_equal(combine, weights)


def test_sums_of_a_routing_by_hand():
    own, _ = route(jnp.asarray(LOGITS), 1)
    assert own[:, 0].tolist() == [1, 0, 0, 0]
    sums = routing_sums(jnp.asarray(LOGITS), own, own, jnp.asarray(LIVE))
    assert sums["tokens"] == 3 and sums["expert_tokens"].tolist() == [2, 1, 0]
    p = [np.array([1, 4, 2]) / 7, np.array([3, 2, 1]) / 6, np.array([5, 1, 1]) / 7]
    np.testing.assert_allclose(sums["entropy"], -sum((q * np.log(q)).sum() for q in p), rtol=1e-6)
    np.testing.assert_allclose(sums["z_loss"], sum(np.log([7.0, 6.0, 7.0]) ** 2), rtol=1e-6)
    np.testing.assert_allclose(sums["balance_loss"], 3 * balance_loss(LOGITS, own, LIVE), rtol=1e-6)
    # Another expert served token 0: it counts where it served.
    served = own.at[0, 0].set(2)
    assert routing_sums(jnp.asarray(LOGITS), own, served, jnp.asarray(LIVE))["expert_tokens"].tolist() == [2, 0, 1]


def test_a_small_margin_is_below_1e_4_and_never_on_padding():
    """Two of three experts: p2 - p3 is 0.9e-4, 1.1e-4, 0, and 0 on padding; of all three experts there is no margin."""
    low = lambda margin: [0.5, 0.25 + margin / 2, 0.25 - margin / 2]  # noqa: E731
    logits = jnp.log(jnp.array([low(0.9e-4), low(1.1e-4), low(0.0), low(0.0)]))
    for selected, expected in ((2, 2), (1, 0), (3, 0)):
        own, _ = route(logits, selected)
        assert routing_sums(logits, own, own, jnp.asarray(LIVE))["small_margins"] == expected


def test_sums_of_parts_add_up():
    rng = np.random.default_rng(0)
    logits, live = jnp.asarray(rng.normal(size=(40, 5)), jnp.float32), jnp.asarray(rng.random(40) < 0.7)
    own, _ = route(logits, 2)
    whole, *parts = (
        jax.jit(routing_sums)(logits[s], own[s], own[s], live[s]) for s in (slice(40), slice(9), slice(9, 40))
    )
    for name, value in whole.items():
        added = parts[0][name] + parts[1][name]
        if name in ("tokens", "expert_tokens", "small_margins"):
            np.testing.assert_array_equal(added, value)
        elif name != "balance_loss":
            np.testing.assert_allclose(added, value, rtol=1e-5)
    assert whole["expert_tokens"].sum() == 2 * live.sum()
