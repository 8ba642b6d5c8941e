"""The least time that a device needs for an operation: what it must compute and move, over what the device can do.

    floor = max(FLOPs / FLOPs per second of a large dense product, bytes / bytes per second of a large copy)

FLOPs are those of matrix products, a multiplication and an addition being two; elementwise work runs beside them.
Bytes are those of operands and results, each read or written once, in the dtype of the inputs but for states, which
are float32. Both rates are measured in the run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.pallas_kernels.shapes import Decode, Experts, GatedNorm, Lightning, Softmax, expert_ids, segment_ids

CHUNK = 64
"""Tokens of a chunk of lightning attention, as the floor counts them: fewer would save FLOPs and starve a matrix
unit, more cost FLOPs."""


class Work(NamedTuple):
    """What an operation must do at least."""

    flops: float
    bytes: float


def lightning(shape: Lightning, backward: bool, itemsize: int, chunk: int = CHUNK) -> Work:
    """Forward: Q K^T and A V within a chunk, Q S and K^T V with the state; q, k, v read, o written.

    Backward on top: five products within a chunk and five with the state, whose forward values are made again;
    q, k, v and do read, dq, dk and dv written.
    """
    C, H, tokens = min(chunk, shape.T), shape.H, shape.B * shape.T * shape.N
    flops = 4 * C * H + 4 * H**2 + backward * (10 * C * H + 10 * H**2)
    return Work(tokens * flops, tokens * H * itemsize * (4 + 7 * backward))


def decode(shape: Decode, backward: bool, itemsize: int) -> Work:
    """k^T v and q S for each row and head; its state read and written in float32, q, k and v read, o written."""
    heads = shape.B * shape.N
    return Work(heads * 4 * shape.H**2, heads * (2 * 4 * shape.H**2 + 4 * shape.H * itemsize))


def gated_norm(shape: GatedNorm, backward: bool, itemsize: int) -> Work:
    """No products. Forward: o and gate read, y written; backward: o, gate and dy read, do and dgate written."""
    return Work(0, shape.M * shape.N * shape.H * itemsize * (3 + 5 * backward))


def softmax(shape: Softmax, backward: bool, itemsize: int) -> Work:
    """Two products forward and five backward over the pairs of tokens that see each other, half of a segment's square.

    Forward: q, k, v read, o written; backward: q, k, v, o and do read, dq, dk and dv written.
    """
    ids_BT = segment_ids(shape.B, shape.T, shape.segments)
    squares = shape.B * shape.T**2 if ids_BT is None else sum((np.bincount(ids)[1:] ** 2).sum() for ids in ids_BT)
    flops = 4 * shape.H * shape.N * int(squares) / 2 * (1 + 2.5 * backward)
    heads = 2 * (shape.N + shape.K) + backward * 4 * (shape.N + shape.K)
    return Work(flops, shape.B * shape.T * heads * shape.H * itemsize)


def experts(shape: Experts, backward: bool, itemsize: int) -> Work:
    """Three products for each row and one of the router forward, twice as many backward.

    Forward: x and the weights of the experts that have rows read, y written; backward: x, dy and those weights read, dx
    and the gradients of all weights written.
    """
    T, D, F, E = shape.T, shape.D, shape.F, shape.E
    flops = 6 * T * shape.A * D * F + 2 * T * D * E
    used = len(np.unique(expert_ids(shape)))
    return Work(
        flops * (1 + 2 * backward),
        itemsize * (2 * T * D + 3 * used * D * F + backward * (3 * T * D + 3 * (used + E) * D * F)),
    )


def floor(work: Work, flops_per_second: float, bytes_per_second: float) -> float:
    """Seconds that the device needs at least."""
    return max(work.flops / flops_per_second, work.bytes / bytes_per_second)


def ceilings(dtype: jax.typing.DTypeLike, width: int, elements: int) -> Mapping[str, tuple[float, Callable[[], Any]]]:
    """`{"flops" | "bytes": (how many, a call that starts them)}`: a dense product, and a copy.

    Args:
        dtype: of both; the product sums in float32, as XLA does for bfloat16 too.
        width: of the product's square matrices.
        elements: of the copied array, which should not fit any cache.
    """
    a, b = jax.random.normal(jax.random.key(0), (2, width, width), dtype)
    product = jax.jit(jnp.dot)
    # In place: a new array would have to be found first, and on a CPU cleared page by page.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    x = jnp.ones(elements, dtype)

    def copy() -> jax.Array:
        nonlocal x
        x = negate(x)
        return x

    return {"flops": (2 * width**3, lambda: product(a, b)), "bytes": (2 * x.nbytes, copy)}
