"""Mixture of experts: the router and its losses, and the experts' gated MLPs without a capacity limit."""

from m1jax.pallas_kernels.moe.api import expert_mlp
from m1jax.pallas_kernels.moe.router import balance_loss, replay, route, routing_sums, z_loss

__all__ = ["balance_loss", "expert_mlp", "replay", "route", "routing_sums", "z_loss"]
