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
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segment_ids_BT: jax.Array,
    k_segment_ids_BS: jax.Array,
    *,
    block: int,
    in_order: bool,
) -> jax.Array:
    """Return o_BTNH for any positions and segment ids; arguments as `api.softmax_attention` describes them."""
    T = q_BTNH.shape[1]
    keys = k_BSKH, v_BSKH, k_positions_BS, k_segment_ids_BS
    queries = q_BTNH, q_positions_BT, q_segment_ids_BT
    if block >= T:
        return _attend(*keys, queries)

    # Stretches of whole blocks, each with the keys up to its end: 8 compute 9/16 of all scores, more save little.
    # Few blocks make 4 (5/8): stretches of a single block are no loops, and a program of many such is slow on CPUs.
    blocks = -(-T // block)
    stretch = -(-blocks // (8 if blocks > 8 else 4)) * block if in_order else T
    outputs = []
    for start in range(0, T, stretch):
        here = jax.tree.map(lambda x: x[:, start : start + stretch], queries)  # noqa: B023
        before = jax.tree.map(lambda x: x[:, : start + stretch], keys) if in_order else keys  # noqa: B023
        outputs.append(_by_blocks(before, here, block))
    return jnp.concatenate(outputs, axis=1)


def _by_blocks(keys, queries, block):
    """o_BTNH of all queries, one block after the other."""
    B, T, N, H = queries[0].shape

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -T % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)

    # Without the checkpoint the backward pass would keep the scores of every block: the whole [T, S] again.
    o = jax.lax.map(jax.checkpoint(partial(_attend, *keys)), jax.tree.map(cut, queries))
    return jnp.moveaxis(o, 0, 1).reshape(B, -1, N, H)[:, :T]


MASKED, LOWEST_TOP = -1e30, -1e29
"""Score of a key that is not seen, and the least that a row's maximum may be: exp of their difference is 0, also in
a row of masked scores only, so that no further mask is needed and nothing, gradients included, becomes NaN."""


def _attend(k_BSKH, v_BSKH, k_positions_BS, k_segment_ids_BS, queries):
    """Return o_BTNH of one block of queries (q, positions, segments) over all keys.

    G are the query heads of one key/value head. They are laid beside the queries, [B, K, G T, H] against
    [B, K, S, H]: plain batched products, three times as fast on CPU as einsums over five axes.
    """
    q_BTNH, q_positions_BT, q_segment_ids_BT = queries
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    seen_BTS = (
        (q_segment_ids_BT[:, :, None] == k_segment_ids_BS[:, None])
        & (k_segment_ids_BS[:, None] > 0)
        & (k_positions_BS[:, None] <= q_positions_BT[:, :, None])
    )
    q_BKXH = jnp.einsum("btkgh->bkgth", q_BTNH.reshape(B, T, K, N // K, H)).reshape(B, K, -1, H)
    # Keys as [H, S]: their gradient then comes out of a product in that order, five times as fast on CPU.
    k_BKHS, v_BKSH = jnp.einsum("bskh->bkhs", k_BSKH), jnp.einsum("bskh->bksh", v_BSKH)
    scores_BKXS = jnp.einsum("bkxh,bkhs->bkxs", q_BKXH, k_BKHS, preferred_element_type=wide) * H**-0.5
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKXS.reshape(B, K, N // K, T, S), MASKED)
    top_BKGT1 = jax.lax.stop_gradient(jnp.maximum(scores_BKGTS.max(-1, keepdims=True), LOWEST_TOP))
    exp_BKXS = jnp.exp(scores_BKGTS - top_BKGT1).reshape(B, K, -1, S)
    sum_BKX1 = exp_BKXS.sum(-1, keepdims=True)
    o_BKXH = jnp.einsum("bkxs,bksh->bkxh", exp_BKXS, v_BKSH.astype(wide)) / jnp.where(sum_BKX1 == 0, 1, sum_BKX1)
    return jnp.einsum("bkgth->btkgh", o_BKXH.reshape(B, K, -1, T, H)).reshape(B, T, N, H).astype(q_BTNH.dtype)
