"""The router: which experts a token goes to, how much each counts, its two losses, and what it tells of itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def route(logits_TE: jax.Array, num_selected: int) -> tuple[jax.Array, jax.Array]:
    """Return the experts of every token, best first, and their weights, which sum to 1.

    weights = p_selected / sum(p_selected), p = softmax(logits), which is the softmax of the selected logits alone:
    what the others had cancels out.

    Args:
        logits_TE: [T, E], finite.
        num_selected: A, experts per token.

    Returns:
        expert_ids_TA: int32 [T, A], distinct in each row; among equal logits the lower index goes first.
        combine_weights_TA: [T, A] in float32, or float64 for float64 logits; gradients flow to the logits.
    """
    T, E = logits_TE.shape
    if not 1 <= num_selected <= E:
        raise ValueError(f"num_selected is {num_selected}, but logits of shape {logits_TE.shape} have {E} experts")
    # Narrow logits would make ties and move weights by 1e-2, so the router alone is always wide.
    logits_TE = logits_TE.astype(jnp.promote_types(logits_TE.dtype, jnp.float32))
    # A times argmax, not lax.top_k: XLA on CPU sorts whole rows for that, and its gradient is a scatter.
    free_TE = jnp.ones((T, E), bool)
    ids, selected = [], []
    for _ in range(num_selected):
        id_T = jnp.argmax(jnp.where(free_TE, logits_TE, -jnp.inf), axis=1).astype(jnp.int32)
        chosen_TE = jnp.arange(E) == id_T[:, None]
        free_TE &= ~chosen_TE
        ids.append(id_T)
        selected.append(jnp.sum(jnp.where(chosen_TE, logits_TE, 0), axis=1))
    return jnp.stack(ids, axis=1), jax.nn.softmax(jnp.stack(selected, axis=1))


def replay(logits_TE: jax.Array, expert_ids_TA: jax.Array, recorded_TA: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the experts that another run of the router chose, and their weights by the logits of this one.

    For mixture-of-experts RL (R3, arXiv:2510.11370): the trainer goes the way that the engine went, and gradients flow
    through the softmax of its own logits at the chosen experts, as in `route`.

    Args:
        logits_TE: [T, E].
        expert_ids_TA: int32 [T, A], what `route` returned: kept for tokens without a record.
        recorded_TA: integers [T, A]; a token has a record where all of them are at least 0.

    Returns:
        expert_ids_TA: int32 [T, A].
        combine_weights_TA: [T, A] in float32, or float64 for float64 logits.
    """
    recorded_TA = recorded_TA.astype(jnp.int32)
    ids_TA = jnp.where((recorded_TA >= 0).all(axis=1, keepdims=True), recorded_TA, expert_ids_TA)
    logits_TE = logits_TE.astype(jnp.promote_types(logits_TE.dtype, jnp.float32))
    at = lambda id_T: jnp.sum(jnp.where(jnp.arange(logits_TE.shape[1]) == id_T[:, None], logits_TE, 0), axis=1)  # noqa: E731
    return ids_TA, jax.nn.softmax(jnp.stack([at(id_T) for id_T in ids_TA.T], axis=1))


def balance_loss(
    logits_TE: jax.Array,
    expert_ids_TA: jax.Array,
    live_T: jax.Array | None = None,
    total: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Return the load-balancing loss E * sum_e f_e P_e, a scalar; perfect balance gives A.

    f_e is the share of tokens that expert e serves, summed over the A slots, P_e its mean probability over tokens
    (Switch Transformer, arXiv:2101.03961, equation 4, with A slots as in the released MiniMax code). Only P has a
    gradient. Padding counts in neither; with no live token the loss is 0.

    Args:
        logits_TE: [T, E], what `route` was given.
        expert_ids_TA: int32 [T, A], what it returned.
        live_T: bool [T], False on padding. None: all live.
        total: a sum over tokens here to the sum over those of all devices that share the batch, whose balance it is.
    """
    T, E = logits_TE.shape
    wide = jnp.promote_types(logits_TE.dtype, jnp.float32)
    live_T = jnp.ones(T, wide) if live_T is None else live_T.astype(wide)
    share_T = live_T / jnp.maximum(total(live_T.sum()), 1)
    served_TE = (expert_ids_TA[:, :, None] == jnp.arange(E)).sum(1)
    f_E = total(jnp.einsum("t,te->e", share_T, served_TE))
    P_E = total(jnp.einsum("t,te->e", share_T, jax.nn.softmax(logits_TE.astype(wide))))
    return E * jnp.sum(f_E * P_E)


def z_loss(logits_TE: jax.Array, live_T: jax.Array | None = None) -> jax.Array:
    """Return the mean over live tokens of logsumexp(logits)^2, a scalar that keeps logits small.

    ST-MoE, arXiv:2202.08906, equation 5. float32, or float64 for float64 logits; with no live token it is 0.

    Args:
        logits_TE: [T, E], what `route` was given.
        live_T: bool [T], False on padding. None: all live.
    """
    wide = jnp.promote_types(logits_TE.dtype, jnp.float32)
    live_T = jnp.ones(len(logits_TE), wide) if live_T is None else live_T.astype(wide)
    return jnp.sum(live_T * jax.nn.logsumexp(logits_TE.astype(wide), axis=1) ** 2) / jnp.maximum(live_T.sum(), 1)


SMALL_MARGIN = 1e-4
"""Probabilities that lie closer are told apart by rounding: trainer and engine may choose other experts."""


def routing_sums(
    logits_TE: jax.Array,
    own_TA: jax.Array,
    expert_ids_TA: jax.Array,
    live_T: jax.Array,
    total: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> dict[str, jax.Array]:
    """Return what a router did, as sums over live tokens: those of two parts of a batch add up to those of the whole.

    Only the two losses have a gradient; the balance loss is not linear in its tokens, so its sum depends a little on
    how a batch is cut.

    Args:
        logits_TE: [T, E], what `route` was given.
        own_TA: int32 [T, A], what it returned.
        expert_ids_TA: int32 [T, A], the experts that served: `own_TA`, or what `replay` returned.
        live_T: bool [T], False on padding.
        total: of `balance_loss`.

    Returns:
        tokens: int32 [], live tokens.
        expert_tokens: int32 [E], how many of them each expert served; their sum is A * tokens.
        entropy: [], of the softmax over all experts, nats.
        small_margins: int32 [], tokens whose last own choice is by less than SMALL_MARGIN more probable than the best
            expert that was not chosen.
        balance_loss, z_loss: [], the losses of these tokens times `tokens`.
    """
    experts, live_T1 = jnp.arange(logits_TE.shape[1]), live_T[:, None]
    still_TE = jax.lax.stop_gradient(logits_TE.astype(jnp.promote_types(logits_TE.dtype, jnp.float32)))
    p_TE = jax.nn.softmax(still_TE)
    chosen_TE = (own_TA[:, :, None] == experts).any(axis=1)
    margin_T = jnp.where(chosen_TE, p_TE, jnp.inf).min(axis=1) - jnp.where(chosen_TE, -jnp.inf, p_TE).max(axis=1)
    entropy_T = jax.nn.logsumexp(still_TE, axis=1) - jnp.sum(p_TE * still_TE, axis=1)
    served_TE = (expert_ids_TA[:, :, None] == experts).any(axis=1)
    tokens = live_T.sum(dtype=jnp.int32)
    return {
        "tokens": tokens,
        "expert_tokens": jnp.sum(served_TE & live_T1, axis=0, dtype=jnp.int32),
        "entropy": jnp.sum(jnp.where(live_T, entropy_T, 0)),
        "small_margins": jnp.sum((margin_T < SMALL_MARGIN) & live_T, dtype=jnp.int32),
        "balance_loss": balance_loss(logits_TE, expert_ids_TA, live_T, total) * tokens,
        "z_loss": z_loss(logits_TE, live_T) * tokens,
    }
