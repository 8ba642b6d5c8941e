"""The output stage of lightning attention as one operation with its gradient, and the choice of who computes it.

With r = 1 / sqrt(mean(o^2) + eps) and n = o r, along each row of X = heads * head width:

    y = sigmoid(g) * (n * w)
    dn = dy * sigmoid(g) * w        do = r (dn - n mean(dn n))
    dg = dy * n * w * sigmoid(g) (1 - sigmoid(g))               dw = sum over rows of dy * sigmoid(g) * n
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.gated_norm import mosaic_gpu, mosaic_tpu, xla

IMPLEMENTATIONS = {"xla": xla, "mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}


def gated_norm(
    o_MX: jax.Array,
    gate_MX: jax.Array,
    scale_X: jax.Array,
    *,
    eps: float,
    square_M: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return sigmoid(gate) * RMSNorm(o) * scale, computed in float32 (float64 for float64) and rounded once.

    Args:
        o_MX: floating [M, X], the outputs of all heads of M tokens.
        gate_MX: floating [M, X], the gate before its sigmoid, in the dtype of the result.
        scale_X: floating [X], the norm's weight.
        eps: added to the mean of squares.
        square_M: float32 [M], the sum of o^2 along each row where the caller has it (`fused_decode` does); it gets no
            gradient. None: computed.
        implementation: a key of `IMPLEMENTATIONS`, or None for the best one on this backend.

    Returns:
        y_MX in the dtype of the gate, with gradients to o, gate and scale.

    Raises:
        ValueError: shapes disagree, or the implementation does not exist or cannot run here.
    """
    if o_MX.ndim != 2 or gate_MX.shape != o_MX.shape or scale_X.shape != o_MX.shape[1:]:
        raise ValueError(
            f"o and gate must be [M, X] and scale [X], found {o_MX.shape}, {gate_MX.shape} and {scale_X.shape}"
        )
    if square_M is not None and square_M.shape != o_MX.shape[:1]:
        raise ValueError(f"square has shape {square_M.shape}, but o of shape {o_MX.shape} asks for {o_MX.shape[:1]}")
    if implementation is None:
        kernel = f"mosaic_{compat.platform()}"
        implementation = kernel if kernel in IMPLEMENTATIONS and not _why_not(kernel, o_MX, gate_MX) else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"gated_norm has no implementation {implementation!r}; available: {sorted(IMPLEMENTATIONS)}")
    if reason := _why_not(implementation, o_MX, gate_MX):
        raise ValueError(f"gated_norm by {implementation!r} cannot run here: {reason}; choose 'xla'")
    if square_M is None:
        return _trained(implementation, eps, o_MX, gate_MX, scale_X)
    return IMPLEMENTATIONS[implementation].forward(o_MX, gate_MX, scale_X, square_M, eps)


def gated_norm_of_parts(
    o_MX: jax.Array, gate_MX: jax.Array, scale_X: jax.Array, eps: float, axis: str, width: int
) -> jax.Array:
    """Return `gated_norm` where every device along the mesh axis `axis` has other X of `width` columns.

    Plain JAX: the sum of squares is everybody's, so no kernel can hold a row.
    """
    o_wide_MX = xla.wide(o_MX)
    square_M1 = jax.lax.psum(jnp.sum(o_wide_MX**2, axis=1, keepdims=True), axis)
    return xla.value(o_wide_MX, xla.wide(gate_MX), xla.wide(scale_X), square_M1 / width, eps).astype(gate_MX.dtype)


def _why_not(implementation, *arrays):
    """Return why an implementation cannot do this, or None."""
    if implementation == "xla":
        return None
    found = {x.dtype.name for x in arrays}
    if not found <= {"float32", "bfloat16"}:
        return f"it takes bfloat16 and float32, and found {' and '.join(sorted(found))}"
    return compat.why_not(implementation)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _trained(implementation, eps, o_MX, gate_MX, scale_X):
    return IMPLEMENTATIONS[implementation].forward(o_MX, gate_MX, scale_X, None, eps)


def _forward(implementation, eps, *inputs):
    return _trained(implementation, eps, *inputs), inputs


def _backward(implementation, eps, inputs, dy_MX):
    do_MX, dgate_MX = IMPLEMENTATIONS[implementation].backward(*inputs, dy_MX, eps)
    # The sum over rows is left to XLA: it reads o, gate and dy once more, and no kernel has to meet another's sums.
    o_MX, gate_MX, scale_X = inputs
    o_MX, gate_MX, dy_MX = (xla.wide(x) for x in (o_MX, gate_MX, dy_MX))
    n_MX = o_MX * jax.lax.rsqrt(jnp.mean(o_MX**2, axis=1, keepdims=True) + eps)
    dscale_X = jnp.sum(dy_MX * jax.nn.sigmoid(gate_MX) * n_MX, axis=0)
    return do_MX, dgate_MX, dscale_X.astype(scale_X.dtype)


_trained.defvjp(_forward, _backward)
