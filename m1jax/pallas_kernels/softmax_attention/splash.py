"""Causal attention of packed rows on TPUs by JAX's splash attention: blocks above the diagonal are never computed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from m1jax.pallas_kernels import compat

LANES, BLOCK = 128, 512
"""Width of a TPU's vectors, and the most queries or keys of a block: its float32 scores are 1 MiB of fast memory."""


def why_not(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, in_order: bool) -> str | None:
    """Return why splash attention does not serve such a call here; None where it does."""
    if reason := compat.why_not("mosaic_tpu"):
        return reason
    if not in_order:
        return "it serves self-attention in order, where key s is the token of query s; this may be a cache"
    dtypes = [str(x.dtype) for x in (q_BTNH, k_BSKH, v_BSKH)]
    if len(set(dtypes)) > 1 or dtypes[0] not in ("bfloat16", "float32"):
        return f"q, k and v must all be bfloat16 or all float32, found {', '.join(dtypes)}"
    return None


def softmax_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Return o_BTNH of tokens in order; arguments for which `why_not` gives None, and segment ids or None (all live).

    In order, the later of two tokens of a segment is the one with the higher position, so that a mask over indices and
    equal segment ids are all that `seen` asks. Padding makes up a segment of its own. Since it is set to 0 on the
    way in, what it sees there is 0, as is its output, and no gradient passes it.

    Scores and softmax are float32. The scale 1 / sqrt(H), which splash attention does not know, goes into q: one more
    rounding of q in its own dtype.
    """
    T, N, H = q_BTNH.shape[1:]
    blocks = -(-T // BLOCK)
    block = -(-T // (blocks * LANES)) * LANES  # blocks of one length, so that little is added at the end of the row
    longer = blocks * block - T
    segments = None  # what is added at the end is later than every token, and seen by none
    if segment_ids_BT is not None:
        live_BT11 = (segment_ids_BT > 0)[:, :, None, None]
        q_BTNH, k_BTKH, v_BTKH = (jnp.where(live_BT11, x, 0) for x in (q_BTNH, k_BTKH, v_BTKH))
        ids_BT = jnp.pad(jnp.maximum(segment_ids_BT, 0), ((0, 0), (0, longer)))
        segments = splash_attention.SegmentIds(ids_BT, ids_BT)

    def rows(x_BTNH: jax.Array) -> jax.Array:
        """[B, N, whole blocks of tokens, whole vectors of H]."""
        return jnp.einsum("btnh->bnth", jnp.pad(x_BTNH, ((0, 0), (0, longer), (0, 0), (0, -H % LANES))))

    attend = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((T + longer, T + longer))] * N),
        block_sizes=splash_attention.BlockSizes(
            block_q=block, block_kv=block,
            block_q_dkv=block, block_kv_dkv=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        interpret=compat.is_interpreted(),
    )  # fmt: skip
    # The product in float32: in bfloat16 the factor itself would be rounded, and with it every score the same way.
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    o_BNTH: Any = jax.vmap(attend)(rows(scaled_BTNH), rows(k_BTKH), rows(v_BTKH), segments)
    return jnp.einsum("bnth->btnh", o_BNTH[:, :, :T, :H])
