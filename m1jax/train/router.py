"""Routers of a mixture of experts in training, SFT and RL alike: two auxiliary losses, and how tokens are spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.model.config import ModelConfig


@dataclass(frozen=True)
class RouterConfig:
    """What the routers are trained on beside the objective, each loss a mean over layers.

    Attributes:
        balance_coefficient: weight of the load-balancing loss (Switch Transformer, arXiv 2101.03961), which is A where
            tokens are spread evenly. In RL it moves the gradient off the policy's own: 0 unless experts starve.
        z_coefficient: weight of the mean logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv 2202.08906,
            which takes 1e-3).
    """

    balance_coefficient: float = 0.0
    z_coefficient: float = 0.0

    def __post_init__(self):
        for name in ("balance_coefficient", "z_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 0 and finite")


@dataclass(frozen=True)
class SupervisedRouterConfig(RouterConfig):
    """The same, with the balance loss on unless it is set to 0: text is what routers learn to spread."""

    balance_coefficient: float = 1e-3


NO_AUXILIARY_LOSS = RouterConfig()


def check_router(router: RouterConfig, model: ModelConfig) -> None:
    """Raise ValueError where a dense model is asked to train routers."""
    for name in ("balance_coefficient", "z_coefficient"):
        if getattr(router, name) and not model.num_experts:
            raise ValueError(f"router.{name}: {getattr(router, name):g}, but a dense model has no router; set it to 0")


def auxiliary_loss(sums: Mapping[str, jax.Array], router: RouterConfig, tokens: jax.Array) -> Any:
    """What a micro-batch adds to the objective of its update: its losses, weighted by its share of the live tokens.

    However an update is cut, the z-loss is that of the whole. The balance loss is not linear in its tokens and depends
    a little on the cut.

    Args:
        sums: of `hidden_states`, over the micro-batch, layers first.
        router: the coefficients; one of 0 adds nothing to the program.
        tokens: live tokens of the whole update, over all micro-batches and devices.
    """
    losses = {"balance_loss": router.balance_coefficient, "z_loss": router.z_coefficient}
    return sum(c * sums[name].mean() / jnp.maximum(tokens, 1) for name, c in losses.items() if c)


def router_metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an update under the names that people read; {} for a dense model.

    Args:
        sums: of `hidden_states`, added up over the whole update, layers first.
    """
    if not sums:
        return {}
    served_LE = np.asarray(sums["expert_tokens"], np.float64)
    share_LE = served_LE / np.maximum(served_LE.sum(axis=1, keepdims=True), 1)
    largest_L = share_LE.max(axis=1) * share_LE.shape[1]
    mean = lambda name: float((np.asarray(sums[name], np.float64) / np.maximum(sums["tokens"], 1)).mean())  # noqa: E731
    return {
        "router/load_largest_over_mean": float(largest_L.mean()),
        "router/load_largest_over_mean_worst_layer": float(largest_L.max()),
        "router/load_smallest_over_mean_worst_layer": float(share_LE.min() * share_LE.shape[1]),
        "router/entropy": mean("entropy"),
        "router/small_margin_share": mean("small_margins"),
        "router/balance_loss": mean("balance_loss"),
        "router/z_loss": mean("z_loss"),
    } | {f"router/share_expert_{e}": float(share) for e, share in enumerate(share_LE.mean(axis=0))}
