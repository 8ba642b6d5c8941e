"""A softmax-attention layer's mixing block: grouped queries, (partial) rotary embedding, blocked causal attention."""

from __future__ import annotations

import flax.linen as nn
import jax

from m1jax.model.cache import write_slots
from m1jax.model.collectives import sum_of_parts, whole
from m1jax.model.config import ModelConfig
from m1jax.model.context import Where
from m1jax.model.layers import bias, rotate, weight
from m1jax.pallas_kernels.softmax_attention import softmax_attention


class SoftmaxAttention(nn.Module):
    """Causal attention of N query heads over K key/value heads; query head n reads kv head n // (N / K)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, u_MD: jax.Array, cache: dict[str, jax.Array] | None, where: Where
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        c, segment_ids_BT, positions_BT = self.config, where.segment_ids_BT, where.positions_BT
        (B, T), D, N, K, H = segment_ids_BT.shape, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        w_q = weight(self, "query", (D, N, H), ("embed", "heads", "head_dim"), c)
        w_k = weight(self, "key", (D, K, H), ("embed", "kv_heads", "head_dim"), c)
        w_v = weight(self, "value", (D, K, H), ("embed", "kv_heads", "head_dim"), c)
        w_out = weight(self, "out", (N, H, D), ("heads", "head_dim", "embed"), c)

        N, K = N // c.mesh.tensor, K // c.mesh.tensor
        q_BTNH = (u_MD @ w_q.reshape(D, -1)).reshape(B, T, N, H)
        k_BTKH = (u_MD @ w_k.reshape(D, -1)).reshape(B, T, K, H)
        v_BTKH = (u_MD @ w_v.reshape(D, -1)).reshape(B, T, K, H)
        if c.qkv_bias:
            q_BTNH += bias(self, "query_bias", (c.num_heads, H), ("heads", "head_dim"), c)
            k_BTKH += bias(self, "key_bias", (c.num_kv_heads, H), ("kv_heads", "head_dim"), c)
            v_BTKH += bias(self, "value_bias", (c.num_kv_heads, H), ("kv_heads", "head_dim"), c)
        q_BTNH = rotate(q_BTNH, positions_BT, c.rotary_dim, c.rope_theta)
        k_BTKH = rotate(k_BTKH, positions_BT, c.rotary_dim, c.rope_theta)
        if cache is None or where.first_slot is None:
            k_BSKH, v_BSKH = (whole(x_BTKH, "context", c.mesh, 1) for x_BTKH in (k_BTKH, v_BTKH))
        else:
            k_BKSH = write_slots(cache["keys"], k_BTKH.swapaxes(1, 2), where.first_slot, axis=2)
            v_BKSH = write_slots(cache["values"], v_BTKH.swapaxes(1, 2), where.first_slot, axis=2)
            cache = {"keys": k_BKSH, "values": v_BKSH}
            k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
        in_order, part = cache is None, None
        if in_order and c.mesh.context > 1:
            part = jax.lax.axis_index("context"), c.mesh.context
        o_BTNH = softmax_attention(
            q_BTNH, k_BSKH, v_BSKH,
            q_positions_BT=positions_BT, k_positions_BS=where.key_positions_BS,
            q_segment_ids_BT=segment_ids_BT, k_segment_ids_BS=where.key_segment_ids_BS, block=c.attention_block,
            in_order=in_order, part=part,
            # A cache is for the blocked form alone.
            implementation=c.kernels.softmax if in_order and c.kernels.softmax != "auto" else None,
        )  # fmt: skip
        return sum_of_parts(o_BTNH.reshape(B * T, N * H) @ w_out.reshape(-1, D), c.mesh), cache
