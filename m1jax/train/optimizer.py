"""AdamW as MiniMax-M1 runs it, with a schedule counted in *updates* and a global gradient clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "linear", "cosine")
MOMENTS = ("", "float32", "bfloat16")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        learning_rate: peak rate.
        warmup_updates: updates over which the rate rises linearly to the peak; the first update already uses
            1 / warmup_updates of it, never 0.
        schedule: after the warm-up "constant", or "linear" / "cosine" decay to final_fraction of the peak.
        decay_updates: updates after the warm-up over which the decay runs; needed by linear and cosine.
        final_fraction: see schedule.
        b1, b2, eps: AdamW's. MiniMax-M1 (section 3.2): RL gradients span 1e-18 to 1e-5, so the usual 0.999 and 1e-8
            do not converge.
        weight_decay: decoupled decay of every parameter.
        max_grad_norm: the global norm is scaled down to this.
        moments: dtype that the two moments are stored in, "float32" or "bfloat16"; "" is that of each parameter. They
            are computed in at least float32 in either case.
    """

    learning_rate: float
    warmup_updates: int = 0
    schedule: str = "constant"
    decay_updates: int = 0
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    moments: str = ""

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: {self.schedule!r} must be one of {SCHEDULES}")
        if self.schedule != "constant" and self.decay_updates < 1:
            raise ValueError(f"decay_updates: {self.decay_updates} must be at least 1 for schedule {self.schedule!r}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: {self.learning_rate} must be above 0")
        if self.warmup_updates < 0:
            raise ValueError(f"warmup_updates: {self.warmup_updates} must be at least 0")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm: {self.max_grad_norm} must be above 0")
        if self.moments not in MOMENTS:
            raise ValueError(f"moments: {self.moments!r} must be one of {MOMENTS}")


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The rate of update number `count`, from 0."""
    peak, warmup = config.learning_rate, config.warmup_updates
    if config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.final_fraction, config.decay_updates)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, config.decay_updates, config.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    if warmup < 1:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), after], [warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW under the schedule."""
    adamw = optax.adamw(learning_rate(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), stored_as(config.moments, adamw))


def stored_as(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that computes in at least float32, and keeps the floating part of its state in `dtype`, or, for "",
    in the dtypes of the parameters.
    """

    def init(params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if dtype and _floating(x) else x, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changes, new = inner.update(_wide(updates), _wide(state), _wide(params))
        return changes, jax.tree.map(lambda x, kept: x.astype(kept.dtype), new, state)

    return optax.GradientTransformation(init, update)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) if _floating(x) else x, tree)


def _floating(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)  # optax sends placeholders, which have none
