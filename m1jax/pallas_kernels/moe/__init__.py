"""Mixture of experts: the router, its balance loss, and the experts' gated MLPs without a capacity limit."""

from m1jax.pallas_kernels.moe.api import expert_mlp
from m1jax.pallas_kernels.moe.router import balance_loss, route

__all__ = ["balance_loss", "expert_mlp", "route"]
