"""Causal attention of whole rows by cuDNN's flash attention, through JAX's public function."""

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels import compat

WIDEST = 128
"""Head size up to which every GPU with flash attention in cuDNN serves; M1's is 128."""


def why_not(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, packed: bool, in_order: bool) -> str | None:
    """Return why cuDNN does not serve such a call here; None where it does.

    `jax.nn.dot_product_attention` takes no segment ids. A mask would do in their place, but only as an array of
    B T^2 values, which is what flash attention is there to avoid; and the offsets of JAX 0.10.2's private function
    are wrong for grouped heads.
    """
    if compat.platform() != "gpu":
        return f"it needs a GPU, and programs are made for a {compat.platform().upper()} here"
    if not in_order:
        return "it serves self-attention in order, where key s is the token of query s; this may be a cache"
    if packed:
        return "it takes no segment ids; without them (and positions) every token is live and a row is one segment"
    dtypes = {x.dtype for x in (q_BTNH, k_BSKH, v_BSKH)}
    if dtypes not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        found = ", ".join(str(x.dtype) for x in (q_BTNH, k_BSKH, v_BSKH))
        return f"q, k and v must all be bfloat16 or all float16, found {found}"
    H = q_BTNH.shape[3]
    if H % 8 or H > WIDEST:
        return f"the head size must be a multiple of 8 up to {WIDEST}, found {H}"
    return None


def softmax_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Return o_BTNH of rows of one segment each, every token live; arguments for which `why_not` gives None.

    By name, since `dot_product_attention` left to itself takes XLA's path with its [T, T] arrays.
    """
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
