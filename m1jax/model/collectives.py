"""What devices tell each other while they compute a model together: one function for every kind of message.

All of it runs inside `jax.shard_map` over the whole mesh; an axis of size 1 has no message. Gradients are taken inside
too, of what all devices return *together*: a loss that several of them compute alike is divided by their number, and
the gradient of a parameter is summed over the devices that hold the same part of it (`m1jax.sharding.missing_axes`).
Under that rule the transpose of every message is the one that JAX has for it, and nothing needs a rule of its own but
the gather of weights, whose gradient is added up wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from m1jax.mesh import GATHERED, RULES, TOKENS, MeshConfig


def gathered(x: jax.Array, dims: Sequence[str | None], mesh: MeshConfig, dtype: jnp.dtype | str) -> jax.Array:
    """A parameter's part on this device, in `dtype`, with the dimension that lies along `fsdp` and `context` whole.

    Its gradient is summed in at least float32 and scattered again.
    """
    dim = next((i for i, name in enumerate(dims) if name and RULES[name] == GATHERED), None)
    if mesh.along(GATHERED) == 1 or dim is None:
        return x.astype(dtype)
    return _gather(x, dim, jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, dim, dtype):
    return _gather_forward(x, dim, dtype)[0]


def _gather_forward(x, dim, dtype):
    # Here, not in `_gather`: a call of that would hide the message from the policy that keeps no gathered weights.
    whole = jax.lax.all_gather(x.astype(dtype), GATHERED, axis=dim, tiled=True)
    return whole, jnp.zeros((), x.dtype)


def _gather_backward(dim, dtype, like, dy):
    dy = dy.astype(jnp.promote_types(dy.dtype, jnp.float32))
    return (jax.lax.psum_scatter(dy, GATHERED, scatter_dimension=dim, tiled=True).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def sum_of_parts(x: jax.Array, mesh: MeshConfig) -> jax.Array:
    """The sum over the devices along `tensor`, each of which computed a part of it."""
    return x if mesh.tensor == 1 else jax.lax.psum(x, "tensor")


def own_part(x: jax.Array, axis: str, mesh: MeshConfig, dim: int) -> jax.Array:
    """This device's part along `axis` of what it has whole."""
    if (parts := getattr(mesh, axis)) == 1:
        return x
    size = x.shape[dim] // parts
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, dim)


def whole(x: jax.Array, axis: str, mesh: MeshConfig, dim: int) -> jax.Array:
    """The parts of all devices along `axis`, joined."""
    return x if getattr(mesh, axis) == 1 else jax.lax.all_gather(x, axis, axis=dim, tiled=True)


def sum_over_tokens(x: jax.Array, mesh: MeshConfig) -> jax.Array:
    """The sum over all devices that have other tokens."""
    axes = tuple(axis for axis in TOKENS if getattr(mesh, axis) > 1)
    return jax.lax.psum(x, axes) if axes else x
