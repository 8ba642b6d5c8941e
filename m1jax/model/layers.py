"""The small pieces that both kinds of layer use: parameters with logical axes, RMSNorm, rotary embedding.

Everything works on tokens flattened to rows, [M, D] with M = B * T: XLA on a CPU takes more than twice as long for
the backward pass of the same products in three dimensions.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from m1jax.mesh import MeshConfig
from m1jax.model.collectives import gathered
from m1jax.model.config import ModelConfig


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 where it already is (the exact tests run there)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def parameter(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    dims: tuple[str | None, ...],
    dtype: jnp.dtype | str,
    init: nn.initializers.Initializer,
    mesh: MeshConfig,
) -> jax.Array:
    """This device's part of a parameter of `module`; `dims` are the names of its dimensions in `m1jax.mesh.RULES`."""
    boxed = nn.with_logical_partitioning(init, dims)
    return module.param(name, boxed, mesh.local(shape, dims), jnp.dtype(dtype))  # pyright: ignore[reportReturnType]  # Flax unboxes it


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], dims: tuple[str | None, ...], config: ModelConfig
) -> jax.Array:
    """What this device computes with of a weight matrix of `module`, N(0, init_std), in the compute dtype."""
    init = nn.initializers.normal(config.init_std)
    part = parameter(module, name, shape, dims, config.param_dtype, init, config.mesh)
    return gathered(part, dims, config.mesh, config.dtype)


def bias(
    module: nn.Module, name: str, shape: tuple[int, ...], dims: tuple[str | None, ...], config: ModelConfig
) -> jax.Array:
    """This device's part of a bias of `module`, zero at initialisation, in the compute dtype."""
    zeros = nn.initializers.zeros
    return parameter(module, name, shape, dims, config.param_dtype, zeros, config.mesh).astype(config.dtype)


TRACE = "trace"
"""The Flax collection of what modules record: computed where somebody asks for it, else not at all."""


def record(module: nn.Module, name: str, value: jax.Array) -> None:
    """Show `value` to `transformer.trace`."""
    module.sow(TRACE, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: jnp.zeros(()))


class RMSNorm(nn.Module):
    """w * cast(v / sqrt(mean(v^2) + eps)) over the last axis; the cast to v's dtype comes before the product with w."""

    config: ModelConfig
    eps: float

    @nn.compact
    def __call__(self, v_MD: jax.Array) -> jax.Array:
        shape, dtype = (v_MD.shape[-1],), self.config.param_dtype
        scale_D = parameter(self, "scale", shape, ("norm",), dtype, nn.initializers.ones, self.config.mesh)
        v32_MD = at_least_float32(v_MD)
        normed_MD = v32_MD * jax.lax.rsqrt(jnp.mean(v32_MD**2, axis=-1, keepdims=True) + self.eps)
        return normed_MD.astype(self.config.dtype) * scale_D.astype(self.config.dtype)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, rotary_dim: int, theta: float) -> jax.Array:
    """Partial rotary embedding: the first `rotary_dim` channels turn by position, the others pass.

    Half-split pairs (j, j + rotary_dim/2) with angle position * theta ** (-2j / rotary_dim). Angles and products in
    float32: bfloat16 rounds position 257 to 256.
    """
    half = rotary_dim // 2
    dtype = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    # Rounded where PyTorch rounds them, after the power and after the division: an ulp of a frequency is 1e-5 of angle
    # at position 200, and released models were trained with these. XLA's own float32 power is off by several ulp.
    frequency_h = jnp.asarray(np.float32(1) / np.float32(float(theta) ** (np.arange(half) / half)))
    angle_BT1h = (positions_BT[:, :, None, None].astype(jnp.float32) * frequency_h).astype(dtype)
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    first, second = x_BTNH[..., :half].astype(dtype), x_BTNH[..., half:rotary_dim].astype(dtype)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BTNH.dtype), x_BTNH[..., rotary_dim:]], axis=-1)
