"""The MLP of a layer: a mixture of experts (float32 router, top-A renormalised, none dropped), or one dense SwiGLU."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from m1jax.model.collectives import gathered, sum_of_parts, sum_over_tokens
from m1jax.model.config import ModelConfig
from m1jax.model.experts import exchanged
from m1jax.model.kernels import moe_kernel
from m1jax.model.layers import at_least_float32, parameter, record, weight
from m1jax.pallas_kernels.moe.api import expert_mlp
from m1jax.pallas_kernels.moe.router import replay, route, routing_sums


class MixtureOfExperts(nn.Module):
    """sum over the A chosen experts e of p_e * (silu(x W_gate[e]) * (x W_up[e])) W_down[e]."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_MD: jax.Array, live_M: jax.Array, recorded_MA: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the branch's output, and the sums of `routing_sums` with "expert_ids": int32 [M, A].

        `recorded_MA` are experts that have to serve in place of the router's own choice, -1 where there are none.
        "expert_ids" is the own choice all the same.
        """
        c = self.config
        D, E, F = c.hidden_size, c.num_experts, c.expert_dim
        # Stored and multiplied in float32: bfloat16 logits flip near-tied choices between trainer and engine.
        router_dtype = jnp.promote_types(c.param_dtype, jnp.float32)
        init = nn.initializers.normal(c.init_std)
        dims = ("embed", "router")  # every device scores all experts
        w_router_DE = parameter(self, "router", (D, E), dims, router_dtype, init, c.mesh)
        w_router_DE = gathered(w_router_DE, dims, c.mesh, router_dtype)
        w_gate_EDF = weight(self, "gate", (E, D, F), ("expert", "embed", "mlp"), c)
        w_up_EDF = weight(self, "up", (E, D, F), ("expert", "embed", "mlp"), c)
        w_down_EFD = weight(self, "down", (E, F, D), ("expert", "mlp", "embed"), c)

        router_logits_ME = jnp.dot(at_least_float32(x_MD), w_router_DE, precision=jax.lax.Precision.HIGHEST)
        record(self, "router_probabilities_ME", jax.nn.softmax(router_logits_ME))
        own_MA, combine_weights_MA = route(router_logits_ME, c.experts_per_token)
        expert_ids_MA = own_MA
        if recorded_MA is not None:
            expert_ids_MA, combine_weights_MA = replay(router_logits_ME, own_MA, recorded_MA)
        # Padding goes to no expert: all of it would choose the same ones, and fill the places of their devices.
        served_MA = jnp.where(live_M[:, None], expert_ids_MA, E)
        y_MD = exchanged(
            partial(expert_mlp, implementation=moe_kernel(c)), c.mesh,
            x_MD, served_MA, combine_weights_MA, w_gate_EDF, w_up_EDF, w_down_EFD,
        )  # fmt: skip
        sums = routing_sums(router_logits_ME, own_MA, expert_ids_MA, live_M, partial(sum_over_tokens, mesh=c.mesh))
        return sum_of_parts(y_MD, c.mesh), sums | {"expert_ids": own_MA}


class DenseMLP(nn.Module):
    """(silu(x W_gate) * (x W_up)) W_down: what a mixture of one expert would be, without a router."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_MD: jax.Array, live_M: jax.Array, recorded_MA: None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """As `MixtureOfExperts`; nothing is routed, so there is nothing to tell of it: {}."""
        c = self.config
        D, F = c.hidden_size, c.expert_dim
        w_gate_DF = weight(self, "gate", (D, F), ("embed", "mlp"), c)
        w_up_DF = weight(self, "up", (D, F), ("embed", "mlp"), c)
        w_down_FD = weight(self, "down", (F, D), ("mlp", "embed"), c)
        y_MD = (jax.nn.silu(x_MD @ w_gate_DF) * (x_MD @ w_up_DF)) @ w_down_FD
        return sum_of_parts(y_MD, c.mesh), {}
