"""The gated norm in plain JAX, and its formulas for every implementation: they work on any block of whole rows."""

import jax
import jax.numpy as jnp


def forward(o_MX, gate_MX, scale_X, square_M, eps):
    """Return y_MX; `api.gated_norm` says what the arguments mean."""
    o, gate, scale = (wide(x) for x in (o_MX, gate_MX, scale_X))
    square_M1 = jnp.sum(o * o, axis=1, keepdims=True) if square_M is None else wide(square_M)[:, None]
    return value(o, gate, scale, square_M1 / o.shape[1], eps).astype(gate_MX.dtype)


def backward(o_MX, gate_MX, scale_X, dy_MX, eps):
    """Return the gradients of o and of the gate."""
    o, gate, scale, dy = (wide(x) for x in (o_MX, gate_MX, scale_X, dy_MX))
    mean = lambda x: jnp.sum(x, axis=1, keepdims=True) / o.shape[1]  # noqa: E731
    do, dgate = gradients(o, gate, scale, dy, eps, mean)
    return do.astype(o_MX.dtype), dgate.astype(gate_MX.dtype)


def value(o, gate, scale, mean_square, eps):
    """Return sigmoid(gate) * RMSNorm(o) * scale."""
    return sigmoid(gate) * (o * jax.lax.rsqrt(mean_square + eps) * scale)


def gradients(o, gate, scale, dy, eps, mean):
    """Return the gradients of o and of the gate; `mean` is that of a row, which knows of padding."""
    r, s = jax.lax.rsqrt(mean(o * o) + eps), sigmoid(gate)
    n, dn = o * r, dy * s * scale
    return r * (dn - n * mean(dn * n)), dn * n * (1 - s)


def sigmoid(x):
    """Return 1 / (1 + exp(-x)) by operations that every compiler of kernels has."""
    return 1 / (1 + jnp.exp(-x))


def wide(x):
    """Return `x` in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
