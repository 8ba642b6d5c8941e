"""Decay rates of lightning attention: one constant per head and layer, never learned."""

import numpy as np


def slopes(num_heads: int, layer: int, num_layers: int) -> np.ndarray:
    """Return the decay rate of every head of one layer; a state loses the factor exp(-slope) per token.

    slope = alibi(head) * (1 - layer / (num_layers - 1) + 1e-5)

    so the first layer forgets fastest and the last hardly at all (MiniMax-01, arXiv:2501.08313, and the released
    modeling file). With one layer the quotient has no value; the factor is then 1 + 1e-5.

    Args:
        num_heads: query heads of the layer, any number above 0.
        layer: index of the layer among all layers, softmax layers included.
        num_layers: number of all layers.

    Returns:
        float32 [N], rounded once from float64.
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer {layer} is not one of the {num_layers} layers 0..{num_layers - 1}")
    depth = layer / (num_layers - 1) if num_layers > 1 else 0.0
    return (_alibi(num_heads) * (1 - depth + 1e-5)).astype(np.float32)


def _alibi(num_heads: int) -> np.ndarray:
    """Return the float64 [N] ALiBi slopes (arXiv:2108.12409): 2^(-8 (h + 1) / N), N a power of two.

    For any other N: those of the largest power of two P below N, then every second one of 2P until N are filled.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}, but a layer has at least one head")
    power = 1 << (num_heads.bit_length() - 1)
    first = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    finer = 2.0 ** (-8 * np.arange(1, 2 * power, 2) / (2 * power))
    return np.concatenate([first, finer[: num_heads - power]])
