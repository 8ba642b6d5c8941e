"""What the choice of kernels in a config comes to on the machine that the program is made for."""

from __future__ import annotations

import jax.numpy as jnp

from m1jax.errors import UserError
from m1jax.model.config import ModelConfig
from m1jax.pallas_kernels.compat import platform, why_not
from m1jax.pallas_kernels.lightning_attention import api as lightning
from m1jax.pallas_kernels.moe import api as moe


def lightning_kernel(config: ModelConfig) -> str:
    """The implementation that `config.kernels.lightning` comes to.

    Raises:
        ValueError: the named one cannot run here, with the reason.
    """
    return lightning.choose(_asked(config.kernels.lightning), jnp.dtype(config.dtype), config.head_dim)


def moe_kernel(config: ModelConfig) -> str:
    """The implementation that `config.kernels.moe` comes to.

    Raises:
        ValueError: the named one cannot run here, with the reason.
    """
    return moe.choose(_asked(config.kernels.moe), jnp.dtype(config.dtype))


def _asked(name: str) -> str | None:
    return None if name == "auto" else name


def check_kernels(config: ModelConfig) -> None:
    """Raise UserError before a run begins where a kernel, or a message, that its config names cannot do the work."""
    parts = {
        "lightning": (lightning_kernel, "lightning" in config.kinds, "layer of lightning attention"),
        "moe": (moe_kernel, config.num_experts > 0, "mixture of experts"),
    }
    for name, (kernel, used, what) in parts.items():
        asked = getattr(config.kernels, name)
        if not used and asked != "auto":
            raise UserError(f"config.kernels.{name}: {asked!r}, but the model has no {what}; leave it 'auto'")
        try:
            if used:
                kernel(config)
        except ValueError as error:
            raise UserError(f"config.kernels.{name}: {error}, or 'auto'") from error
    if config.mesh.expert != 1 and config.mesh.expert_exchange == "ragged" and platform() == "cpu":
        raise UserError(
            "config.mesh.expert_exchange: 'ragged' cannot run here: XLA has no ragged_all_to_all for CPUs; choose "
            "'all_to_all'"
        )
    if config.kernels.softmax not in ("auto", "blocked") and config.mesh.context != 1:
        raise UserError(
            f"config.kernels.softmax: {config.kernels.softmax!r} does not take every part of a row that mesh.context "
            f"deals out; choose 'auto', which takes it where it can"
        )
    if config.kernels.softmax == "splash":
        reason = why_not("mosaic_tpu")
        if config.dtype == "float64":
            reason = "it computes in float32, and model.dtype is float64"
        if reason:
            raise UserError(f"config.kernels.softmax: 'splash' cannot run here: {reason}; choose 'auto'")
