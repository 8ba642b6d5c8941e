"""Lightning attention in chunks of C tokens, in plain JAX with a hand-written backward pass.

With S the state that enters a chunk, i and j two of its tokens and m how many of them are live:

    D[i, j] = exp(-slope (i - j)), j <= i       token j as token i sees it
    a[i]    = exp(-slope (i + 1))               S as token i sees it
    z[j]    = exp(-slope (m - 1 - j)), j < m    token j as the state that leaves the chunk sees it
    g       = exp(-slope m)                     S as the state that leaves the chunk sees it

    A = (Q K^T) * D        O = A V + a * (Q S)        S' = g S + (z * K)^T V

The backward pass saves nothing but its inputs. With dS the cotangent of the state that leaves a chunk it goes over
the chunks twice: forward for dQ, making each S again; backward for dK and dV, which need dS:

    dA = (dO V^T) * D      dQ = dA K + a * (dO S^T)
    dK = dA^T Q + z * (V dS^T)      dV = A^T dO + z * (K dS)      dS <- g dS + (a * Q)^T dO

Padding: the live tokens of a row are first moved to its front, so that i counts live tokens only, wherever the
padding was; the cost is one gather of rows, that of decays made for every row would be ten times as much.
Packing is in the decays: D is zero between segments, a outside the segment that S belongs to, z outside the last
segment of the chunk, and g where those two differ.

Inside a chunk the heads come before the tokens, [B, N, C, H]: the products run twice as fast on CPU. Letters of the
einsum strings: i, j tokens of a chunk; d, e the head widths of keys and of values.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


def lightning_attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH, *, chunk):
    """Return o_BTNH and the final state; `api.lightning_attention` says what the arguments mean."""
    B, T, N, H = q_BTNH.shape
    if initial_state_BNHH is None:
        initial_state_BNHH = jnp.zeros((B, N, H, H), _wide(q_BTNH))
    return _chunked(min(chunk, T), q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH)


# -- forward and backward ----------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk, q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH):
    layout = _layout(q_BTNH, segment_ids_BT)
    decays = _decays(chunk, slopes_N.astype(_wide(q_BTNH)))

    def step(S, spans, block):
        (Q, K, V), decay = _widen(block), decays(spans)
        A = jnp.einsum("bnid,bnjd->bnij", Q, K) * decay.D
        out = jnp.einsum("bnij,bnje->bnie", A, V) + decay.a * jnp.einsum("bnid,bnde->bnie", Q, S)
        return _next_state(S, K, V, decay), out.astype(q_BTNH.dtype)

    spans, rows = _spans(chunk, layout), [_lay_out(chunk, x, layout) for x in (q_BTNH, k_BTNH, v_BTNH)]
    state_BNHH, o_GBCNH = _scan(step, initial_state_BNHH.astype(_wide(q_BTNH)), spans, rows)
    return _join(o_GBCNH, layout), state_BNHH


def _chunked_fwd(chunk, *inputs):
    return _chunked(chunk, *inputs), inputs


def _chunked_bwd(chunk, inputs, cotangents):
    q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH = inputs
    do_BTNH, dstate_BNHH = cotangents
    layout = _layout(q_BTNH, segment_ids_BT)
    decays = _decays(chunk, slopes_N.astype(_wide(q_BTNH)))

    def queries(S, spans, block):
        (_, K, V, dO), decay = _widen(block), decays(spans)
        dA = jnp.einsum("bnie,bnje->bnij", dO, V) * decay.D
        dQ = jnp.einsum("bnij,bnjd->bnid", dA, K) + decay.a * jnp.einsum("bnie,bnde->bnid", dO, S)
        return _next_state(S, K, V, decay), dQ.astype(q_BTNH.dtype)

    def keys_and_values(dS, spans, block):
        (Q, K, V, dO), decay = _widen(block), decays(spans)
        seen = decay.D.swapaxes(2, 3)  # A and dA are made as they are needed, transposed: a tenth quicker at 128 tokens
        A = jnp.einsum("bnjd,bnid->bnji", K, Q) * seen
        dA = jnp.einsum("bnje,bnie->bnji", V, dO) * seen
        dK = jnp.einsum("bnji,bnid->bnjd", dA, Q) + decay.z * jnp.einsum("bnje,bnde->bnjd", V, dS)
        dV = jnp.einsum("bnji,bnie->bnje", A, dO) + decay.z * jnp.einsum("bnjd,bnde->bnje", K, dS)
        dS = decay.g * dS + jnp.einsum("bnid,bnie->bnde", decay.a * Q, dO)
        return dS, (dK.astype(k_BTNH.dtype), dV.astype(v_BTNH.dtype))

    spans, rows = _spans(chunk, layout), [_lay_out(chunk, x, layout) for x in (q_BTNH, k_BTNH, v_BTNH, do_BTNH)]
    _, dq_GBCNH = _scan(queries, initial_state_BNHH.astype(_wide(q_BTNH)), spans, rows)
    dstate_BNHH, (dk_GBCNH, dv_GBCNH) = _scan(keys_and_values, dstate_BNHH, spans, rows, reverse=True)
    dq_BTNH, dk_BTNH, dv_BTNH = (_join(x, layout) for x in (dq_GBCNH, dk_GBCNH, dv_GBCNH))
    return dq_BTNH, dk_BTNH, dv_BTNH, None, None, dstate_BNHH.astype(initial_state_BNHH.dtype)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _next_state(S, K, V, decay):
    return decay.g * S + jnp.einsum("bnjd,bnje->bnde", decay.z * K, V)


def _scan(step, state, spans, rows_BTNH, reverse=False):
    """Return the last state and what `step` gives for each chunk [G, B, C, N, H].

    A chunk is cut out and its heads put first when its turn comes: it stays in cache, and no copy of a whole row is
    made, which took longer than the products. A single chunk takes its step without a loop, which XLA then fuses with
    what is around.
    """
    chunks, chunk = spans.segment.shape[0], spans.segment.shape[2]

    def one(state, where):
        start, span = where
        cut = [jax.lax.dynamic_slice_in_dim(x, start, chunk, 1).swapaxes(1, 2) for x in rows_BTNH]
        state, out = step(state, span, cut)
        return state, jax.tree.map(lambda x: x.swapaxes(1, 2), out)

    if chunks > 1:
        return jax.lax.scan(one, state, (chunk * jnp.arange(chunks), spans), reverse=reverse)
    state, out = one(state, (0, jax.tree.map(lambda x: x[0], spans)))
    return state, jax.tree.map(lambda x: x[None], out)


def _wide(x):
    """Return the dtype to compute in and to keep states in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _widen(block):
    return [x.astype(_wide(x)) for x in block]


# -- where tokens are --------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """The rows after their live tokens were moved to the front; B is 1 where nothing was moved and all are alike."""

    segment_BT: jax.Array  # int32, that of the live tokens, then 0
    length_B: jax.Array  # int32, live tokens
    source_BT: jax.Array | None  # int32, where token t of the front came from; T behind the last. None: not moved
    target_BT: jax.Array | None  # int32, where token t went; T for padding


def _layout(q_BTNH, segment_ids_BT):
    """Return the layout of the batch."""
    B, T = q_BTNH.shape[:2]
    if segment_ids_BT is None:
        return _Layout(jnp.ones((1, T), jnp.int32), jnp.full(1, T, jnp.int32), None, None)
    live_BT = segment_ids_BT > 0
    count_BT = jnp.cumsum(live_BT, axis=1, dtype=jnp.int32)
    target_BT = jnp.where(live_BT, count_BT - 1, T)
    t_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    source_BT = jnp.full((B, T), T, jnp.int32).at[jnp.arange(B)[:, None], target_BT].set(t_BT, mode="drop")
    return _Layout(_move(segment_ids_BT, source_BT), count_BT[:, -1], source_BT, target_BT)


def _move(x_BT, index_BT):
    """Return x[b, index[b, t]], zero where the index is T."""
    return x_BT.at[jnp.arange(x_BT.shape[0])[:, None], index_BT].get(mode="fill", fill_value=0)


def _lay_out(chunk, x_BTNH, layout):
    """Return the rows with live tokens in front and zeros behind the last, up to a whole number of chunks."""
    if layout.source_BT is not None:
        x_BTNH = _move(x_BTNH, layout.source_BT)
    return jnp.pad(x_BTNH, [(0, 0), (0, -x_BTNH.shape[1] % chunk), (0, 0), (0, 0)])


def _join(x_GBCNH, layout):
    """Return [B, T, N, H], every token in its own place again, zeros where there is padding."""
    G, B, C, N, H = x_GBCNH.shape
    x_BTNH = jnp.moveaxis(x_GBCNH, 0, 1).reshape(B, G * C, N, H)[:, : layout.segment_BT.shape[1]]
    return x_BTNH if layout.target_BT is None else _move(x_BTNH, layout.target_BT)


class _Spans(NamedTuple):
    """What lies in each chunk; int32 arrays, the chunks G in front."""

    segment: jax.Array  # [G, B, C], 0 behind the last live token
    length: jax.Array  # [G, B], live tokens
    entering: jax.Array  # [G, B], segment of the state that enters
    leaving: jax.Array  # [G, B], segment of the state that leaves


def _spans(chunk, layout):
    B, T = layout.segment_BT.shape
    segment_BT = jnp.pad(layout.segment_BT, [(0, 0), (0, -T % chunk)])
    segment_GBC = segment_BT.reshape(B, -1, chunk).swapaxes(0, 1)
    edges_G1 = chunk * jnp.arange(segment_GBC.shape[0] + 1)[:, None]
    before_GB = jnp.minimum(edges_G1, layout.length_B)  # live tokens before each edge of a chunk
    # A state belongs to the last token it has seen; one that has seen none, to the first it will see.
    owner_GB = jnp.take_along_axis(layout.segment_BT, jnp.maximum(before_GB - 1, 0).T, axis=1).T
    return _Spans(segment_GBC, jnp.diff(before_GB, axis=0), owner_GB[:-1], owner_GB[1:])


# -- decays ------------------------------------------------------------------------------------------------------


class _Decays(NamedTuple):
    """The decays of one chunk, shaped to be multiplied; B is 1 where all rows are alike."""

    D: jax.Array  # [B, N, C, C]
    a: jax.Array  # [B, N, C, 1]
    z: jax.Array  # [B, N, C, 1]
    g: jax.Array  # [B, N, 1, 1]


def _decays(chunk, slopes_N):
    """Return the function from the spans of one chunk to its decays; what all chunks share is made here, once."""
    slopes_N11, i = slopes_N[:, None, None], jnp.arange(chunk)

    def decay(steps):
        return jnp.exp(-slopes_N11 * jnp.maximum(steps, 0))  # never exp(slope * steps), which overflows

    seen_NCC = jnp.where(i[:, None] >= i, decay(i[:, None] - i), 0)
    entered_NC1 = decay(i[:, None] + 1)

    def of_chunk(spans):
        segment_BC, length_B, entering_B, leaving_B = spans
        live_BC, length_B111 = segment_BC > 0, length_B[:, None, None, None]
        same_BCC = (segment_BC[:, :, None] == segment_BC[:, None]) & live_BC[:, None]
        enters_BC = live_BC & (segment_BC == entering_B[:, None])
        leaves_BC = live_BC & (segment_BC == leaving_B[:, None])
        return _Decays(
            D=jnp.where(same_BCC[:, None], seen_NCC, 0),
            a=jnp.where(enters_BC[:, None, :, None], entered_NC1, 0),
            z=jnp.where(leaves_BC[:, None, :, None], decay(length_B111 - 1 - i[:, None]), 0),
            g=jnp.where((entering_B == leaving_B)[:, None, None, None], decay(length_B111), 0),
        )

    return of_chunk


# -- decode ------------------------------------------------------------------------------------------------------


def decode(qkv_BN3H, slopes_N, state_SNHH, slots_B, live_B, *, activate):
    """Return o_BNH, the sum of its squares [B, N] and the pool of states; `api.fused_decode` says what they mean."""
    dtype = state_SNHH.dtype
    qkv_BN3H = jax.nn.silu(qkv_BN3H.astype(dtype)).astype(qkv_BN3H.dtype) if activate else qkv_BN3H
    q_BNH, k_BNH, v_BNH = (qkv_BN3H[:, :, i].astype(dtype) for i in range(3))
    old_BNHH = state_SNHH if slots_B is None else state_SNHH[slots_B]
    decay_N11 = jnp.exp(-slopes_N.astype(dtype))[:, None, None]
    new_BNHH = decay_N11 * old_BNHH + k_BNH[:, :, :, None] * v_BNH[:, :, None, :]
    o_BNH = jnp.einsum("bnd,bnde->bne", q_BNH, new_BNHH)
    if live_B is not None:
        new_BNHH = jnp.where(live_B[:, None, None, None], new_BNHH, old_BNHH)
        o_BNH = jnp.where(live_B[:, None, None], o_BNH, 0)
    o_BNH = o_BNH.astype(qkv_BN3H.dtype)
    if slots_B is not None:
        # Rows that are not live may share a slot with one that is, so they write nowhere.
        targets_B = slots_B if live_B is None else jnp.where(live_B, slots_B, state_SNHH.shape[0])
        new_BNHH = state_SNHH.at[targets_B].set(new_BNHH, mode="drop")
    return o_BNH, jnp.sum(_widen([o_BNH])[0] ** 2, axis=2), new_BNHH
