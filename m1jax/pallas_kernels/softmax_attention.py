"""Causal softmax attention in plain JAX: training, chunked prefill against a cache, and decode are one function.

Memory: scores exist for one block of queries at a time, forward and backward, so no [T, S] array is ever made.
"""

from functools import partial

import jax
import jax.numpy as jnp


def softmax_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segment_ids_BT: jax.Array,
    k_segment_ids_BS: jax.Array,
    block: int = 128,
) -> jax.Array:
    """Return softmax(q k^T / sqrt(H)) v over the keys that each query may see.

        seen[t, s] = segment(t) == segment(s) > 0  and  position(s) <= position(t)

        query head n reads key/value head n // (N // K)

    Padding (segment 0) is seen by nobody and sees nothing. A query that sees no key gets 0, and so do its gradients.

    Args:
        q_BTNH: floating [B, T, N, H], rotary embedding applied.
        k_BSKH, v_BSKH: floating [B, S, K, H] with K a divisor of N: the same tokens, or a cache.
        q_positions_BT, k_positions_BS: int32, position of each token in its own sequence.
        q_segment_ids_BT, k_segment_ids_BS: int32, 0 for padding and unwritten cache, else the segment.
        block: queries whose scores exist at once; up to this many there is no loop.

    Returns:
        o_BTNH in the dtype of q; scores and softmax are float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes disagree.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    for name, array, expected in (
        ("k", k_BSKH, (B, S, K, H)),
        ("v", v_BSKH, (B, S, K, H)),
        ("q_positions", q_positions_BT, (B, T)),
        ("k_positions", k_positions_BS, (B, S)),
        ("q_segment_ids", q_segment_ids_BT, (B, T)),
        ("k_segment_ids", k_segment_ids_BS, (B, S)),
    ):
        if array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}, but q of shape {q_BTNH.shape} asks for {expected}")
    if N % K:
        raise ValueError(f"{N} query heads must be divisible by {K} key/value heads")

    attend = partial(_attend, k_BSKH, v_BSKH, k_positions_BS, k_segment_ids_BS)
    queries = q_BTNH, q_positions_BT, q_segment_ids_BT
    if block >= T:
        return attend(queries)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -T % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)

    # Without the checkpoint the backward pass would keep the scores of every block: the whole [T, S] again.
    o = jax.lax.map(jax.checkpoint(attend), jax.tree.map(cut, queries))
    return jnp.moveaxis(o, 0, 1).reshape(B, -1, N, H)[:, :T]


def _attend(k_BSKH, v_BSKH, k_positions_BS, k_segment_ids_BS, queries):
    """Return o_BTNH of one block of queries (q, positions, segments) over all keys. G: query heads per kv head."""
    q_BTNH, q_positions_BT, q_segment_ids_BT = queries
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    seen_BTS = (
        (q_segment_ids_BT[:, :, None] == k_segment_ids_BS[:, None])
        & (k_segment_ids_BS[:, None] > 0)
        & (k_positions_BS[:, None] <= q_positions_BT[:, :, None])
    )[:, None, None]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=wide) * H**-0.5
    # Every exponent is finite and at most 0, also where a query sees nothing, so no gradient can be NaN.
    scores_BKGTS = jnp.where(seen_BTS, scores_BKGTS, jnp.finfo(wide).min)
    top_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True))
    exp_BKGTS = jnp.where(seen_BTS, jnp.exp(scores_BKGTS - top_BKGT1), 0)
    sum_BKGT1 = exp_BKGTS.sum(-1, keepdims=True)
    weights_BKGTS = exp_BKGTS / jnp.where(sum_BKGT1 == 0, 1, sum_BKGT1)
    o_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH.astype(wide))
    return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
