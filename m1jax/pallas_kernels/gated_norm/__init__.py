"""The output stage of lightning attention: RMSNorm over all heads times a sigmoid gate, in one pass over memory."""

from m1jax.pallas_kernels.gated_norm.api import gated_norm

__all__ = ["gated_norm"]
