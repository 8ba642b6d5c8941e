"""What the choice of kernels in a config comes to on the machine that the program is made for."""

from __future__ import annotations

import jax.numpy as jnp

from m1jax.errors import UserError
from m1jax.model.config import ModelConfig
from m1jax.pallas_kernels.compat import why_not
from m1jax.pallas_kernels.lightning_attention.api import choose


def lightning_kernel(config: ModelConfig) -> str:
    """The implementation that `config.kernels.lightning` comes to.

    Raises:
        ValueError: the named one cannot run here, with the reason.
    """
    asked = config.kernels.lightning
    return choose(None if asked == "auto" else asked, jnp.dtype(config.dtype), config.head_dim)


def check_kernels(config: ModelConfig) -> None:
    """Raise UserError before a run begins where a kernel that its config names cannot do the work."""
    if "lightning" in config.kinds:
        try:
            lightning_kernel(config)
        except ValueError as error:
            raise UserError(f"config.kernels.lightning: {error}, or 'auto'") from error
    if config.kernels.softmax == "splash":
        reason = why_not("mosaic_tpu")
        if config.dtype == "float64":
            reason = "it computes in float32, and model.dtype is float64"
        if reason:
            raise UserError(f"config.kernels.softmax: 'splash' cannot run here: {reason}; choose 'auto'")
