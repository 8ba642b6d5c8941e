"""Lightning attention on a TPU: blocks in order along a sequential grid axis, the states in VMEM between them.

Grid (rows, groups of heads, blocks). Tensors are seen as [B, T, N * H]: with H padded to a lane tile of 128, a head is
a whole number of tiles of a block [C, heads * H], so that the kernel transposes nothing. Each state stays in VMEM in
float32 from a row's first block to its last; what a walk moves through HBM is its tensors, once each. XLA tiles
[N, H] and [T, N * H] differently: tensors that come or go as [B, T, N, H] it lays out anew, one more pass over each.

Matrix units take what they are given: bfloat16 inputs multiply as bfloat16 with float32 sums (the decayed scores, the
decayed values and a copy of the state are rounded to it first), float32 inputs at the highest precision.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from m1jax.pallas_kernels.compat import is_interpreted
from m1jax.pallas_kernels.lightning_attention import two_pass
from m1jax.pallas_kernels.lightning_attention.blocks import ROWS, THROUGH, decay, tables

LANES = 128
BLOCK = 128
"""Tokens of a block: a row of v5's matrix unit. Memory-bound from here on, so longer ones only compute more."""


def walk(tensors_BTNH, jobs, slopes_N, segment_ids_BT, states_BNHH, *, reverse):
    """`two_pass.Walk` on a TPU."""
    (B, T, N, H), dtype = tensors_BTNH[0].shape, tensors_BTNH[0].dtype
    Hp, heads = -(-H // LANES) * LANES, _heads(N, dtype)
    blocks = -(-T // BLOCK)
    table = tables(segment_ids_BT, T, BLOCK)
    tensors = [_lay_out(x, blocks * BLOCK, Hp) for x in tensors_BTNH]
    states = [two_pass.pad_heads(x, Hp, (2, 3)) for x in states_BNHH]

    at = (lambda c: blocks - 1 - c) if reverse else (lambda c: c)
    row = (lambda b: 0) if segment_ids_BT is None else (lambda b: b)
    tensor = pl.BlockSpec((None, BLOCK, heads * Hp), lambda b, n, c: (b, at(c), n))
    state = pl.BlockSpec((None, heads, Hp, Hp), lambda b, n, c: (b, n, 0, 0))
    out = pl.pallas_call(
        partial(_kernel, jobs=jobs, tensors=len(tensors), heads=heads, reverse=reverse),
        grid=(B, N // heads, blocks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, None, ROWS, BLOCK), lambda b, n, c: (row(b), at(c), 0, 0)),
            *[tensor] * len(tensors),
            *[state] * len(jobs),
        ],
        out_specs=[*[tensor] * len(jobs), *[state] * len(jobs)],
        out_shape=[
            *[jax.ShapeDtypeStruct((B, blocks * BLOCK, N * Hp), dtype)] * len(jobs),
            *[jax.ShapeDtypeStruct((B, N, Hp, Hp), jnp.float32)] * len(jobs),
        ],
        scratch_shapes=[pltpu.VMEM((len(jobs), heads, Hp, Hp), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=is_interpreted(),
        name="lightning_attention_backwards" if reverse else "lightning_attention_forwards",
    )(slopes_N.astype(jnp.float32), table, *tensors, *states)
    outputs = [x.reshape(B, -1, N, Hp)[:, :T, :, :H] for x in out[: len(jobs)]]
    return outputs, [x[:, :, :H, :H] for x in out[len(jobs) :]]


lightning_attention = two_pass.by(walk)


def _kernel(slopes, table, *refs, jobs, tensors, heads, reverse):
    """One block of one group of heads: refs are the tensors, states in, outputs, states out, and the states."""
    xs, first, outs, last = (refs[:tensors], *(refs[tensors + i * len(jobs) :][: len(jobs)] for i in range(3)))
    S = refs[-1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for j, state in enumerate(first):
            S[j] = state[...]

    by_column = table[...]  # [ROWS, C]
    by_row = by_column.T  # [C, ROWS]
    Hp = S.shape[-1]
    for h in range(heads):
        lanes = slice(h * Hp, (h + 1) * Hp)
        slope = slopes[pl.program_id(1) * heads + h]
        d = two_pass.decays(slope, lambda r: by_row[:, r : r + 1], lambda r: by_column[r : r + 1], reverse=reverse)
        through = decay(slope, by_column[THROUGH : THROUGH + 1, :1])
        for j, job in enumerate(jobs):
            Q, K, V = (xs[i][:, lanes] for i in job)
            A = (_dot(Q, K, (1, 1)) * d.D).astype(V.dtype)
            out = _dot(A, V, (1, 0)) + d.read * _dot(Q, S[j, h].astype(Q.dtype), (1, 0))
            outs[j][:, lanes] = out.astype(V.dtype)
            S[j, h] = through * S[j, h] + _dot(K, (d.write * V.astype(jnp.float32)).astype(V.dtype), (0, 0))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for j, state in enumerate(last):
            state[...] = S[j]


def _dot(a, b, contract):
    """Product over one axis of each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _heads(N, dtype):
    """Heads that a program takes together: as many as keep its tiles within a few MiB, and a divisor of N."""
    most = 8 if dtype == jnp.bfloat16 else 4
    return max(h for h in range(1, most + 1) if N % h == 0)


def _lay_out(x_BTNH, tokens, width):
    """Return [B, tokens, N * width] with zeros behind the tokens and behind each head."""
    B, T, N, _ = x_BTNH.shape
    x = jnp.pad(two_pass.pad_heads(x_BTNH, width), [(0, 0), (0, tokens - T), (0, 0), (0, 0)])
    return x.reshape(B, tokens, N * width)


# -- decode ------------------------------------------------------------------------------------------------------


def decode(qkv_BN3H, slopes_N, state_SNHH, slots_B, live_B, *, activate):
    """Return o_BNH, the sum of its squares [B, N] and the pool of states; `api.fused_decode` says what they mean.

    The pipeline fetches the states that the slots name and writes them back to where they were, in one pass.
    """
    B, N, _, H = qkv_BN3H.shape
    heads = 8 if N % 8 == 0 else N  # a tile of sublanes, or all there are
    state = pl.BlockSpec((None, heads, H, H), lambda b, n, slots, live: (slots[b], n, 0, 0))
    o_BNH, square_BN1, state_SNHH = pl.pallas_call(
        partial(_decode_kernel, heads=heads, activate=activate),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, N // heads),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec((None, heads, 3, H), lambda b, n, slots, live: (b, n, 0, 0)),
                state,
            ],
            out_specs=[
                pl.BlockSpec((None, heads, H), lambda b, n, slots, live: (b, n, 0)),
                pl.BlockSpec((None, heads, 1), lambda b, n, slots, live: (b, n, 0)),
                state,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, N, H), qkv_BN3H.dtype),
            jax.ShapeDtypeStruct((B, N, 1), jnp.float32),
            jax.ShapeDtypeStruct(state_SNHH.shape, jnp.float32),
        ],
        input_output_aliases={4: 2},
        interpret=is_interpreted(),
        name="lightning_decode",
    )(slots_B, live_B.astype(jnp.int32), slopes_N.astype(jnp.float32), qkv_BN3H, state_SNHH)
    return o_BNH, square_BN1[:, :, 0], state_SNHH


def _decode_kernel(slots, live, slopes, qkv, old, o, square, new, *, heads, activate):
    del slots  # read by the index maps
    is_live = live[pl.program_id(0)] > 0
    for h in range(heads):
        x = qkv[h].astype(jnp.float32)  # [3, H]
        if activate:
            x = (x * jax.nn.sigmoid(x)).astype(qkv.dtype).astype(jnp.float32)
        q, k, v = x[0:1], x[1:2], x[2:3]
        slope = slopes[pl.program_id(1) * heads + h]
        S = jnp.exp(-jnp.full((1, 1), slope)) * old[h] + _dot(k, v, (0, 0))
        out = jnp.where(is_live, _dot(q, S, (1, 0)), 0.0).astype(o.dtype)
        o[h : h + 1] = out
        square[h : h + 1] = jnp.sum(out.astype(jnp.float32) ** 2, axis=1, keepdims=True)
        new[h] = jnp.where(is_live, S, old[h])
