"""Causal softmax attention over packed rows or a cache; grouped heads, forward and backward."""

from m1jax.pallas_kernels.softmax_attention.api import softmax_attention

__all__ = ["softmax_attention"]
