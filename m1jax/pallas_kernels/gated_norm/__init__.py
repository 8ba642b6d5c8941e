"""The output stage of lightning attention: RMSNorm over all heads times a sigmoid gate, in one pass over memory."""

from m1jax.pallas_kernels.gated_norm.api import gated_norm, gated_norm_of_parts

__all__ = ["gated_norm", "gated_norm_of_parts"]
