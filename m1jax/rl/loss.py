"""The policy loss of CISPO. One pure function of arrays; it knows no model, no batch layout and no optimizer.

    L = - sum_t  weight_t * sg(min(r_t, cap)) * advantage_t * log pi(token_t),      r_t = pi(token_t) / mu(token_t)

The importance ratio is capped *under the stop-gradient*, so a token whose ratio is far above the cap still pulls on
its log-probability with the capped weight; PPO's clip would drop it (MiniMax-M1, section 3.1, equations 4 and 5).
There is no lower bound, no KL term, and every normalisation already sits in `weight_t` (see `m1jax.rl.batch`), which
makes the loss a plain sum: it is the same for every split of the batch into micro-batches or devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

AGGREGATIONS = ("group_tokens", "update_tokens")
RATIO_ANCHORS = ("rollout", "trainer")

MAX_LOG_RATIO = 20.0
"""log r is clamped to +-20 before exp: e^20 is far beyond every cap, and exp of junk would be inf, inf * 0 NaN."""


@dataclass(frozen=True)
class LossConfig:
    """Settings of the policy loss.

    Attributes:
        weight_cap: upper bound of the importance weight, absolute (the paper's 1 + eps_high). The paper does not
            publish its value; ScaleRL (arXiv 2510.13786) finds 4, 5 and 8 alike.
        aggregation: "group_tokens" divides each group by its own tokens and takes the mean over the groups of the
            update (equation 4); "update_tokens" divides everything by the tokens of the update.
        ratio_anchor: what r is measured against: "rollout", the engine's log-probabilities, or "trainer", one more
            forward pass before the first update. Frozen once per generation batch either way.
    """

    weight_cap: float = 5.0
    aggregation: str = "group_tokens"
    ratio_anchor: str = "rollout"

    def __post_init__(self):
        if self.weight_cap < 1:
            raise ValueError(
                f"weight_cap: {self.weight_cap} would scale down even on-policy tokens (their ratio is 1); "
                f"it is the absolute cap 1 + eps_high, so choose at least 1 (eps_high = 4 is weight_cap = 5)"
            )
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation: {self.aggregation!r} must be one of {AGGREGATIONS}")
        if self.ratio_anchor not in RATIO_ANCHORS:
            raise ValueError(f"ratio_anchor: {self.ratio_anchor!r} must be one of {RATIO_ANCHORS}")

    def describe(self) -> str:
        """One line for the start of a run: the band in both conventions."""
        return (
            f"CISPO: importance weights in [0, {self.weight_cap:g}] (eps_high = {self.weight_cap - 1:g}, "
            f"no lower bound), ratio against the {self.ratio_anchor} log-probabilities, {self.aggregation} aggregation"
        )


def cispo(
    policy_logprobs: jax.Array,
    anchor_logprobs: jax.Array,
    advantages: jax.Array,
    weights: jax.Array,
    weight_cap: float,
) -> jax.Array:
    """The loss above, a scalar sum over all tokens of arrays of one shape (any shape).

    Args:
        policy_logprobs: log pi(token) of the parameters that take the gradient.
        anchor_logprobs: log mu(token), frozen for the generation batch.
        advantages: per token.
        weights: per token, not negative; 0 leaves the token out, whatever stands in the other arrays.
        weight_cap: absolute cap of the importance weight.
    """
    live = weights > 0
    capped = jnp.minimum(importance_ratio(policy_logprobs, anchor_logprobs, live), weight_cap)
    terms = weights * jax.lax.stop_gradient(capped) * advantages * jnp.where(live, policy_logprobs, 0.0)
    return -jnp.sum(terms)


def importance_ratio(policy_logprobs: jax.Array, anchor_logprobs: jax.Array, live: jax.Array) -> jax.Array:
    """r = exp(policy - anchor), 1 on tokens that are not live.

    Padding is masked before the exp: a where after it would still send NaN through the gradient.
    """
    log_ratio = jnp.where(live, policy_logprobs - anchor_logprobs, 0.0)
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
