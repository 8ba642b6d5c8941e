"""The experts' grouped products on a TPU: the pipeline fetches tiles, a table of the blocks tells it which.

A product has the grid (columns, blocks): a tile of an expert's weights, whole in the contracted axis, stays in VMEM
while the blocks of that expert pass, and what is fetched at a step is a block of rows. So weights move through HBM
once, rows once for each tile of columns. A contraction has the grid (rows of the result, columns, blocks): its float32
sums stay in VMEM from an expert's first block to its last.

Blocks without rows are passed over: their step names the tiles of the step before, which are not fetched again, and
computes nothing. In a contraction an expert without rows has one such block, where its zeros are written.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from m1jax.pallas_kernels.compat import is_interpreted
from m1jax.pallas_kernels.moe import grouped

LANES = grouped.LANES
TILES = 40 * 2**20
"""Bytes of VMEM that the tiles of a program may take, two of each; a v5p has 64 MiB."""

LIMIT = 60 * 2**20
"""Bytes of VMEM that the compiler may use in all: float32 sums and their epilogue come on top."""

SUBLANES = 8

EXPERT, LIVE, BLOCK, FETCHED = range(4)
"""Rows of the table: expert of a block, rows in it; for what to fetch, the last block that has rows and its expert."""


def block(rows, experts, dtype):
    """Return the slots of a block: 256 where experts have the rows for it, which a wide matrix unit works best on."""
    return 256 if rows >= 1024 * experts and dtype == jnp.bfloat16 else 128


def multiply(product, layout, rows, weights, tiles=(), combine_S=None):
    """`grouped.Device.multiply` on a TPU."""
    (G, C), dtype, (_, N) = layout.rows_GC.shape, rows[0].dtype, _widths(weights[0], product.transposed)
    rows, tiles = [grouped.pad(x) for x in rows], [grouped.pad(x) for x in tiles]
    weights = [grouped.pad(w, (1, 2)) for w in weights]
    Kp, Np = _widths(weights[0], product.transposed)
    column = len(weights) * Kp + (len(tiles) + product.outputs) * C
    budget = TILES if dtype == jnp.bfloat16 else TILES // 2  # float32 is multiplied in parts, which take as much again
    columns = _divisor(Np, (budget // (2 * dtype.itemsize) - len(rows) * C * Kp) // column)

    weight = (None, columns, Kp) if product.transposed else (None, Kp, columns)
    at = (lambda e, n: (e, n, 0)) if product.transposed else (lambda e, n: (e, 0, n))
    tile = pl.BlockSpec((C, columns), lambda n, g, table: (table[BLOCK, g], n))
    in_specs = [
        *[pl.BlockSpec((C, Kp), lambda n, g, table: (table[BLOCK, g], 0))] * len(rows),
        *[pl.BlockSpec(weight, lambda n, g, table: at(table[FETCHED, g], n))] * len(weights),
        *[tile] * len(tiles),
    ]
    inputs = [*rows, *weights, *tiles]
    if combine_S is not None:
        in_specs.append(pl.BlockSpec((None, SUBLANES, C), lambda n, g, table: (table[BLOCK, g], 0, 0)))
        inputs.append(jnp.broadcast_to(combine_S.reshape(G, 1, C), (G, SUBLANES, C)))
    out_specs = [tile] * product.outputs
    out_shape = [jax.ShapeDtypeStruct((G * C, Np), dtype)] * product.outputs
    if product.row_sums:
        out_specs.append(pl.BlockSpec((None, None, SUBLANES, C), lambda n, g, table: (n, table[BLOCK, g], 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((Np // columns, G, SUBLANES, C), jnp.float32))
    out = pl.pallas_call(
        partial(_product_kernel, product=product, rows=len(rows), weights=len(weights)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(Np // columns, G), in_specs=in_specs, out_specs=out_specs
        ),
        out_shape=out_shape,
        compiler_params=_parameters("parallel", "arbitrary"),
        interpret=is_interpreted(),
        name=product.name,
    )(_table(layout), *inputs)
    outputs = [x[:, :N] for x in out[: product.outputs]]
    return outputs + [x[:, :, 0].sum(axis=0).reshape(-1) for x in out[product.outputs :]]


def contract(layout, a_SM, bs_SN, dtype):
    """`grouped.Device.contract` on a TPU."""
    (G, C), E, M, N = layout.rows_GC.shape, len(layout.begin_E), a_SM.shape[1], bs_SN[0].shape[1]
    a_SM, bs_SN = grouped.pad(a_SM), [grouped.pad(b) for b in bs_SN]
    Mp, Np = a_SM.shape[1], bs_SN[0].shape[1]
    height, width = _divisor(Mp, 1024), _divisor(Np, 512)
    out = pl.pallas_call(
        _contract_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(Mp // height, Np // width, G),
            in_specs=[
                pl.BlockSpec((C, height), lambda m, n, g, table: (table[BLOCK, g], m)),
                *[pl.BlockSpec((C, width), lambda m, n, g, table: (table[BLOCK, g], n))] * len(bs_SN),
            ],
            out_specs=[pl.BlockSpec((None, height, width), lambda m, n, g, table: (table[EXPERT, g], m, n))]
            * len(bs_SN),
            scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)] * len(bs_SN),
        ),
        out_shape=[jax.ShapeDtypeStruct((E, Mp, Np), dtype)] * len(bs_SN),
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        interpret=is_interpreted(),
        name="moe_contract",
    )(_table(layout), a_SM, *bs_SN)
    return [x[:, :M, :N] for x in out]


def _product_kernel(table, *refs, product, rows, weights):
    """One block of rows and one tile of columns: refs are rows, weights, tiles, combine weights, outputs."""
    outs = refs[len(refs) - product.outputs - product.row_sums :]
    xs, ws, others = refs[:rows], refs[rows : rows + weights], refs[rows + weights : len(refs) - len(outs)]

    @pl.when(table[LIVE, pl.program_id(1)] > 0)
    def _():
        axis = 1 if product.transposed else 0
        sums = [sum(_dot(xs[i][...], ws[j][...], (1, axis)) for i, j in terms) for terms in product.sums]
        tiles = [x[...].astype(jnp.float32) for x in others]
        if product.weighed:
            tiles[-1] = tiles[-1].T[:, :1]  # equal rows to one column
        results = product.epilogue(*sums, *tiles)
        for out, result in zip(outs[: product.outputs], results, strict=False):
            out[...] = result.astype(out.dtype)
        if product.row_sums:
            ones = jnp.ones((SUBLANES, results[-1].shape[1]), jnp.float32)
            outs[-1][...] = _dot(ones, results[-1], (1, 1))  # a row of sums; a reduction would leave a column


def _contract_kernel(table, a, *refs):
    """One block of rows and one tile of the result: refs are the b, the outputs, and their sums."""
    count, g = len(refs) // 3, pl.program_id(2)
    bs, outs, sums = refs[:count], refs[count : 2 * count], refs[2 * count :]
    last = pl.num_programs(2) - 1
    expert = table[EXPERT, g]

    @pl.when((g == 0) | (table[EXPERT, jnp.maximum(g - 1, 0)] != expert))
    def _():
        for each in sums:
            each[...] = jnp.zeros_like(each)

    @pl.when(table[LIVE, g] > 0)
    def _():
        for b, each in zip(bs, sums, strict=True):
            each[...] += _dot(a[...], b[...], (0, 0))

    @pl.when((g == last) | (table[EXPERT, jnp.minimum(g + 1, last)] != expert))
    def _():
        for out, each in zip(outs, sums, strict=True):
            out[...] = each[...].astype(out.dtype)


def _table(layout):
    """Return int32 [4, G], what the kernels read of the layout."""
    live_G, places_G = layout.live_G > 0, jnp.arange(len(layout.live_G), dtype=jnp.int32)
    before = lambda x_G: jax.lax.cummax(jnp.where(live_G, x_G, 0))  # noqa: E731
    return jnp.stack([layout.expert_G, layout.live_G, before(places_G), before(layout.expert_G)])


def _parameters(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=LIMIT)


def _dot(a, b, contract):
    """Product over one axis of each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _widths(w, transposed):
    """Return (K, N) of weights."""
    return (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])


def _divisor(width, most):
    """Return the widest tile of whole lanes that divides `width` and is at most `most`, or one of 128."""
    tiles = width // LANES
    return LANES * max(t for t in range(1, tiles + 1) if tiles % t == 0 and (t == 1 or t * LANES <= most))


expert_mlp = grouped.by(grouped.Device(block, multiply, contract))
