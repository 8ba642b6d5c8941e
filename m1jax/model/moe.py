"""The mixture of experts of every layer: float32 router, top-A renormalised, SwiGLU experts, nothing dropped."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from m1jax.model.config import ModelConfig
from m1jax.model.layers import at_least_float32, parameter, weight
from m1jax.pallas_kernels.moe.api import expert_mlp
from m1jax.pallas_kernels.moe.router import balance_loss, route


class MixtureOfExperts(nn.Module):
    """sum over the A chosen experts e of p_e * (silu(x W_gate[e]) * (x W_up[e])) W_down[e]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_MD: jax.Array, live_M: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the branch's output and {"balance_loss": [], "expert_load": [E] shares of the live tokens}."""
        c = self.config
        D, E, F = c.hidden_size, c.num_experts, c.expert_dim
        # Stored and multiplied in float32: bfloat16 logits flip near-tied choices between trainer and engine.
        router_dtype = jnp.promote_types(c.param_dtype, jnp.float32)
        init = nn.initializers.normal(c.init_std)
        w_router_DE = parameter(self, "router", (D, E), ("embed", "expert"), router_dtype, init)
        w_gate_EDF = weight(self, "gate", (E, D, F), ("expert", "embed", "mlp"), c)
        w_up_EDF = weight(self, "up", (E, D, F), ("expert", "embed", "mlp"), c)
        w_down_EFD = weight(self, "down", (E, F, D), ("expert", "mlp", "embed"), c)

        router_logits_ME = jnp.dot(at_least_float32(x_MD), w_router_DE, precision=jax.lax.Precision.HIGHEST)
        expert_ids_MA, combine_weights_MA = route(router_logits_ME, c.experts_per_token)
        y_MD = expert_mlp(x_MD, expert_ids_MA, combine_weights_MA.astype(x_MD.dtype), w_gate_EDF, w_up_EDF, w_down_EFD)
        chosen_ME = (expert_ids_MA[:, :, None] == jnp.arange(E)).any(axis=1) & live_M[:, None]
        load_E = chosen_ME.sum(axis=0) / jnp.maximum(live_M.sum() * c.experts_per_token, 1)
        return y_MD, {"balance_loss": balance_loss(router_logits_ME, expert_ids_MA, live_M), "expert_load": load_E}
