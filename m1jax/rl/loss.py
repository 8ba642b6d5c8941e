"""The policy losses: pure functions of one record of arrays; they know no model, no batch layout and no optimizer.

With r_t = pi(token_t) / mu(token_t), sg the stop-gradient and w_t the weight of a token, each is a plain sum

    reinforce   - sum_t w_t sg(r_t)                  A_t log pi(token_t)
    cispo       - sum_t w_t sg(clip(r_t, floor, cap)) A_t log pi(token_t)
    unified     - sum_t w_t sg(clip(r_t, floor, cap)) M(r_t, A_t) A_t log pi(token_t)
    ppo_clip    - sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)

(MiniMax-M1, arXiv 2506.13585, section 3.1, equations 1 to 7). PPO's clip gives a token that has moved too far no
gradient at all; CISPO caps its weight *under the stop-gradient* and lets it pull on. GRPO, DAPO and Dr. GRPO are
ppo_clip with other bounds, aggregations and advantages: `configs/algorithms.py` has their numbers. All normalisation
sits in w_t (see `m1jax.rl.batch`), so no split of the batch into micro-batches or devices changes a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from m1jax.config import named_function
from m1jax.types import AGGREGATIONS, Array

MAX_LOG_RATIO = 20.0
"""log r is clamped to +-20 before exp: e^20 is far beyond every cap, and exp of junk would be inf, inf * 0 NaN. Beyond
the clamp ppo_clip has no gradient; the others have none through r anyway."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossInput:
    """What a loss sees of the tokens, arrays of one shape (any shape).

    Attributes:
        policy_logprobs: log pi(token) of the parameters that take the gradient.
        anchor_logprobs: log mu(token) of the behaviour policy, frozen for the generation batch.
        advantages: per token.
        weights: per token, not negative; 0 leaves the token out, whatever stands in the other arrays.
        group_ids: int, tokens of one prompt's responses share one; 0 where `weights` is 0. For a loss of your own: the
            ones here find their groups in `weights`.
        reference_logprobs: log pi_ref(token) of the frozen reference; None where nothing is held near one.
    """

    policy_logprobs: jax.Array
    anchor_logprobs: jax.Array
    advantages: jax.Array
    weights: jax.Array
    group_ids: jax.Array
    reference_logprobs: jax.Array | None = None

    @property
    def mask(self) -> jax.Array:
        """The tokens that are in the loss."""
        return self.weights > 0

    @property
    def logprobs(self) -> jax.Array:
        """policy_logprobs with 0 outside the mask: masked first, for 0 * inf would be NaN, in a gradient too."""
        return jnp.where(self.mask, self.policy_logprobs, 0.0)

    @property
    def ratio(self) -> jax.Array:
        """r, with its gradient; 1 outside the mask."""
        return importance_ratio(self.policy_logprobs, self.anchor_logprobs, self.mask)


def importance_ratio(policy_logprobs: jax.Array, anchor_logprobs: jax.Array, live: jax.Array) -> jax.Array:
    """r = exp(policy - anchor), the logarithm clamped to MAX_LOG_RATIO, and 1 on tokens that are not live."""
    log_ratio = jnp.where(live, policy_logprobs - anchor_logprobs, 0.0)
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


# -- the losses --------------------------------------------------------------------------------------------------


def reinforce(x: LossInput) -> jax.Array:
    """REINFORCE with importance weights; no bound but the clamp of log r (equation 3)."""
    return -jnp.sum(x.weights * jax.lax.stop_gradient(x.ratio) * x.advantages * x.logprobs)


def cispo(x: LossInput, weight_cap: float = math.inf, weight_floor: float = 0.0) -> jax.Array:
    """The capped weight keeps the gradient of every token (equations 4 and 5)."""
    weight = jax.lax.stop_gradient(jnp.clip(x.ratio, weight_floor, weight_cap))
    return -jnp.sum(x.weights * weight * x.advantages * x.logprobs)


def unified(x: LossInput, keep: jax.Array, weight_cap: float = math.inf, weight_floor: float = 0.0) -> jax.Array:
    """CISPO of the tokens that a mask keeps; the others stay in the denominator, which is `weights` (equation 6).

    Args:
        x: the tokens.
        keep: bool, one of `MASKS` applied to the *uncapped* ratio.
        weight_cap, weight_floor: bounds of the weight, apart from the mask's thresholds.
    """
    weight = jax.lax.stop_gradient(jnp.clip(x.ratio, weight_floor, weight_cap) * keep)
    return -jnp.sum(x.weights * weight * x.advantages * x.logprobs)


def ppo_clip(x: LossInput, clip_low: float, clip_high: float, dual_clip: float | None = None) -> jax.Array:
    """PPO's clipped surrogate (equation 1); `dual_clip` bounds it for negative advantages by dual_clip * A.

    The bound keeps a token of huge ratio and negative advantage from dominating (Ye et al., arXiv 1912.09729).
    """
    ratio, advantages = x.ratio, x.advantages
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        surrogate = jnp.where(advantages < 0, jnp.maximum(surrogate, dual_clip * advantages), surrogate)
    return -jnp.sum(x.weights * surrogate)


# -- divergence from the reference -------------------------------------------------------------------------------


def kl_terms(policy_logprobs: Array, reference_logprobs: Array, estimator: str, xp: Any = jnp) -> Array:
    """Estimators of KL(pi || pi_ref), token by token, for tokens that were sampled from pi (Schulman, 2020).

    In the later updates of a batch the tokens are the behaviour policy's, and nothing corrects for that (as in GRPO).
    `xp` is NumPy for arrays of the host.

    With d = log pi_ref - log pi, clamped to MAX_LOG_RATIO: k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d. k1 and k3 have the
    KL as their mean; the gradient of k2 has the KL's gradient as its mean; the gradient of k1 has mean zero.
    """
    d = xp.clip(reference_logprobs - policy_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {"k1": -d, "k2": d * d / 2, "k3": xp.expm1(d) - d}[estimator]


def kl_loss(x: LossInput, estimator: str) -> jax.Array:
    """sum_t w_t k_t, averaged like the loss: GRPO's KL term is this with k3."""
    assert x.reference_logprobs is not None
    reference = jnp.where(x.mask, x.reference_logprobs, 0.0)
    return jnp.sum(x.weights * kl_terms(x.logprobs, reference, estimator))


# -- masks of the unified form -----------------------------------------------------------------------------------

Mask = Callable[[jax.Array, jax.Array, float, float], jax.Array]
"""(ratio, advantages, low, high) -> bool, True keeps the token. No gradient flows through it."""


def keep_all(ratio: jax.Array, advantages: jax.Array, low: float, high: float) -> jax.Array:
    """No mask: the unified loss is CISPO."""
    return jnp.ones(ratio.shape, bool)


def trust_region(ratio: jax.Array, advantages: jax.Array, low: float, high: float) -> jax.Array:
    """What PPO's clip gives a gradient: drop A > 0 with r > 1 + high, and A < 0 with r < 1 - low (equation 7)."""
    return ~(((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low)))


MASKS: dict[str, Mask] = {"none": keep_all, "ppo": trust_region}


def find_mask(name: str) -> Mask:
    """The mask of this name, or a researcher's own as "module:function".

    Raises:
        ValueError: there is none.
    """
    try:
        return MASKS[name] if name in MASKS else named_function(name, "mask")
    except ValueError as error:
        raise ValueError(f"{error}, or one of {', '.join(MASKS)}") from error


# -- settings ----------------------------------------------------------------------------------------------------

KINDS = ("reinforce", "cispo", "unified", "ppo_clip")
RATIO_ANCHORS = ("rollout", "trainer")
ADVANTAGE_SCALES = ("group_std", "batch_std", "none")
STANDARD_DEVIATIONS = ("population", "sample")
KL_ESTIMATORS, KL_PLACES = ("k1", "k2", "k3"), ("loss", "reward")


@dataclass(frozen=True)
class LossConfig:
    """Settings of the policy loss; `configs/algorithms.py` has those of published recipes.

    Attributes:
        kind: "reinforce", "cispo", "unified" or "ppo_clip", see above. What a kind does not read may not be set.
        weight_cap: cispo and unified: upper bound of the importance weight, absolute (the paper's 1 + eps_high); in
            unified None is no bound. The paper does not publish its value; ScaleRL (arXiv 2510.13786) finds 4, 5 and 8
            alike.
        weight_floor: cispo and unified: lower bound, absolute (1 - eps_low); 0, as in the paper, never acts.
        mask: unified: "none", "ppo", or a function `(ratio, advantages, low, high) -> bool` as "module:function".
        clip_low, clip_high: ppo_clip, and the mask of unified: the ratio is trusted in [1 - low, 1 + high].
        dual_clip: ppo_clip: bound of the surrogate for negative advantages, above 1; None for none.
        aggregation: how tokens are averaged, see `m1jax.rl.batch`.
        advantage_scale: what the centred reward is divided by: the standard deviation of its group ("group_std"), of
            all live groups of the generation batch ("batch_std"), or nothing ("none").
        std: "population" (divided by the count) or "sample" (count - 1), which makes 6.9% at 8 responses.
        ratio_anchor: what r is measured against: "rollout", the engine's log-probabilities, or "trainer", one more
            forward pass before the first update. Frozen once per generation batch either way.
        mismatch_cap: with the trainer as anchor, weigh each token, of a KL term too, by
            min(pi_trainer / mu_engine, mismatch_cap), for the gap between trainer and engine (truncated importance
            sampling); None for no such weight.
        kl_coefficient: weight of the KL to the reference, the parameters that the run started from; 0 for none.
        kl_in: where it goes: "loss", as one more term (GRPO), or "reward", summed over a response and taken from its
            reward before the groups are compared (PPO of language models).
        kl_estimator: "k1", "k2" or "k3", see `kl_terms`.
    """

    kind: str = "cispo"
    weight_cap: float | None = None
    weight_floor: float = 0.0
    mask: str = "none"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    aggregation: str = "group_tokens"
    advantage_scale: str = "group_std"
    std: str = "population"
    ratio_anchor: str = "rollout"
    mismatch_cap: float | None = None
    kl_coefficient: float = 0.0
    kl_in: str | None = None
    kl_estimator: str | None = None

    def __post_init__(self):
        for field, choices in (
            ("kind", KINDS), ("aggregation", AGGREGATIONS), ("advantage_scale", ADVANTAGE_SCALES),
            ("std", STANDARD_DEVIATIONS), ("ratio_anchor", RATIO_ANCHORS),
        ):  # fmt: skip
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}: {getattr(self, field)!r} must be one of {choices}")
        self._refuse_what_is_not_read()
        if self.weight_cap is not None and self.weight_cap < 1:
            raise ValueError(
                f"weight_cap: {self.weight_cap} would scale down even on-policy tokens (their ratio is 1); "
                f"it is the absolute cap 1 + eps_high, so choose at least 1 (eps_high = 4 is weight_cap = 5)"
            )
        if not 0 <= self.weight_floor <= 1:
            raise ValueError(
                f"weight_floor: {self.weight_floor} would scale up even on-policy tokens (their ratio is 1); "
                f"it is the absolute floor 1 - eps_low, so choose from 0 (no bound) to 1"
            )
        if self.clip_low is not None and not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low: {self.clip_low} must be above 0 and at most 1: ratios are trusted from 1 - it")
        if self.clip_high is not None and self.clip_high <= 0:
            raise ValueError(f"clip_high: {self.clip_high} must be above 0: ratios are trusted up to 1 + it")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip: {self.dual_clip} would cut even on-policy tokens; choose above 1")
        if self.mismatch_cap is not None and self.mismatch_cap <= 0:
            raise ValueError(f"mismatch_cap: {self.mismatch_cap} must be above 0")
        if self.mismatch_cap is not None and self.ratio_anchor == "rollout":
            raise ValueError(
                "mismatch_cap: the ratio against the rollout log-probabilities contains the gap between trainer and "
                "engine already, so the weight would count it twice; set ratio_anchor='trainer' or mismatch_cap=None"
            )
        find_mask(self.mask)
        self._check_kl()

    def _check_kl(self) -> None:
        if not 0 <= self.kl_coefficient < math.inf:
            raise ValueError(f"kl_coefficient: {self.kl_coefficient} must be at least 0 and finite (0 is no KL term)")
        for field, choices in (("kl_in", KL_PLACES), ("kl_estimator", KL_ESTIMATORS)):
            value = getattr(self, field)
            if self.kl_coefficient and value not in choices:
                raise ValueError(f"{field}: {value!r} must be one of {choices} where kl_coefficient is above 0")
            if not self.kl_coefficient and value is not None:
                raise ValueError(
                    f"{field}: {value!r} is not read while kl_coefficient is 0; leave it out or raise that"
                )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator: 'k1' in the loss holds nothing back, for its gradient has mean zero; use k2 or k3 "
                "there, or kl_in='reward'"
            )

    def _refuse_what_is_not_read(self) -> None:
        bounds = {"weight_cap": None, "weight_floor": 0.0}
        clips = {"clip_low": None, "clip_high": None}
        unread = {
            "reinforce": bounds | clips | {"mask": "none", "dual_clip": None},
            "cispo": clips | {"mask": "none", "dual_clip": None},
            "unified": {"dual_clip": None} | (clips if self.mask == "none" else {}),
            "ppo_clip": bounds | {"mask": "none"},
        }[self.kind]
        if self.advantage_scale == "none":
            unread |= {"std": "population"}
        for field, unset in unread.items():
            if getattr(self, field) != unset:
                by = "advantage_scale='none'" if field == "std" else f"kind={self.kind!r}"
                raise ValueError(f"{field}: {getattr(self, field)!r} is not read by {by}; leave it out")
        if self.kind == "cispo" and self.weight_cap is None:
            raise ValueError("weight_cap: missing; kind='cispo' needs it, 5 for example (no cap is kind='reinforce')")
        if self.kind == "ppo_clip" or self.mask == "ppo":
            for field in clips:
                if getattr(self, field) is None:
                    raise ValueError(f"{field}: missing; kind={self.kind!r} needs it (DAPO: low 0.2, high 0.28)")

    @property
    def cap(self) -> float:
        """weight_cap as a number."""
        return math.inf if self.weight_cap is None else self.weight_cap

    def describe(self) -> str:
        """One line for the start of a run: what acts on the ratio, in both conventions, and what averages."""
        low, high = self.clip_low or 0.0, self.clip_high or 0.0
        trusted = f"ratios trusted in [{1 - low:g}, {1 + high:g}] (eps_low = {low:g}, eps_high = {high:g})"
        eps_low = f"eps_low = {1 - self.weight_floor:g}" if self.weight_floor else "no lower bound"
        weights = (
            f"importance weights in [{self.weight_floor:g}, {self.cap:g}] (eps_high = {self.cap - 1:g}, {eps_low})"
        )
        acts = {
            "reinforce": "REINFORCE: importance weights without a bound",
            "cispo": f"CISPO: {weights}",
            "unified": f"unified: {weights}, mask {self.mask}" + f", {trusted}" * bool(low or high),
            "ppo_clip": f"PPO's clip: {trusted}" + f", dual clip {self.dual_clip}" * (self.dual_clip is not None),
        }[self.kind]
        mismatch = f", engine mismatch weight up to {self.mismatch_cap:g}" if self.mismatch_cap is not None else ""
        scale = {"none": "not scaled"}.get(self.advantage_scale, f"over the {self.std} {self.advantage_scale}")
        kl = f", {self.kl_coefficient:g} * {self.kl_estimator} of the KL to the reference in the {self.kl_in}"
        scale += kl * (self.kl_coefficient > 0)
        return (
            f"{acts}, ratio against the {self.ratio_anchor} log-probabilities{mismatch}, {self.aggregation} "
            f"aggregation, advantages {scale}"
        )


def policy_loss(x: LossInput, config: LossConfig) -> jax.Array:
    """The loss that a config asks for, a scalar."""
    if config.kl_in == "loss":
        assert config.kl_estimator is not None
        return _surrogate(x, config) + config.kl_coefficient * kl_loss(x, config.kl_estimator)
    return _surrogate(x, config)


def _surrogate(x: LossInput, config: LossConfig) -> jax.Array:
    if config.kind == "reinforce":
        return reinforce(x)
    if config.kind == "cispo":
        return cispo(x, config.cap, config.weight_floor)
    if config.kind == "unified":
        return unified(x, kept(x, config), config.cap, config.weight_floor)
    return ppo_clip(x, config.clip_low or 0.0, config.clip_high or 0.0, config.dual_clip)


def kept(x: LossInput, config: LossConfig) -> jax.Array:
    """Which tokens the loss gives a gradient: all but those that a clip or mask drops."""
    low, high = config.clip_low or 0.0, config.clip_high or 0.0
    ratio, advantages = jax.lax.stop_gradient((x.ratio, x.advantages))
    if config.kind == "ppo_clip":
        keep = trust_region(ratio, advantages, low, high)
        if config.dual_clip is not None:
            keep &= ~((advantages < 0) & (ratio > config.dual_clip))
        return keep
    return find_mask(config.mask)(ratio, advantages, low, high)


def mismatch_weight(trainer_logprobs: jax.Array, rollout_logprobs: jax.Array, live: jax.Array, cap: float) -> jax.Array:
    """min(pi_trainer / mu_engine, cap) per token, both frozen before the first update; 1 where not live."""
    return jnp.minimum(importance_ratio(trainer_logprobs, rollout_logprobs, live), cap)
