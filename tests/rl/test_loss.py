"""The losses: numbers by hand, finite differences in float64, the identities between them, junk in, sense out."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.rl.loss import (
    KINDS,
    MASKS,
    MAX_LOG_RATIO,
    LossConfig,
    LossInput,
    cispo,
    find_mask,
    importance_ratio,
    kept,
    kl_loss,
    kl_terms,
    mismatch_weight,
    policy_loss,
    ppo_clip,
    reinforce,
    trust_region,
    unified,
)

CONFIGS = {
    "reinforce": LossConfig(kind="reinforce"),
    "cispo": LossConfig(kind="cispo", weight_cap=2.0),
    "cispo_floor": LossConfig(kind="cispo", weight_cap=2.0, weight_floor=0.5),
    "unified": LossConfig(kind="unified", mask="ppo", clip_low=0.2, clip_high=0.28, weight_cap=1.1),
    "ppo_clip": LossConfig(kind="ppo_clip", clip_low=0.2, clip_high=0.28),
    "dual_clip": LossConfig(kind="ppo_clip", clip_low=0.2, clip_high=0.2, dual_clip=3.0),
}


def tokens(policy, anchor, advantages, weights=None) -> LossInput:
    policy, anchor, advantages = (jnp.asarray(x) for x in (policy, anchor, advantages))
    weights = jnp.ones_like(policy) if weights is None else jnp.asarray(weights)
    return LossInput(policy, anchor, advantages, weights, jnp.ones(policy.shape, jnp.int32))


def gradient(loss, x: LossInput) -> jax.Array:
    return jax.grad(lambda p: loss(dataclasses.replace(x, policy_logprobs=p)))(x.policy_logprobs)


def random_tokens(n=40, seed=0) -> LossInput:
    """Ratios on both sides of every bound, none nearer to one than 1e-4."""
    rng = np.random.default_rng(seed)
    policy = -rng.exponential(2, n)
    return tokens(policy, policy - rng.normal(0, 0.8, n), rng.normal(size=n), rng.uniform(0.1, 1, n))


# -- by hand -----------------------------------------------------------------------------------------------------

# Four tokens of weights 0.5, 0.25, 0.125, 0.125; log pi = log of 0.4, 0.1, 0.8, 0.05, mu = 0.2, 0.2, 0.1, 0.1:
# r = 2, 1/2, 8, 1/2; A = 1, -2, -1, 3.
HAND = ([0.4, 0.1, 0.8, 0.05], [0.2, 0.2, 0.1, 0.1], [1.0, -2.0, -1.0, 3.0], [0.5, 0.25, 0.125, 0.125])
LOG = [math.log(p) for p in HAND[0]]


@pytest.mark.parametrize(
    ("config", "value"),
    [
        # w r A log pi, summed and negated.
        (
            CONFIGS["reinforce"],
            -(0.5 * 2 * LOG[0] + 0.25 * 0.5 * -2 * LOG[1] + 0.125 * 8 * -1 * LOG[2] + 0.125 * 0.5 * 3 * LOG[3]),
        ),
        # The third ratio counts as the cap, 5.
        (
            LossConfig(weight_cap=5.0),
            -(0.5 * 2 * LOG[0] + 0.25 * 0.5 * -2 * LOG[1] + 0.125 * 5 * -1 * LOG[2] + 0.125 * 0.5 * 3 * LOG[3]),
        ),
        # The first token (A > 0, r > 1.28) and the second (A < 0, r < 0.8) go; 8 is capped at 5.
        (
            LossConfig(kind="unified", mask="ppo", clip_low=0.2, clip_high=0.28, weight_cap=5.0),
            -(0.125 * 5 * -1 * LOG[2] + 0.125 * 0.5 * 3 * LOG[3]),
        ),
        # min(2, 1.28) = 1.28; min(-1, -1.6) = -1.6; min(-8, -1.28) = -8; min(1.5, 2.4) = 1.5.
        (CONFIGS["ppo_clip"], -(0.5 * 1.28 + 0.25 * -1.6 + 0.125 * -8 + 0.125 * 1.5)),
        # Upper bound 1.2, and -8 is raised to -3.
        (CONFIGS["dual_clip"], -(0.5 * 1.2 + 0.25 * -1.6 + 0.125 * -3 + 0.125 * 1.5)),
    ],
    ids=["reinforce", "cispo", "unified", "ppo_clip", "dual_clip"],
)
def test_hand_worked_values(config, value):
    policy, anchor, advantages, weights = map(np.array, HAND)
    found = policy_loss(tokens(np.log(policy), np.log(anchor), advantages, weights), config)
    np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-7)  # terms of size 1 in float32


@pytest.mark.parametrize(("advantage", "sign"), [(1.0, -1), (-1.0, 1)])
def test_rare_token_far_above_the_cap_keeps_its_gradient(advantage, sign):
    """log-prob -3, ratio e^4: dL/dlogp = -cap * advantage. A clip without the log-prob would give 0, a loss without
    the stop-gradient r (1 + logp) = -2 r: the wrong sign."""
    x = tokens([-3.0], [-7.0], [advantage])
    np.testing.assert_allclose(gradient(lambda x: cispo(x, 5.0), x), [sign * 5.0], rtol=1e-6)


@pytest.mark.parametrize("logprob", [-0.1, -0.5, -1.0, -2.0, -4.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_on_policy_every_gradient_is_reinforces(name, logprob):
    """At ratio 1 the gradient is -advantage at every log-prob, whatever the loss."""
    x = tokens([logprob, logprob], [logprob, logprob], [1.5, -0.5])
    np.testing.assert_allclose(gradient(lambda x: policy_loss(x, CONFIGS[name]), x), [-1.5, 0.5], rtol=1e-6)


def test_a_token_that_ppo_drops_has_no_gradient_and_cispos_has():
    x = tokens([-1.0, -3.0, -1.0, -3.0], [-3.0, -1.0, -3.0, -1.0], [1.0, -1.0, -1.0, 1.0])
    clipped = gradient(lambda x: ppo_clip(x, 0.2, 0.2), x)
    assert (clipped[:2] == 0).all() and (clipped[2:] != 0).all()
    assert (gradient(lambda x: cispo(x, 5.0), x) != 0).all()
    assert kept(x, CONFIGS["ppo_clip"]).tolist() == [False, False, True, True]
    assert kept(x, CONFIGS["cispo"]).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_kept_are_the_tokens_with_a_gradient(name):
    x = random_tokens(400)
    found = gradient(lambda x: policy_loss(x, CONFIGS[name]), x) != 0
    np.testing.assert_array_equal(kept(x, CONFIGS[name]), found)


# -- finite differences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_agree_with_finite_differences(name):
    """In float64 NumPy, written from the formulas, with what stands under the stop-gradient held at its value."""
    with jax.enable_x64(True):
        config, x = CONFIGS[name], random_tokens()
        policy, anchor, advantages, weights = (
            np.asarray(v) for v in (x.policy_logprobs, x.anchor_logprobs, x.advantages, x.weights)
        )
        ratio = np.exp(policy - anchor)
        low, high = 1 - (config.clip_low or 0), 1 + (config.clip_high or 0)
        frozen = np.clip(ratio, config.weight_floor, np.inf if config.weight_cap is None else config.weight_cap)
        if config.kind == "unified":
            frozen = np.where(((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low)), 0, frozen)

        def loss(policy):
            if config.kind != "ppo_clip":
                return -np.sum(weights * frozen * advantages * policy)
            r = np.exp(policy - anchor)
            surrogate = np.minimum(r * advantages, np.clip(r, low, high) * advantages)
            if config.dual_clip:
                surrogate = np.where(advantages < 0, np.maximum(surrogate, config.dual_clip * advantages), surrogate)
            return -np.sum(weights * surrogate)

        found, step = gradient(lambda x: policy_loss(x, config), x), 1e-6
        numeric = [(loss(policy + e) - loss(policy - e)) / (2 * step) for e in step * np.eye(len(policy))]
        np.testing.assert_allclose(found, numeric, rtol=1e-7, atol=1e-8)
        if name not in ("reinforce", "cispo", "cispo_floor"):  # the bounds act on some of the tokens
            assert 5 < int(kept(x, config).sum()) < 35


# -- identities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28)])
def test_unified_with_ppos_thresholds_and_no_cap_has_ppos_gradient_token_by_token(low, high):
    with jax.enable_x64(True):
        x = random_tokens(200)
        masked = gradient(lambda x: unified(x, trust_region(x.ratio, x.advantages, low, high)), x)
        clipped = gradient(lambda x: ppo_clip(x, low, high), x)
        np.testing.assert_allclose(masked, clipped, rtol=1e-12)
        assert 20 < int((masked == 0).sum()) < 180


def test_the_identity_needs_the_uncapped_weight_and_masked_tokens_in_the_denominator():
    """Its side conditions: with a cap, or with the weights of dropped tokens dealt to the others, it fails."""
    with jax.enable_x64(True):
        x = random_tokens(200)
        keep, clipped = trust_region(x.ratio, x.advantages, 0.2, 0.28), gradient(lambda x: ppo_clip(x, 0.2, 0.28), x)
        capped = gradient(lambda x: unified(x, keep, weight_cap=1.1), x)
        assert np.abs(capped - clipped).max() > 1e-2
        dealt = dataclasses.replace(x, weights=x.weights * x.weights.sum() / jnp.sum(x.weights * keep))
        assert np.abs(gradient(lambda x: unified(x, keep), dealt) - clipped).max() > 1e-2


def test_caps_to_infinity_give_reinforce_with_importance_weights():
    with jax.enable_x64(True):
        x = random_tokens()
        for loss in (cispo, lambda x: cispo(x, 1e300), lambda x: unified(x, jnp.ones(x.ratio.shape, bool))):
            np.testing.assert_allclose(gradient(loss, x), gradient(reinforce, x), rtol=1e-14)
            np.testing.assert_allclose(loss(x), reinforce(x), rtol=1e-14)


def test_without_a_mask_unified_is_cispo():
    x = random_tokens()
    config = LossConfig(kind="unified", weight_cap=2.0, weight_floor=0.5)
    np.testing.assert_array_equal(policy_loss(x, config), policy_loss(x, CONFIGS["cispo_floor"]))


# -- junk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_of_weight_zero_count_for_nothing_whatever_stands_there(name):
    junk = np.array([-np.inf, np.nan, 1e30], np.float32)
    x = tokens([-1.0, *junk], [-1.0, *-junk], [2.0, 0.0, 1.0, -1.0], [1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(gradient(lambda x: policy_loss(x, CONFIGS[name]), x), [-2.0, 0.0, 0.0, 0.0])
    assert np.isfinite(policy_loss(x, CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_without_a_token_has_loss_and_gradient_zero(name):
    x = dataclasses.replace(random_tokens(), weights=jnp.zeros(40))
    assert policy_loss(x, CONFIGS[name]) == 0
    np.testing.assert_array_equal(gradient(lambda x: policy_loss(x, CONFIGS[name]), x), np.zeros(40))


@pytest.mark.parametrize("name", CONFIGS)
def test_log_ratios_of_ten_thousand_are_clamped(name):
    """Beyond e^20 nothing is infinite; ppo_clip has no gradient there, the others that of the clamped weight."""
    x = tokens([-1.0, -1e4, -1.0, -1e4], [-1e4, -1.0, -1e4, -1.0], [1.0, 1.0, -1.0, -1.0])
    config, found = CONFIGS[name], gradient(lambda x: policy_loss(x, CONFIGS[name]), x)
    assert np.isfinite(policy_loss(x, config)) and np.isfinite(found).all()
    large, small = np.exp(MAX_LOG_RATIO), np.exp(-MAX_LOG_RATIO)
    expected = {
        "reinforce": [-large, -small, large, small], "cispo": [-2, -small, 2, small],
        "cispo_floor": [-2, -0.5, 2, 0.5], "unified": [0, -small, 1.1, 0], "ppo_clip": [0] * 4, "dual_clip": [0] * 4,
    }  # fmt: skip
    np.testing.assert_allclose(found, expected[name], rtol=1e-5)


def test_ratio_is_clamped_before_the_exp():
    ratio = importance_ratio(jnp.array([0.0, -500.0]), jnp.array([-500.0, 0.0]), jnp.array([True, True]))
    np.testing.assert_allclose(ratio, [np.exp(20.0), np.exp(-20.0)], rtol=1e-5)


def test_mismatch_weight_is_truncated_and_one_on_padding():
    trainer, rollout = jnp.log(jnp.array([0.4, 0.1, 0.5])), jnp.log(jnp.array([0.1, 0.2, 0.5]))
    weight = mismatch_weight(trainer, rollout.at[2].set(jnp.nan), jnp.array([True, True, False]), 2.0)
    np.testing.assert_allclose(weight, [2.0, 0.5, 1.0], rtol=1e-6)


# -- settings ----------------------------------------------------------------------------------------------------


def only_rare(ratio, advantages, low, high):
    """A researcher's own mask."""
    return ratio < 1 + high


def test_a_mask_of_ones_own_is_named_as_module_and_function():
    config = LossConfig(kind="unified", mask=f"{__name__}:only_rare", clip_high=0.5)
    x = tokens([-1.0, -1.0], [-2.0, -1.0], [-1.0, 1.0])
    assert kept(x, config).tolist() == [False, True]
    np.testing.assert_allclose(gradient(lambda x: policy_loss(x, config), x), [0.0, -1.0])
    assert set(MASKS) == {"none", "ppo"}
    for wrong in ("ppoo", "no.such.module:mask", f"{__name__}:absent"):
        with pytest.raises(ValueError, match="mask: cannot load .* write module:function, or one of none, ppo"):
            find_mask(wrong)


# -- the reference -----------------------------------------------------------------------------------------------


def held(policy, reference, weights) -> LossInput:
    """Tokens without a policy loss (A = 0), so that what is left is the KL term."""
    x = tokens(policy, policy, np.zeros(len(policy)), weights)
    return dataclasses.replace(x, reference_logprobs=jnp.asarray(reference))


def kl_config(estimator, **values) -> LossConfig:
    return LossConfig(weight_cap=5.0, kl_coefficient=0.5, kl_in="loss", kl_estimator=estimator, **values)


def test_kl_terms_by_hand():
    """pi = 0.5 and 0.1 against pi_ref = 0.25 and 0.2: d = -log 2, log 2; weights 0.5 and 0.25, coefficient 0.5."""
    x = held(np.log([0.5, 0.1]), np.log([0.25, 0.2]), [0.5, 0.25])
    ln2 = np.log(2)
    for estimator, terms in (("k1", [ln2, -ln2]), ("k2", [ln2**2 / 2] * 2), ("k3", [ln2 - 0.5, 1 - ln2])):
        np.testing.assert_allclose(kl_terms(x.policy_logprobs, x.reference_logprobs, estimator), terms, rtol=1e-6)
        if estimator != "k1":
            np.testing.assert_allclose(
                policy_loss(x, kl_config(estimator)), 0.5 * np.dot([0.5, 0.25], terms), rtol=1e-6
            )


def test_gradients_of_the_kl_agree_with_finite_differences_and_with_the_kl():
    """k2's gradient, averaged over the policy's own tokens, is that of the KL; that of k1 is zero; k3's is neither."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits_V, reference_V = rng.normal(size=7), np.log(rng.dirichlet(np.ones(7)))
        policy = lambda logits: jax.nn.log_softmax(logits)  # noqa: E731
        kl = lambda logits: jnp.sum(jnp.exp(policy(logits)) * (policy(logits) - reference_V))  # noqa: E731
        # Token v comes with probability pi(v): the mean over tokens is a sum with these (constant) weights.
        weights = np.exp(policy(logits_V))
        mean = lambda estimator: lambda logits: kl_loss(held(policy(logits), reference_V, weights), estimator)  # noqa: E731
        np.testing.assert_allclose(jax.grad(mean("k2"))(logits_V), jax.grad(kl)(logits_V), atol=1e-12)
        np.testing.assert_allclose(jax.grad(mean("k1"))(logits_V), np.zeros(7), atol=1e-12)
        for estimator in ("k1", "k3"):
            np.testing.assert_allclose(mean(estimator)(logits_V), kl(logits_V), rtol=1e-12)
        for estimator in ("k2", "k3"):
            loss, step = lambda p: float(policy_loss(held(p, reference_V, weights), kl_config(estimator))), 1e-6  # noqa: B023
            p = np.asarray(policy(logits_V))
            numeric = [(loss(p + e) - loss(p - e)) / (2 * step) for e in step * np.eye(7)]
            found = gradient(lambda x: policy_loss(x, kl_config(estimator)), held(p, reference_V, weights))  # noqa: B023
            np.testing.assert_allclose(found, numeric, rtol=1e-7, atol=1e-9)


def test_junk_in_the_reference_counts_for_nothing_where_the_weight_is_zero():
    x = held([-1.0, -2.0, -1e4], [-1.5, np.nan, 0.0], [1.0, 0.0, 1.0])
    for estimator in ("k2", "k3"):
        assert np.isfinite(policy_loss(x, kl_config(estimator)))
        assert np.isfinite(gradient(lambda x: policy_loss(x, kl_config(estimator)), x)).all()  # noqa: B023


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(weight_cap=5.0, kl_coefficient=-1.0), "kl_coefficient: -1.0 must be at least 0"),
        (dict(weight_cap=5.0, kl_coefficient=0.1, kl_in="loss"), "kl_estimator: None must be one of"),
        (dict(weight_cap=5.0, kl_coefficient=0.1, kl_in="los", kl_estimator="k3"), "kl_in: 'los' must be one of"),
        (dict(weight_cap=5.0, kl_estimator="k3"), "kl_estimator: 'k3' is not read while kl_coefficient is 0"),
        (dict(weight_cap=5.0, kl_coefficient=0.1, kl_in="loss", kl_estimator="k1"), "'k1' in the loss holds nothing"),
        (dict(weight_cap=0.2), "weight_cap: 0.2 would scale down even on-policy tokens"),
        (dict(), "weight_cap: missing; kind='cispo' needs it"),
        (dict(weight_cap=5.0, weight_floor=1.5), "weight_floor: 1.5 would scale up even on-policy tokens"),
        (dict(kind="ppo_clip", clip_low=0.2), "clip_high: missing; kind='ppo_clip' needs it"),
        (dict(kind="unified", mask="ppo"), "clip_low: missing; kind='unified' needs it"),
        (dict(kind="ppo_clip", clip_low=1.2, clip_high=0.2), "clip_low: 1.2 must be above 0 and at most 1"),
        (dict(kind="ppo_clip", clip_low=0.2, clip_high=0.0), "clip_high: 0.0 must be above 0"),
        (dict(kind="ppo_clip", clip_low=0.2, clip_high=0.2, dual_clip=1.0), "dual_clip: 1.0 would cut even on-policy"),
        (dict(kind="ppo_clip", clip_low=0.2, clip_high=0.2, weight_cap=5.0), "weight_cap: 5.0 is not read by"),
        (dict(kind="reinforce", weight_cap=5.0), "weight_cap: 5.0 is not read by kind='reinforce'"),
        (dict(weight_cap=5.0, clip_high=0.2), "clip_high: 0.2 is not read by kind='cispo'"),
        (dict(weight_cap=5.0, mask="ppo"), "mask: 'ppo' is not read by kind='cispo'"),
        (dict(kind="unified", clip_low=0.2), "clip_low: 0.2 is not read by kind='unified'"),
        (dict(weight_cap=5.0, mismatch_cap=2.0), "the weight would count it twice; set ratio_anchor='trainer'"),
        (dict(weight_cap=5.0, mismatch_cap=0.0, ratio_anchor="trainer"), "mismatch_cap: 0.0 must be above 0"),
        *[({"weight_cap": 5.0, field: "mean"}, f"{field}: 'mean' must be one of")
          for field in ("kind", "aggregation", "advantage_scale", "std", "ratio_anchor")],
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_reason(values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        LossConfig(**values)


def test_the_band_is_told_in_both_conventions():
    assert "[0, 5] (eps_high = 4, no lower bound)" in LossConfig(weight_cap=5.0).describe()
    assert "[0.5, 2] (eps_high = 1, eps_low = 0.5)" in CONFIGS["cispo_floor"].describe()
    assert "trusted in [0.8, 1.28] (eps_low = 0.2, eps_high = 0.28)" in CONFIGS["ppo_clip"].describe()
    assert all(config.describe() for config in CONFIGS.values()) and {c.kind for c in CONFIGS.values()} == set(KINDS)
