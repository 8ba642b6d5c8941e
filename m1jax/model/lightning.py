"""A lightning-attention layer's mixing block: interleaved qkv, SiLU, the recurrence, norm over all heads, gate."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from m1jax.model.collectives import own_part, sum_of_parts
from m1jax.model.config import ModelConfig
from m1jax.model.context import Where, add_entering_state
from m1jax.model.kernels import lightning_kernel
from m1jax.model.layers import at_least_float32, parameter, weight
from m1jax.pallas_kernels.gated_norm import gated_norm, gated_norm_of_parts
from m1jax.pallas_kernels.lightning_attention.api import fused_decode, lightning_attention


class LightningAttention(nn.Module):
    """y = (sigmoid(u W_gate) * RMSNorm(recurrence(silu(u W_qkv)))) W_out, no rotary embedding and no scale.

    q, k and v have one dtype in training and in decoding alike: where the two sides round differently, the ratio of
    the policy to the behaviour policy is wrong before the first update. It is at least float32, from the SiLU to the
    inner norm, but for the kernels of GPUs and TPUs, whose matrix units want the model's.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, u_MD: jax.Array, slopes_N: jax.Array, cache: dict[str, jax.Array] | None, where: Where
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        c, segment_ids_BT = self.config, where.segment_ids_BT
        (B, T), D, N, H = segment_ids_BT.shape, c.hidden_size, c.num_heads, c.head_dim
        # Per head [q | k | v], not [all q | all k | all v]: the layout of the released checkpoints.
        w_qkv = weight(self, "qkv", (D, N, 3, H), ("embed", "heads", None, "head_dim"), c)
        w_gate = weight(self, "gate", (D, N, H), ("embed", "heads", "head_dim"), c)
        w_out = weight(self, "out", (N, H, D), ("heads", "head_dim", "embed"), c)
        slopes_N, N = own_part(slopes_N, "tensor", c.mesh, 0), N // c.mesh.tensor

        kernel = lightning_kernel(c)
        dtype = c.dtype if kernel.startswith("mosaic") else jnp.promote_types(c.dtype, jnp.float32)
        qkv_BTN3H, square_M = (u_MD @ w_qkv.reshape(D, -1)).reshape(B, T, N, 3, H), None
        if cache is not None and T == 1:
            o_BNH, square_M, state = fused_decode(
                qkv_BTN3H[:, 0].astype(dtype), slopes_N, cache["state"],
                live_B=segment_ids_BT[:, 0] > 0, implementation=kernel,
            )  # fmt: skip
            o_BTNH, cache = o_BNH[:, None], {"state": state}
        else:
            qkv_BTN3H = jax.nn.silu(at_least_float32(qkv_BTN3H)).astype(dtype)
            o_BTNH, state = lightning_attention(
                qkv_BTN3H[:, :, :, 0], qkv_BTN3H[:, :, :, 1], qkv_BTN3H[:, :, :, 2], slopes_N,
                segment_ids_BT=segment_ids_BT, initial_state_BNHH=None if cache is None else cache["state"],
                chunk=c.lightning_chunk, implementation=kernel,
            )  # fmt: skip
            if cache is None:
                o_BTNH = add_entering_state(o_BTNH, qkv_BTN3H[:, :, :, 0], state, slopes_N, where, c.mesh)
            cache = None if cache is None else {"state": state}
        gate_MX, o_MX = u_MD @ w_gate.reshape(D, -1), o_BTNH.reshape(B * T, N * H)
        gated_MX = GatedNorm(c, name="norm")(o_MX, gate_MX, square_M)
        return sum_of_parts(gated_MX @ w_out.reshape(-1, D), c.mesh), cache


class GatedNorm(nn.Module):
    """sigmoid(gate) * RMSNorm over all heads, in float32 inside and rounded once."""

    config: ModelConfig

    @nn.compact
    def __call__(self, o_MX: jax.Array, gate_MX: jax.Array, square_M: jax.Array | None) -> jax.Array:
        c, kernel = self.config, lightning_kernel(self.config)
        shape, ones = (c.num_heads * c.head_dim,), nn.initializers.ones
        scale_X = parameter(self, "scale", shape, ("heads_and_dims",), c.param_dtype, ones, c.mesh)
        if c.mesh.tensor > 1:
            return gated_norm_of_parts(o_MX, gate_MX, scale_X, c.lightning_norm_eps, "tensor", shape[0])
        kernel = kernel if kernel.startswith("mosaic") else "xla"
        eps = c.lightning_norm_eps
        return gated_norm(o_MX, gate_MX, scale_X, eps=eps, square_M=square_M, implementation=kernel)
