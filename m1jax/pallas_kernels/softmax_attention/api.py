"""The public function of softmax attention: it checks shapes and chooses an implementation, nothing else."""

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.softmax_attention import blocked, cudnn, splash

IMPLEMENTATIONS = ("blocked", "cudnn", "splash")
BEST = {"gpu": "cudnn", "tpu": "splash"}
"""The library that a platform prefers, wherever it can do what is asked."""


def softmax_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array | None = None,
    k_positions_BS: jax.Array | None = None,
    q_segment_ids_BT: jax.Array | None = None,
    k_segment_ids_BS: jax.Array | None = None,
    block: int = 128,
    in_order: bool = False,
    part: tuple[jax.Array, int] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return softmax(q k^T / sqrt(H)) v over the keys that each query may see.

        seen[t, s] = segment(t) == segment(s) > 0  and  position(s) <= position(t)

        query head n reads key/value head n // (N // K)

    Padding (segment 0) is seen by nobody and sees nothing. A query that sees no key gets 0, and so do its gradients.

        implementation   runs on      serves
        blocked          anything     everything; plain JAX
        cudnn            NVIDIA GPUs  rows without segment ids, float16 and bfloat16
        splash           TPUs         in order, packed or not; parts of whole vectors of 128 tokens

    Args:
        q_BTNH: floating [B, T, N, H], rotary embedding applied.
        k_BSKH, v_BSKH: floating [B, S, K, H] with K a divisor of N: the same tokens, or a cache.
        q_positions_BT, k_positions_BS: int32, position of each token in its own sequence.
        q_segment_ids_BT, k_segment_ids_BS: int32, 0 for padding and unwritten cache, else the segment. Without these
            four, key s is the token of query s, every token is live and a row is one segment: that a program knows
            when it is compiled, while segment ids are known when it runs.
        block: for "blocked", queries whose scores exist at once; up to this many there is no loop.
        in_order: key s is the token of query s, and no query sees a later one (so S = T); what nobody can see is then
            left out. Positions need not be read: along a segment they grow with the index.
        part: (index, parts), an int32 [] and a number: in order, but the queries are only that one of so many equal
            parts of the row (so S = parts T).
        implementation: one of the table, or None for the library of this platform where it serves the call, else
            "blocked".

    Returns:
        o_BTNH in the dtype of q; scores and softmax are float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes disagree, some of the positions and segment ids are given and others not, or the named
            implementation is unknown or cannot do what is asked.
    """
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4:
        raise ValueError(f"q and k must be [B, T, N, H] and [B, S, K, H], found {q_BTNH.shape} and {k_BSKH.shape}")
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    where = {
        "q_positions": q_positions_BT, "k_positions": k_positions_BS,
        "q_segment_ids": q_segment_ids_BT, "k_segment_ids": k_segment_ids_BS,
    }  # fmt: skip
    missing = [name for name, array in where.items() if array is None]
    if 0 < len(missing) < len(where):
        raise ValueError(f"positions and segment ids are given together or not at all; missing: {', '.join(missing)}")
    for name, array in {"k": k_BSKH, "v": v_BSKH, **where}.items():
        expected = (B, S, K, H) if name in ("k", "v") else (B, T) if name.startswith("q") else (B, S)
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}, but q of shape {q_BTNH.shape} asks for {expected}")
    if N % K:
        raise ValueError(f"{N} query heads must be divisible by {K} key/value heads")
    packed, in_order = not missing, in_order or bool(missing)
    if part is not None and not (in_order and packed):
        raise ValueError("a part of a row is in order, and has positions and segment ids")
    parts = 1 if part is None else part[1]
    if in_order and T * parts != S:
        of = f" in each of {parts} parts" * (parts > 1)
        raise ValueError(f"in order, key s is the token of query s, but there are {T} queries{of} and {S} keys")

    if implementation is None:
        implementation = BEST.get(compat.platform(), "blocked")
        if _why_not(implementation, q_BTNH, k_BSKH, v_BSKH, packed, in_order, part):
            implementation = "blocked"
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f"softmax attention has no implementation {implementation!r}; known: {IMPLEMENTATIONS}")
    elif reason := _why_not(implementation, q_BTNH, k_BSKH, v_BSKH, packed, in_order, part):
        raise ValueError(f"softmax attention by {implementation!r} cannot do this: {reason}")

    if implementation == "cudnn":
        return cudnn.softmax_attention(q_BTNH, k_BSKH, v_BSKH)
    if implementation == "splash":
        return splash.softmax_attention(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT, k_segment_ids_BS, part)
    if q_positions_BT is None or k_positions_BS is None or q_segment_ids_BT is None or k_segment_ids_BS is None:
        q_positions_BT = k_positions_BS = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        q_segment_ids_BT = k_segment_ids_BS = jnp.ones((B, T), jnp.int32)
    return blocked.softmax_attention(
        q_BTNH, k_BSKH, v_BSKH,
        q_positions_BT, k_positions_BS, q_segment_ids_BT, k_segment_ids_BS,
        block=block, in_order=in_order and part is None,
    )  # fmt: skip


def _why_not(name, q_BTNH, k_BSKH, v_BSKH, packed, in_order, part) -> str | None:
    """Return why an implementation does not serve such a call; None where it does."""
    if name == "cudnn":
        return cudnn.why_not(q_BTNH, k_BSKH, v_BSKH, packed, in_order and part is None)
    if name == "splash":
        return splash.why_not(q_BTNH, k_BSKH, v_BSKH, in_order, part)
    return None
