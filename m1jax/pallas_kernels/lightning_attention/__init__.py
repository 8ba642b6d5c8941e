"""Lightning attention: linear attention with one constant decay per head, forward, backward and decode."""

from m1jax.pallas_kernels.lightning_attention.api import fused_decode, lightning_attention, lightning_decode
from m1jax.pallas_kernels.lightning_attention.slopes import slopes

__all__ = ["fused_decode", "lightning_attention", "lightning_decode", "slopes"]
