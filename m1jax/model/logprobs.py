"""Log-probabilities of the tokens that a batch holds: the one place where predictions shift by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from m1jax.model.config import ModelConfig
from m1jax.model.transformer import head, hidden_states
from m1jax.types import Array, Params


def token_logprobs(
    params: Params, config: ModelConfig, tokens_BT: Array, segment_ids_BT: Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """log p(tokens[b, t] | earlier tokens of its segment) under softmax(logits / temperature).

    Args:
        params, config: the policy.
        tokens_BT: int32 token ids.
        segment_ids_BT: int32, 0 on padding. The first token of a segment has no prefix: its entry is meaningless and
            must be masked by the caller.
        temperature: the sampler's; the trainer must divide by the same one or the ratio is wrong by a power.

    Returns:
        logprobs_BT and entropy_BT (nats, of the distribution that token t was drawn from; no gradient), at least
        float32, aligned with tokens_BT; router statistics of `hidden_states`.
    """
    B, T = tokens_BT.shape
    hidden_MD, _, router = hidden_states(params, config, tokens_BT, segment_ids_BT)
    # The last position predicts nothing inside the row; the roll brings its output to entry 0, which is masked.
    previous_MD = jnp.roll(hidden_MD.reshape(B, T, -1), 1, axis=1).reshape(B * T, -1)
    logits_MV = head(params, previous_MD) / temperature
    logsumexp_M = jax.nn.logsumexp(logits_MV, axis=-1)
    chosen_M = jnp.take_along_axis(logits_MV, tokens_BT.reshape(-1, 1), axis=-1)[:, 0]
    return (chosen_M - logsumexp_M).reshape(B, T), entropy(logits_MV, logsumexp_M).reshape(B, T), router


def entropy(logits_MV: jax.Array, logsumexp_M: jax.Array) -> jax.Array:
    """Entropy [M] in nats of softmax(logits), as logsumexp - E[logits]; it takes no gradient."""
    logits_MV, logsumexp_M = jax.lax.stop_gradient((logits_MV, logsumexp_M))
    return logsumexp_M - jnp.sum(jnp.exp(logits_MV - logsumexp_M[:, None]) * logits_MV, axis=-1)
