"""Lightning attention on Hopper: one warpgroup walks a head's blocks in order, the state in its registers.

Grid (rows, heads, spans, jobs, slices). A slice is 64 of the state's columns: its [H, 64] float32 values are 32 or 64
registers a thread, and with two slices a layer of MiniMax-M1 fills a GPU at batch 1. Tiles of 64 tokens arrive by TMA
in a ring of shared memory while the tensor cores work on earlier ones. Slices and jobs of a head read the same tiles
at about the same time: from memory once, from the L2 cache after that.

Few heads (a tensor-parallel shard) would leave most of the GPU idle, so a long row is cut into spans: a first launch
makes the state that each span adds, XLA chains them, and a second launch walks all spans at once.

Inputs are bfloat16, sums and states float32. Rounded to bfloat16 for the tensor cores, once each: the decayed scores,
the decayed values, and a copy of the state that enters a block.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.lightning_attention import two_pass
from m1jax.pallas_kernels.lightning_attention.blocks import ROWS, THROUGH, decay, tables

BLOCK = 64
"""Tokens of a block: the rows of one tensor-core product of a warpgroup."""

SLICE = 64
"""Columns of the state that one warpgroup keeps."""

STAGES = 2
"""Blocks in shared memory at once: at heads of 128 two programs then share a processor's 227 KB."""

PROGRAMS = 128
"""Programs that fill a GPU, near the 132 processors of an H100; with fewer, rows are cut into spans."""

SHORTEST_SPAN = 16
"""Blocks of a span at least: below, the second launch costs more than idle processors."""


def walk(tensors_BTNH, jobs, slopes_N, segment_ids_BT, states_BNHH, *, reverse):
    """`two_pass.Walk` on a GPU."""
    (B, T, N, H), slopes_N = tensors_BTNH[0].shape, slopes_N.astype(jnp.float32)
    Hp = SLICE if H <= SLICE else 2 * SLICE
    spans = _spans(B * N * len(jobs) * (Hp // SLICE), -(-T // BLOCK))
    table = tables(segment_ids_BT, T, BLOCK, spans)
    tokens = table.shape[1] * BLOCK
    tensors = [jnp.pad(x, [(0, 0), (0, tokens - T), (0, 0), (0, Hp - H)]) for x in tensors_BTNH]
    states = [two_pass.pad_heads(x, Hp, (2, 3))[:, :, None] for x in states_BNHH]
    launch = partial(_launch, tensors, jobs, slopes_N, table, reverse=reverse)
    if spans > 1:
        zeros = [jnp.zeros((B, N, spans, Hp, Hp), jnp.float32)] * len(jobs)
        _, added = launch(zeros, outputs=False)
        states = [_chain(first, more, slopes_N, table, reverse) for first, more in zip(states, added, strict=True)]
    outputs, states = launch(states, outputs=True)
    last = 0 if reverse else -1
    return [x[:, :T, :, :H] for x in outputs], [x[:, :, last, :H, :H] for x in states]


lightning_attention = two_pass.by(walk)


def _spans(programs, blocks):
    """Return how many spans to cut a row into: a power of two, 1 where there are programs enough."""
    spans = 1
    while programs * spans < PROGRAMS and blocks // (2 * spans) >= SHORTEST_SPAN:
        spans *= 2
    return spans


def _chain(first, added, slopes_N, table, reverse):
    """Return the state that enters each span [B, N, P, H, H]: `first` the row's, `added` what each span adds."""
    steps_BPG = table[:, :, THROUGH, 0].reshape(table.shape[0], added.shape[2], -1)
    steps_B1P = jnp.where((steps_BPG < 0).any(-1), -1, steps_BPG.sum(-1))[:, None]
    through_BNP = decay(slopes_N[:, None], steps_B1P)

    def step(state, span):
        through_BN, more = span
        return through_BN[..., None, None] * state + more, state

    spans = jnp.moveaxis(through_BNP, -1, 0), jnp.moveaxis(added, 2, 0)
    _, entering = lax.scan(step, first[:, :, 0], spans, reverse=reverse)
    return jnp.moveaxis(entering, 0, 2)


def _launch(tensors, jobs, slopes_N, table, states, *, reverse, outputs):
    """Return the outputs of all jobs (none without `outputs`) and the states [B, N, P, H, H] that spans end with."""
    (B, T, N, H), dtype = tensors[0].shape, tensors[0].dtype
    J, P = len(jobs), states[0].shape[2]
    out = compat.gpu_kernel(
        partial(_kernel, jobs=jobs, tensors=len(tensors), blocks=T // BLOCK // P, reverse=reverse, outputs=outputs),
        out_type=[
            *[jax.ShapeDtypeStruct((B, T, N, H), dtype)] * (J if outputs else 0),
            *[jax.ShapeDtypeStruct((B, N, P, H, H), jnp.float32)] * J,
        ],
        grid=(B, N, P, J, H // SLICE),
        grid_names=("row", "head", "span", "job", "slice"),
        name=f"lightning_attention_{'backwards' if reverse else 'forwards'}{'' if outputs else '_states'}",
    )(slopes_N, table, *tensors, *states)
    return out[:-J], out[-J:]


def _kernel(slopes, table, *refs, jobs, tensors, blocks, reverse, outputs):
    """One job, span and slice: refs are the tensors, states in, outputs, states out."""
    xs, refs = refs[:tensors], refs[tensors:]
    first, outs, last = refs[: len(jobs)], refs[len(jobs) : -len(jobs)], refs[-len(jobs) :]
    row, head, span, part = (lax.axis_index(name) for name in ("row", "head", "span", "slice"))
    columns = pl.ds(part * SLICE, SLICE)
    for j, job in enumerate(jobs):
        Q, K, V = (xs[i].at[row, :, head] for i in job)
        walk_job = partial(
            _walk_job,
            slopes[head],
            table.at[row if table.shape[0] > 1 else 0],
            (Q, K, V.at[:, columns]) if outputs else (K, V.at[:, columns]),
            first[j].at[row, head, span, :, columns],
            outs[j].at[row, :, head, columns] if outputs else None,
            last[j].at[row, head, span, :, columns],
            lambda c: span * blocks + (blocks - 1 - c if reverse else c),
            blocks,
            reverse,
        )
        if len(jobs) == 1:
            walk_job()
        else:
            pl.when(lax.axis_index("job") == j)(walk_job)


def _walk_job(slope, table, tiles, first, out, last, block_at, blocks, reverse):
    """Blocks in order; `tiles` are Q, K and the slice of V, or K and V alone where only the state is wanted."""
    H, dtype, stages = tiles[0].shape[1], tiles[0].dtype, min(STAGES, blocks)
    shared = partial(plgpu.SMEM, dtype=dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    def scoped(ring, table_ring, arrived, S_shared, O_shared):
        def fetch(c, slot):
            tokens = pl.ds(block_at(c) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(table.at[block_at(c)], table_ring.at[slot], arrived.at[slot])
            for source, target in zip(tiles, ring, strict=True):
                plgpu.copy_gmem_to_smem(source.at[tokens], target.at[slot], arrived.at[slot])

        for c in range(stages):
            fetch(c, c)

        def step(c, S):
            slot = lax.rem(c, stages)
            plgpu.barrier_wait(arrived.at[slot])
            *Q, K, V = (x.at[slot] for x in ring)
            by_row = lambda r: _spread(table_ring.at[slot, r], 1)  # noqa: E731
            by_column = lambda r: _spread(table_ring.at[slot, r], 0)  # noqa: E731
            d = two_pass.decays(slope, by_row, by_column, reverse=reverse)
            if Q:
                S_shared[...] = S.astype(dtype)
                plgpu.commit_smem()
                from_state = d.read * compat.product(Q[0], S_shared)
                A = (compat.product(Q[0], K, transpose_b=True) * d.D).astype(dtype)
                out_tile = compat.product(A, V, onto=from_state).astype(dtype)
            # In place: nothing reads the values themselves any more.
            V[...] = (compat.load(V, plgpu.Layout.WGMMA).astype(jnp.float32) * d.write).astype(dtype)
            plgpu.commit_smem()
            S = compat.product(K, V, transpose_a=True, onto=decay(slope, table_ring[slot, THROUGH, 0]) * S)
            if Q:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                O_shared[...] = out_tile
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(O_shared, out.at[pl.ds(block_at(c) * BLOCK, BLOCK)])

            @pl.when(c + stages < blocks)
            def _():
                fetch(c + stages, slot)

            return S

        last[...] = lax.fori_loop(0, blocks, step, compat.load(first, plgpu.Layout.WGMMA, optimized=False))
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scoped,
        [shared((stages, BLOCK, tile.shape[1])) for tile in tiles],
        plgpu.SMEM((stages, ROWS, BLOCK), jnp.float32),
        plgpu.Barrier(num_arrivals=len(tiles) + 1, num_barriers=stages),
        shared((H, SLICE)),
        shared((BLOCK, SLICE)),
    )


def _spread(vector, axis):
    """Return [BLOCK, BLOCK] that holds `vector` along `1 - axis`: its element x in row x for axis 1."""
    values = compat.load(vector, plgpu.Layout.WGMMA.reduce(axis))
    return lax.broadcast_in_dim(values, (BLOCK, BLOCK), (1 - axis,))


# -- decode ------------------------------------------------------------------------------------------------------


def decode(qkv_BN3H, slopes_N, state_SNHH, slots_B, live_B, *, activate):
    """Return o_BNH, the sum of its squares [B, N] and the pool of states; `api.fused_decode` says what they mean.

    One program per row and head, and no shared memory: a thread loads its share of 64 rows of the state at once, which
    keeps 16 or 32 KB a program on their way, changes it in registers and stores it where it was.
    """
    B, N, _, H = qkv_BN3H.shape
    Hp = SLICE if H <= SLICE else 2 * SLICE
    pool = compat.changing(two_pass.pad_heads(state_SNHH, Hp, (2, 3)))
    o_BNH, square_BN = compat.gpu_kernel(
        partial(_decode_kernel, activate=activate),
        # Rounded outputs, stored as float32: a thread's two bfloat16 fill no sector of memory.
        out_type=[jax.ShapeDtypeStruct((B, N, Hp), jnp.float32), jax.ShapeDtypeStruct((B, N), jnp.float32)],
        grid=(B, N),
        grid_names=("row", "head"),
        name="lightning_decode",
    )(slopes_N.astype(jnp.float32), slots_B, live_B.astype(jnp.int32), two_pass.pad_heads(qkv_BN3H, Hp), pool)
    return o_BNH[:, :, :H].astype(qkv_BN3H.dtype), square_BN, jax.freeze(pool)[:, :, :H, :H]


def _decode_kernel(slopes, slots, live, qkv, pool, o, square, *, activate):
    row, head = lax.axis_index("row"), lax.axis_index("head")
    H, dtype = qkv.shape[-1], qkv.dtype
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    slope, state = slopes[head], pool.at[slots[row], head]

    def vector(which, start, size, layout):
        x = compat.load(qkv.at[row, head, which, pl.ds(start, size)], layout, optimized=False).astype(jnp.float32)
        return (x / (1 + jnp.exp(-x))).astype(dtype).astype(jnp.float32) if activate else x

    @pl.when(live[row] > 0)
    def _():
        v, total = vector(2, 0, H, by_column), compat.zeros((H,), jnp.float32, by_column)
        for start in range(0, H, SLICE):
            rows, shape = pl.ds(start, SLICE), (SLICE, H)
            q, k = (lax.broadcast_in_dim(vector(i, start, SLICE, by_row), shape, (0,)) for i in (0, 1))
            old = compat.load(state.at[rows], plgpu.Layout.WGMMA, optimized=False)
            new = jnp.exp(-slope) * old + k * lax.broadcast_in_dim(v, shape, (1,))
            state[rows] = new
            total += jnp.sum(q * new, axis=0)
        out = total.astype(dtype).astype(jnp.float32)
        o[row, head] = out
        square[row, head] = jnp.sum(out * out)

    @pl.when(live[row] == 0)
    def _():
        o[row, head] = compat.zeros((H,), jnp.float32, by_column)
        square[row, head] = jnp.float32(0)
