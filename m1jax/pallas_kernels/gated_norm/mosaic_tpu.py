"""The gated norm on a TPU: blocks of whole rows through VMEM, read once and written once."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from m1jax.pallas_kernels.compat import is_interpreted
from m1jax.pallas_kernels.gated_norm import xla

ROWS = 16
"""Rows of a block, a tile of bfloat16: at X = 8192 and float32 512 KiB for each array."""


def forward(o_MX, gate_MX, scale_X, square_M, eps):
    """Return y_MX; `api.gated_norm` says what the arguments mean."""
    squares = () if square_M is None else (square_M[:, None],)
    y_MX = jax.ShapeDtypeStruct(gate_MX.shape, gate_MX.dtype)
    return _by_rows(partial(_forward_kernel, eps=eps), (o_MX, gate_MX, *squares), scale_X, (y_MX,))[0]


def backward(o_MX, gate_MX, scale_X, dy_MX, eps):
    """Return the gradients of o and of the gate."""
    return _by_rows(partial(_backward_kernel, eps=eps), (o_MX, gate_MX, dy_MX), scale_X, (o_MX, gate_MX))


def _by_rows(kernel, inputs, scale_X, outputs):
    """Return `kernel` over blocks of rows of `inputs`; one that overhangs is cut by the pipeline."""
    M = inputs[0].shape[0]
    rows = min(ROWS, M)
    block = lambda x: pl.BlockSpec((rows, x.shape[1]), lambda m: (m, 0))  # noqa: E731
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(M, rows),),
        in_specs=[pl.BlockSpec((1, scale_X.shape[0]), lambda m: (0, 0)), *map(block, inputs)],
        out_specs=[block(x) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        interpret=is_interpreted(),
        name=kernel.func.__name__.strip("_").replace("kernel", "gated_norm"),
    )(scale_X[None], *inputs)


def _forward_kernel(scale, o, gate, *rest, eps):
    *square, y = rest
    o, g, w = (x[...].astype(jnp.float32) for x in (o, gate, scale))
    total = square[0][...] if square else jnp.sum(o * o, axis=1, keepdims=True)
    y[...] = xla.value(o, g, w, total / o.shape[1], eps).astype(y.dtype)


def _backward_kernel(scale, o, gate, dy, do, dgate, *, eps):
    o, g, w, dy = (x[...].astype(jnp.float32) for x in (o, gate, scale, dy))
    mean = lambda x: jnp.sum(x, axis=1, keepdims=True) / o.shape[1]  # noqa: E731
    a, b = xla.gradients(o, g, w, dy, eps, mean)
    do[...], dgate[...] = a.astype(do.dtype), b.astype(dgate.dtype)
