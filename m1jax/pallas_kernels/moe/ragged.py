"""The experts' grouped products by somebody else's ragged product: `jax.lax`'s own, or tokamax's where it is installed.

The plan is that of our kernels (grouped.py) with blocks of one slot, so rows lie side by side and a library needs
nothing but how many each expert has. What our kernels do before the sums leave the chip is done by XLA here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

from m1jax.pallas_kernels.moe import grouped

PRODUCT = RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
"""[S, K] with [E, K, N]: the rows are ragged."""

TRANSPOSED = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
"""[S, K] with [E, N, K]."""

CONTRACTION = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
"""[S, M] with [S, N] to [E, M, N]: the contracted rows are ragged."""


def block(rows, experts, dtype):
    """Return the slots of a block; an expert without rows has one all the same, of zeros."""
    return 1


def multiply(ragged_dot, product, layout, rows, weights, tiles=(), combine_S=None):
    """`grouped.Device.multiply` by a library."""
    dtype, wide = rows[0].dtype, jnp.float32
    times = _product(ragged_dot, layout, dtype)
    numbers = TRANSPOSED if product.transposed else PRODUCT
    by = lambda i, j: times(rows[i], weights[j], ragged_dot_dimension_numbers=numbers)  # noqa: E731
    sums = [sum(by(i, j) for i, j in terms) for terms in product.sums]
    weigh = [] if combine_S is None else [combine_S[:, None]]
    results = product.epilogue(*sums, *(x.astype(wide) for x in tiles), *weigh)
    outputs = [x.astype(dtype) for x in results[: product.outputs]]
    return outputs + [x.sum(axis=1) for x in results[product.outputs :] if product.row_sums]


def contract(ragged_dot, layout, a_SM, bs_SN, dtype):
    """`grouped.Device.contract` by a library."""
    times = _product(ragged_dot, layout, a_SM.dtype)
    return [times(a_SM, b, ragged_dot_dimension_numbers=CONTRACTION).astype(dtype) for b in bs_SN]


def by_library(ragged_dot: Callable[[], Callable]) -> Callable:
    """Return the implementation by what `ragged_dot()` returns, which is imported then."""
    device = grouped.Device(block, partial(multiply, ragged_dot), partial(contract, ragged_dot))
    return grouped.by(device)


def _product(ragged_dot, layout, dtype):
    """Return the library's product of rows that lie as `layout` says, with float32 sums."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    slots_E = jnp.maximum(layout.end_E - layout.begin_E, 1)
    return partial(ragged_dot(), group_sizes=slots_E, precision=precision, preferred_element_type=jnp.float32)


def _tokamax():
    from tokamax import ragged_dot_general  # pyright: ignore[reportMissingImports]  # an extra

    flags = sys.modules["absl.flags"].FLAGS  # tokamax's, which reads the command line of whatever runs here for them
    if not flags.is_parsed():
        flags(["m1jax"])
    return ragged_dot_general


def has_tokamax() -> bool:
    """Whether tokamax is installed."""
    return importlib.util.find_spec("tokamax") is not None


lax = by_library(lambda: jax.lax.ragged_dot_general)
tokamax = by_library(_tokamax)
