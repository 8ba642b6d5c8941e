"""Lightning attention in chunks of C tokens, in plain JAX with a hand-written backward pass.

With S the state entering a chunk and i, j its tokens (every decay is exp of a difference that is not positive):

    D[i, j] = exp(-slope (i - j)), j <= i       token j as seen by token i
    a[i]    = exp(-slope (i + 1))               S as seen by token i
    z[j]    = exp(-slope (last - j))            token j as seen by the state leaving the chunk
    g       = exp(-slope C)                     S as seen by the state leaving the chunk

    A = (Q K^T) * D        O = A V + a * (Q S)        S' = g S + (z * K)^T V

The backward pass saves nothing but its inputs. With dS the cotangent of the state leaving a chunk it goes over the
chunks twice: forward in time, making the states again, for dQ, which needs S; backward in time for dK and dV, which
need dS:

    dA = (dO V^T) * D      dQ = dA K + a * (dO S^T)
    dK = dA^T Q + z * (V dS^T)      dV = A^T dO + z * (K dS)      dS <- g dS + (a * Q)^T dO

Padding and packing are in the decays alone: positions i, j count live tokens only, D is zero between segments, a is
zero outside the segment that S belongs to, z is zero outside the last one, and g is zero where those two differ.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


def lightning_attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH, *, chunk):
    """Return o_BTNH and the final state; `api.lightning_attention` says what the arguments mean."""
    B, T, N, H = q_BTNH.shape
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((1, T), jnp.int32)  # one row for all: the whole batch then shares its decays
    if initial_state_BNHH is None:
        initial_state_BNHH = jnp.zeros((B, N, H, H), _wide(q_BTNH))
    return _chunked(min(chunk, T), q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH)


# -- forward and backward ----------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk, q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH):
    wide = _wide(q_BTNH)

    def step(S, block):
        spans, q, k, v = block
        q, k, v, decay = q.astype(wide), k.astype(wide), v.astype(wide), _decays(slopes_N.astype(wide), spans)
        A = jnp.einsum("bind,bjnd->bnij", q, k) * decay.D
        O = jnp.einsum("bnij,bjne->bine", A, v) + decay.a * jnp.einsum("bind,bnde->bine", q, S)
        return _next_state(S, k, v, decay), O.astype(q_BTNH.dtype)

    blocks = _spans(chunk, segment_ids_BT), *_cut(chunk, q_BTNH, k_BTNH, v_BTNH)
    state_BNHH, o_GBCNH = _scan(step, initial_state_BNHH.astype(wide), blocks)
    return _join(o_GBCNH, q_BTNH), state_BNHH


def _chunked_fwd(chunk, *inputs):
    return _chunked(chunk, *inputs), inputs


def _chunked_bwd(chunk, inputs, cotangents):
    q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH = inputs
    do_BTNH, dstate_BNHH = cotangents
    wide = _wide(q_BTNH)

    def queries(S, block):
        spans, _, k, v, dO = block
        k, v, dO, decay = k.astype(wide), v.astype(wide), dO.astype(wide), _decays(slopes_N.astype(wide), spans)
        dA = jnp.einsum("bine,bjne->bnij", dO, v) * decay.D
        dQ = jnp.einsum("bnij,bjnd->bind", dA, k) + decay.a * jnp.einsum("bine,bnde->bind", dO, S)
        return _next_state(S, k, v, decay), dQ.astype(q_BTNH.dtype)

    def keys_and_values(dS, block):
        spans, *block = block
        (q, k, v, dO), decay = (x.astype(wide) for x in block), _decays(slopes_N.astype(wide), spans)
        A = jnp.einsum("bind,bjnd->bnij", q, k) * decay.D
        dA = jnp.einsum("bine,bjne->bnij", dO, v) * decay.D
        dK = jnp.einsum("bnij,bind->bjnd", dA, q) + decay.z * jnp.einsum("bjne,bnde->bjnd", v, dS)
        dV = jnp.einsum("bnij,bine->bjne", A, dO) + decay.z * jnp.einsum("bjnd,bnde->bjne", k, dS)
        dS = decay.g * dS + jnp.einsum("bind,bine->bnde", decay.a * q, dO)
        return dS, (dK.astype(k_BTNH.dtype), dV.astype(v_BTNH.dtype))

    blocks = _spans(chunk, segment_ids_BT), *_cut(chunk, q_BTNH, k_BTNH, v_BTNH, do_BTNH)
    _, dq = _scan(queries, initial_state_BNHH.astype(wide), blocks)
    dstate_BNHH, (dk, dv) = _scan(keys_and_values, dstate_BNHH, blocks, reverse=True)
    dq_BTNH, dk_BTNH, dv_BTNH = (_join(x, q_BTNH) for x in (dq, dk, dv))
    return dq_BTNH, dk_BTNH, dv_BTNH, None, None, dstate_BNHH.astype(initial_state_BNHH.dtype)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _next_state(S, k, v, decay):
    return decay.g * S + jnp.einsum("bjnd,bjne->bnde", decay.z * k, v)


# -- decays ------------------------------------------------------------------------------------------------------


class _Spans(NamedTuple):
    """Where the tokens of each chunk stand; every leaf is int32 with the chunks G in front."""

    segment: jax.Array  # [G, B, C], 0 is padding
    position: jax.Array  # [G, B, C], live tokens of the chunk up to and including this one
    entering: jax.Array  # [G, B], segment of the state that enters the chunk
    leaving: jax.Array  # [G, B], segment of the state that leaves it


def _spans(chunk, segment_ids_BT):
    """Return the spans of all chunks; the row's tail is filled up with padding."""
    (segment_GBC,) = _cut(chunk, segment_ids_BT)
    G, _, C = segment_GBC.shape
    live_GBC = segment_GBC > 0
    first_B = jnp.argmax(segment_ids_BT > 0, axis=1)  # 0 where nothing is live: a padding token, segment 0
    index_GBC = jnp.where(live_GBC, jnp.arange(G * C).reshape(G, 1, C), first_B[:, None])
    last_GB = jax.lax.cummax(index_GBC.max(2), axis=0)
    first_1B, leaving_GB = (jnp.take_along_axis(segment_ids_BT, x.T, axis=1).T for x in (first_B[None], last_GB))
    entering_GB = jnp.concatenate([first_1B, leaving_GB[:-1]])
    return _Spans(segment_GBC, jnp.cumsum(live_GBC, axis=2, dtype=jnp.int32), entering_GB, leaving_GB)


class _Decays(NamedTuple):
    """The four decays of one chunk, shaped to be multiplied; B is 1 where all rows are alike."""

    D: jax.Array  # [B, N, C, C]
    a: jax.Array  # [B, C, N, 1]
    z: jax.Array  # [B, C, N, 1]
    g: jax.Array  # [B, N, 1, 1]


def _decays(slopes_N, spans):
    """Return the decays of one chunk of spans (without their G)."""
    segment_BC, position_BC, entering_B, leaving_B = spans
    C = segment_BC.shape[1]
    live_BC, length_B = segment_BC > 0, position_BC[:, -1]

    def decay(slopes, steps, seen):
        # Chosen after exp, which sees no negative step: exp(slope * steps) overflows, and 0 * inf is not 0.
        return jnp.where(seen, jnp.exp(-slopes * jnp.maximum(steps, 0)), 0)

    seen_BCC = jnp.tril(jnp.ones((C, C), bool)) & live_BC[:, :, None] & (segment_BC[:, :, None] == segment_BC[:, None])
    steps_BCC = position_BC[:, :, None] - position_BC[:, None]
    from_entering_BC = live_BC & (segment_BC == entering_B[:, None])
    to_leaving_BC = live_BC & (segment_BC == leaving_B[:, None])
    return _Decays(
        D=decay(slopes_N[:, None, None], steps_BCC[:, None], seen_BCC[:, None]),
        a=decay(slopes_N[:, None], position_BC[:, :, None, None], from_entering_BC[:, :, None, None]),
        z=decay(
            slopes_N[:, None], (length_B[:, None] - position_BC)[:, :, None, None], to_leaving_BC[:, :, None, None]
        ),
        g=decay(slopes_N[:, None, None], length_B[:, None, None, None], (entering_B == leaving_B)[:, None, None, None]),
    )


# -- chunks ------------------------------------------------------------------------------------------------------


def _wide(x):
    """Return the dtype to compute in and to keep states in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _cut(chunk, *rows):
    """Return every [B, T, ...] as [G, B, C, ...], zeros behind its end."""

    def cut(x):
        B, T = x.shape[:2]
        x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    return [cut(x) for x in rows]


def _join(blocks_GBC, like_BT):
    """Return [G, B, C, ...] as [B, T, ...]: undo `_cut`."""
    G, B, C, *rest = blocks_GBC.shape
    return jnp.moveaxis(blocks_GBC, 0, 1).reshape(B, G * C, *rest)[:, : like_BT.shape[1]]


def _scan(step, state, blocks, reverse=False):
    """Return `lax.scan`; one chunk alone is computed in place, because a loop of one keeps XLA from fusing."""
    if blocks[0].segment.shape[0] > 1:
        return jax.lax.scan(step, state, blocks, reverse=reverse)
    state, out = step(state, jax.tree.map(lambda x: x[0], blocks))
    return state, jax.tree.map(lambda x: x[None], out)
