"""The experts' grouped products on Hopper: two warpgroups multiply tiles that a third one fetches.

Product and contraction are one kernel with other tiles. A program makes a [128, 2 x WIDTH] tile of the result: each of
two warpgroups has 64 of its rows and two float32 sums [64, WIDTH] in its registers, gate and up side by side or two
tiles of columns. A third warpgroup fills a ring of shared memory by TMA, 64 of the contracted axis at a time, and the
tensor cores read every tile of rows for both sums.

    product        rows x weights       A = [128 slots, 64],        B = two tiles [64, WIDTH] of the expert's weights
    contraction    rows^T x rows        A = [64 slots, 128] turned, B = two tiles [64 slots, WIDTH]

Programs run in an order in which those at work together share tiles in the L2 cache: groups of columns, then blocks,
then the columns of a group. Blocks without rows end at once.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.moe import grouped

BLOCK = 128
"""Slots of a block: 64 for each of two warpgroups."""

DEPTH = 64
"""Of the contracted axis at a time: 128 bytes, a line of swizzled shared memory."""

CHUNK = 64
"""Columns that leave through shared memory at once."""

STAGES = 4
"""Tiles on their way: 4 of 48 KiB, and 32 KiB for what leaves, are the shared memory of a processor."""

LEAVING = 2
"""Chunks of a warpgroup that may be on their way out."""

GROUP = 16
"""Columns of programs that run side by side at most."""

FETCHING, MULTIPLYING = 24, 240
"""Registers a thread of each kind of warpgroup: 168 at launch, handed over."""


def block(rows, experts, dtype):
    """Return the slots of a block."""
    return BLOCK


def multiply(product, layout, rows, weights, tiles=(), combine_S=None):
    """`grouped.Device.multiply` on a GPU."""
    (G, C), dtype = layout.rows_GC.shape, rows[0].dtype
    N = weights[0].shape[1 if product.transposed else 2]
    rows, tiles, weights = (
        [grouped.pad(x) for x in rows],
        [grouped.pad(x) for x in tiles],
        [grouped.pad(w, (1, 2)) for w in weights],
    )
    K, Np = weights[0].shape[1:][:: -1 if product.transposed else 1]
    width, side_by_side = _width(Np, len(product.sums))
    columns = Np // (width * side_by_side)
    group = max(n for n in range(1, GROUP + 1) if columns % n == 0)
    out_type = [jax.ShapeDtypeStruct((G * C, Np), dtype)] * product.outputs
    if product.row_sums:
        out_type.append(jax.ShapeDtypeStruct((Np // CHUNK, G * C), jnp.float32))
    out = compat.gpu_kernel(
        partial(_product, product=product, rows=len(rows), weights=len(weights), K=K, width=width),
        out_type=out_type,
        grid=(columns // group, G, group),
        grid_names=("group", "block", "column"),
        threads=3,
        name=product.name,
    )(layout.expert_G, layout.live_G, *rows, *weights, *tiles, *([combine_S] if product.weighed else []))
    outputs = [x[:, :N] for x in out[: product.outputs]]
    return outputs + [x.sum(axis=0) for x in out[product.outputs :]]


def contract(layout, a_SM, bs_SN, dtype):
    """`grouped.Device.contract` on a GPU."""
    E, M, N = len(layout.begin_E), a_SM.shape[1], bs_SN[0].shape[1]
    a_SM, bs_SN = grouped.pad(a_SM), [grouped.pad(b) for b in bs_SN]
    Mp, Np = a_SM.shape[1], bs_SN[0].shape[1]
    width, side_by_side = _width(Np, len(bs_SN))
    out = compat.gpu_kernel(
        partial(_contraction, count=len(bs_SN), width=width),
        out_type=[jax.ShapeDtypeStruct((E, Mp, Np), dtype)] * len(bs_SN),
        grid=(E, Mp // BLOCK, Np // (width * side_by_side)),
        grid_names=("expert", "row", "column"),
        threads=3,
        name="moe_contract",
    )(layout.begin_E, layout.end_E, a_SM, *bs_SN)
    return [x[:, :M, :N] for x in out]


expert_mlp = grouped.by(grouped.Device(block, multiply, contract))


def _product(expert, live, *refs, product, rows, weights, K, width):
    """One tile of a grouped product: refs are rows, weights, tiles, combine weights, outputs."""
    outs = refs[len(refs) - product.outputs - product.row_sums :]
    xs, ws, others = refs[:rows], refs[rows : rows + weights], refs[rows + weights : len(refs) - len(outs)]
    g = lax.axis_index("block")
    e, count = expert[g], live[g]
    n = lax.axis_index("group") * lax.axis_size("column") + lax.axis_index("column")
    two = len(product.sums) == 2
    starts = _starts(n, width, two)
    terms, depth = (1, K // DEPTH) if two else (rows, K // DEPTH)

    def fetch_term(i, c, a, bs, arrived):
        inner = pl.ds((c - i * depth) * DEPTH, DEPTH)
        plgpu.copy_gmem_to_smem(xs[i].at[pl.ds(g * BLOCK, BLOCK), inner], a, arrived)
        for j, (b, start) in enumerate(zip(bs, starts, strict=True)):
            w, columns = ws[j if two else i].at[e], pl.ds(start, width)
            plgpu.copy_gmem_to_smem(w.at[(columns, inner) if product.transposed else (inner, columns)], b, arrived)

    def fetch(c, *tiles):
        for i in range(terms):
            pl.when((c >= i * depth) & (c < (i + 1) * depth))(partial(fetch_term, i, c, *tiles))

    def finish(half, sums, leave):
        slots = pl.ds(g * BLOCK + half * 64, 64)
        c = []
        if product.weighed:
            by_row = compat.load(others[-1].at[slots], plgpu.Layout.WGMMA.reduce(1), optimized=False)
            c = [lax.broadcast_in_dim(by_row, (64, CHUNK), (0,))]
        for start, parts in zip(starts, [sums] if two else [[x] for x in sums], strict=False):
            for chunk in range(0, width, CHUNK):
                at = slots, pl.ds(start + chunk, CHUNK)
                tiles = [
                    compat.load(x.at[at], plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
                    for x in others[: len(others) - product.weighed]
                ]
                results = product.epilogue(*(x[:, chunk : chunk + CHUNK] for x in parts), *tiles, *c)
                for out, result in zip(outs[: product.outputs], results, strict=False):
                    leave(result, out.at[at])
                if product.row_sums:
                    outs[-1][(start + chunk) // CHUNK, slots] = jnp.sum(results[-1], axis=1)

    steps = jnp.where(count > 0, terms * depth, 0)
    _tile(steps, fetch, finish, count > 0, xs[0].dtype, width, turned_a=False, turned_b=product.transposed)


def _contraction(begin, end, a, *refs, count, width):
    """One tile of a contraction: refs are the b and the outputs."""
    bs, outs = refs[:count], refs[count:]
    e, row, n = (lax.axis_index(name) for name in ("expert", "row", "column"))
    first, blocks = begin[e], end[e] - begin[e]
    starts = _starts(n, width, count == 2)

    def fetch(c, a_tile, b_tiles, arrived):
        slots = pl.ds(first * BLOCK + c * DEPTH, DEPTH)
        plgpu.copy_gmem_to_smem(a.at[slots, pl.ds(row * BLOCK, BLOCK)], a_tile, arrived)
        for j, (tile, start) in enumerate(zip(b_tiles, starts, strict=True)):
            plgpu.copy_gmem_to_smem(bs[j % count].at[slots, pl.ds(start, width)], tile, arrived)

    def finish(half, sums, leave):
        for j, (part, start) in enumerate(zip(sums, starts, strict=True)):
            for chunk in range(0, width, CHUNK):
                out = outs[j % count].at[e, pl.ds(row * BLOCK + half * 64, 64), pl.ds(start + chunk, CHUNK)]
                leave(part[:, chunk : chunk + CHUNK], out)

    _tile(blocks * (BLOCK // DEPTH), fetch, finish, True, a.dtype, width, turned_a=True, turned_b=False)


def _tile(steps, fetch, finish, wanted, dtype, width, *, turned_a, turned_b):
    """Make a program's sums: `steps` of `fetch(c, a, bs, arrived)`, then `finish(half, sums, leave)` if `wanted`."""
    shared = partial(plgpu.SMEM, dtype=dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

    def scoped(a_ring, *refs):
        *b_rings, staging, arrived, free = refs
        group = lax.axis_index("warpgroup")

        @pl.when(group == 2)
        def _():
            plgpu.set_max_registers(FETCHING, action="decrease")

            def step(c, _):
                slot = lax.rem(c, STAGES)
                pl.when(c >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
                fetch(c, a_ring.at[slot], [ring.at[slot] for ring in b_rings], arrived.at[slot])

            lax.fori_loop(0, steps, step, None)
            for slot in range(STAGES):  # so that every phase of every barrier was waited for
                pl.when(slot < steps)(partial(plgpu.barrier_wait, free.at[slot]))

        @pl.when(group < 2)
        def _():
            plgpu.set_max_registers(MULTIPLYING, action="increase")
            mine = pl.ds(group * 64, 64)

            def step(c, add):
                slot = lax.rem(c, STAGES)
                plgpu.barrier_wait(arrived.at[slot])
                a = a_ring.at[slot, :, mine] if turned_a else a_ring.at[slot, mine]
                for i, ring in enumerate(b_rings):
                    add(i, a, ring.at[slot], transpose_a=turned_a, transpose_b=turned_b)
                plgpu.wgmma_wait(2)  # all but the two of this step are done
                pl.when(c > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(c - 1, STAGES)]))

            sums = compat.sums_of_products(2, (64, width), steps, step)
            pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(steps - 1, STAGES)]))
            pl.when(wanted)(lambda: finish(group, sums, _leaver(staging.at[group])))
            plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scoped,
        shared((STAGES, DEPTH, BLOCK) if turned_a else (STAGES, BLOCK, DEPTH)),
        *[shared((STAGES, width, DEPTH) if turned_b else (STAGES, DEPTH, width))] * 2,
        shared((2, LEAVING, 64, CHUNK)),
        plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        collective_axes="warpgroup",
    )


def _leaver(staging):
    """Return what writes [64, CHUNK] values through shared memory, one chunk after the other."""
    turns = itertools.cycle(range(LEAVING))

    def leave(values, out):
        turn = next(turns)
        plgpu.wait_smem_to_gmem(LEAVING - 1, wait_read_only=True)
        staging[turn] = values.astype(staging.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging.at[turn], out)

    return leave


def _width(columns, sums):
    """Return the columns of a sum, and how many tiles of them a program makes side by side."""
    side_by_side = 1 if sums == 2 else 2
    return next(w for w in (128, 64) if columns % (w * side_by_side) == 0), side_by_side


def _starts(n, width, two):
    """Return the first columns of a program's sums: the same of `two` results, or side by side in one."""
    return [n * width] * 2 if two else [2 * n * width, (2 * n + 1) * width]
