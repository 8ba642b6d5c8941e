"""A lightning-attention layer's mixing block: interleaved qkv, SiLU, the recurrence, norm over all heads, gate."""

from __future__ import annotations

import flax.linen as nn
import jax

from m1jax.model.config import ModelConfig
from m1jax.model.layers import RMSNorm, at_least_float32, weight
from m1jax.pallas_kernels.lightning_attention.api import lightning_attention, lightning_decode


class LightningAttention(nn.Module):
    """y = (sigmoid(u W_gate) * RMSNorm(recurrence(silu(u W_qkv)))) W_out, no rotary embedding and no scale.

    q, k and v stay in float32 from the SiLU to the inner norm in training and in decoding alike: where the two sides
    round differently, the ratio of the policy to the behaviour policy is wrong before the first update.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, u_MD: jax.Array, slopes_N: jax.Array, cache: dict[str, jax.Array] | None, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        c = self.config
        (B, T), D, N, H = segment_ids_BT.shape, c.hidden_size, c.num_heads, c.head_dim
        # Per head [q | k | v], not [all q | all k | all v]: the layout of the released checkpoints.
        w_qkv = weight(self, "qkv", (D, N, 3, H), ("embed", "heads", None, "head_dim"), c)
        w_gate = weight(self, "gate", (D, N, H), ("embed", "heads", "head_dim"), c)
        w_out = weight(self, "out", (N, H, D), ("heads", "head_dim", "embed"), c)

        qkv_BTN3H = jax.nn.silu(at_least_float32(u_MD @ w_qkv.reshape(D, -1))).reshape(B, T, N, 3, H)
        q_BTNH, k_BTNH, v_BTNH = qkv_BTN3H[:, :, :, 0], qkv_BTN3H[:, :, :, 1], qkv_BTN3H[:, :, :, 2]
        if cache is None:
            o_BTNH, _ = lightning_attention(
                q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT=segment_ids_BT, chunk=c.lightning_chunk
            )
        elif T == 1:
            o_BNH, state = lightning_decode(
                q_BTNH[:, 0], k_BTNH[:, 0], v_BTNH[:, 0], slopes_N, cache["state"], live_B=segment_ids_BT[:, 0] > 0
            )
            o_BTNH, cache = o_BNH[:, None], {"state": state}
        else:
            o_BTNH, state = lightning_attention(
                q_BTNH, k_BTNH, v_BTNH, slopes_N,
                segment_ids_BT=segment_ids_BT, initial_state_BNHH=cache["state"], chunk=c.lightning_chunk,
            )  # fmt: skip
            cache = {"state": state}
        o_MX = RMSNorm(c, c.lightning_norm_eps, axis="heads_and_dims", name="norm")(o_BTNH.reshape(B * T, N * H))
        gate_MX = jax.nn.sigmoid(u_MD @ w_gate.reshape(D, -1))
        return (gate_MX * o_MX) @ w_out.reshape(-1, D), cache
