"""The gated norm on a GPU: a warpgroup holds a row in its registers, reads it once and writes it once."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.gated_norm import xla

THREADS = 128
"""Of a warpgroup: a row is dealt out to them in equal shares, so it is padded to a multiple."""

VECTOR = 4
"""Neighbours that a thread loads at once."""


def forward(o_MX, gate_MX, scale_X, square_M, eps):
    """Return y_MX; `api.gated_norm` says what the arguments mean."""
    squares = () if square_M is None else (square_M.astype(jnp.float32),)
    kernel = partial(_forward_kernel, width=o_MX.shape[1], eps=eps)
    return _by_rows(kernel, (scale_X, o_MX, gate_MX), squares, (gate_MX,), "gated_norm")[0]


def backward(o_MX, gate_MX, scale_X, dy_MX, eps):
    """Return the gradients of o and of the gate."""
    kernel = partial(_backward_kernel, width=o_MX.shape[1], eps=eps)
    return _by_rows(kernel, (scale_X, o_MX, gate_MX, dy_MX), (), (o_MX, gate_MX), "gated_norm_gradients")


def _by_rows(kernel, arrays, squares, outputs, name):
    M, X = outputs[0].shape
    padded = [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -X % THREADS)]) for x in arrays]
    out = compat.gpu_kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((M, padded[0].shape[0]), x.dtype) for x in outputs],
        grid=(M,),
        grid_names=("row",),
        name=name,
    )(*padded, *squares)
    return [x[:, :X] for x in out]


def _forward_kernel(scale, o, gate, *rest, width, eps):
    *square, y = rest
    row = lax.axis_index("row")
    values, g, w = (_load(x) for x in (o.at[row], gate.at[row], scale))
    total = square[0][row] if square else jnp.sum(values * values)
    y[row] = xla.value(values, g, w, total / width, eps).astype(y.dtype)


def _backward_kernel(scale, o, gate, dy, do, dgate, *, width, eps):
    row = lax.axis_index("row")
    values, g, w, dy = (_load(x) for x in (o.at[row], gate.at[row], scale, dy.at[row]))
    a, b = xla.gradients(values, g, w, dy, eps, lambda x: jnp.sum(x) / width)
    do[row], dgate[row] = a.astype(do.dtype), b.astype(dgate.dtype)


def _load(ref):
    """Return a row in float32, dealt out alike whatever its dtype."""
    (X,) = ref.shape
    return compat.load(
        ref, plgpu.Layout.WG_STRIDED((X,), vec_size=VECTOR if X % (VECTOR * THREADS) == 0 else 1)
    ).astype(jnp.float32)
