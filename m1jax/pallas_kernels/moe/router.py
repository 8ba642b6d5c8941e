"""The router: which experts a token goes to, how much each counts, and how evenly tokens are spread."""

import jax
import jax.numpy as jnp


def route(logits_TE: jax.Array, num_selected: int) -> tuple[jax.Array, jax.Array]:
    """Return the experts of every token, best first, and their weights, which sum to 1.

    weights = p_selected / sum(p_selected), p = softmax(logits), which is the softmax of the selected logits alone:
    what the others had cancels out.

    Args:
        logits_TE: [T, E].
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


def balance_loss(logits_TE: jax.Array, expert_ids_TA: jax.Array, live_T: jax.Array | None = None) -> jax.Array:
    """Return the load-balancing loss E * sum_e f_e P_e, a scalar; perfect balance gives A.

    f_e is the share of tokens that expert e serves, summed over the A slots, P_e its mean probability over tokens
    (Switch Transformer, arXiv:2101.03961, equation 4, with A slots as in the released MiniMax code). Only P has a
    gradient. Padding counts in neither; with no live token the loss is 0.

    Args:
        logits_TE: [T, E], what `route` was given.
        expert_ids_TA: int32 [T, A], what it returned.
        live_T: bool [T], False on padding. None: all live.
    """
    T, E = logits_TE.shape
    wide = jnp.promote_types(logits_TE.dtype, jnp.float32)
    live_T = jnp.ones(T, wide) if live_T is None else live_T.astype(wide)
    share_T = live_T / jnp.maximum(live_T.sum(), 1)
    served_TE = (expert_ids_TA[:, :, None] == jnp.arange(E)).sum(1)
    f_E = jnp.einsum("t,te->e", share_T, served_TE)
    P_E = jnp.einsum("t,te->e", share_T, jax.nn.softmax(logits_TE.astype(wide)))
    return E * jnp.sum(f_E * P_E)
