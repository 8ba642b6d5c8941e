"""Causal attention of packed rows on TPUs by JAX's splash attention: blocks above the diagonal are never computed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from m1jax.pallas_kernels import compat

LANES, BLOCK = 128, 512
"""Width of a TPU's vectors, and the most queries or keys of a block: its float32 scores are 1 MiB of fast memory."""


class _CausalMask(splash_attention.CausalMask):
    """Says of a block that is above or below the diagonal what it is by one value instead of 512 x 512.

    The tables of a row of 84K tokens are made from 27,000 blocks, of one of 1M from 4 million.
    """

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = index
        if keys.stop <= queries.start + 1 or queries.stop <= keys.start:
            return np.full((1, 1), keys.start < queries.stop)
        return super().__getitem__(index)


def why_not(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, in_order: bool, part: tuple[Any, int] | None = None
) -> str | None:
    """Return why splash attention does not serve such a call here; None where it does."""
    if reason := compat.why_not("mosaic_tpu"):
        return reason
    if not in_order:
        return "it serves self-attention in order, where key s is the token of query s; this may be a cache"
    if part is not None and q_BTNH.shape[1] % LANES:
        return f"the {q_BTNH.shape[1]} tokens of a part of a row must be a multiple of {LANES}"
    dtypes = [str(x.dtype) for x in (q_BTNH, k_BSKH, v_BSKH)]
    if len(set(dtypes)) > 1 or dtypes[0] not in ("bfloat16", "float32"):
        return f"q, k and v must all be bfloat16 or all float32, found {', '.join(dtypes)}"
    return None


def softmax_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segment_ids_BT: jax.Array | None,
    k_segment_ids_BS: jax.Array | None,
    part: tuple[jax.Array, int] | None = None,
) -> jax.Array:
    """Return o_BTNH of tokens in order; arguments for which `why_not` gives None, and segment ids or None (all live).

    In order, the later of two tokens of a segment is the one with the higher position, so that a mask over indices and
    equal segment ids are all that `seen` asks. Padding makes up a segment of its own. Since it is set to 0 on the
    way in, what it sees there is 0, as is its output, and no gradient passes it.

    Scores and softmax are float32. The scale 1 / sqrt(H), which splash attention does not know, goes into q: one more
    rounding of q in its own dtype.
    """
    (T, N, H), S = q_BTNH.shape[1:], k_BSKH.shape[1]
    if part is None:  # blocks of one length, so that little is added at the end of the row
        blocks = -(-T // BLOCK)
        block = -(-T // (blocks * LANES)) * LANES
        longer = blocks * block - T
    else:  # nothing can be added between the parts
        block, longer = max(n for n in range(LANES, BLOCK + 1, LANES) if T % n == 0), 0
    segments = None  # what is added at the end is later than every token, and seen by none
    if q_segment_ids_BT is not None and k_segment_ids_BS is not None:
        q_BTNH = jnp.where((q_segment_ids_BT > 0)[:, :, None, None], q_BTNH, 0)
        k_BSKH, v_BSKH = (jnp.where((k_segment_ids_BS > 0)[:, :, None, None], x, 0) for x in (k_BSKH, v_BSKH))
        ids = (jnp.pad(jnp.maximum(x, 0), ((0, 0), (0, longer))) for x in (q_segment_ids_BT, k_segment_ids_BS))
        segments = splash_attention.SegmentIds(*ids)

    def rows(x_BTNH: jax.Array) -> jax.Array:
        """[B, N, whole blocks of tokens, whole vectors of H]."""
        return jnp.einsum("btnh->bnth", jnp.pad(x_BTNH, ((0, 0), (0, longer), (0, 0), (0, -H % LANES))))

    attend = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([_CausalMask((S + longer, S + longer))] * N),
        block_sizes=splash_attention.BlockSizes(
            block_q=block, block_kv=block,
            block_q_dkv=block, block_kv_dkv=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1 if part is None else part[1],
        interpret=compat.is_interpreted(),
    )  # fmt: skip
    if part is not None:
        attend = jax.tree.map(partial(_of_part, *part), attend, is_leaf=lambda x: hasattr(x, "q_sequence"))
    # The product in float32: in bfloat16 the factor itself would be rounded, and with it every score the same way.
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    o_BNTH: Any = jax.vmap(attend)(rows(scaled_BTNH), rows(k_BSKH), rows(v_BSKH), segments)
    return jnp.einsum("bnth->btnh", o_BNTH[:, :, :T, :H])


def _of_part(index: jax.Array, parts: int, mask_info: Any) -> Any:
    """What a part of the queries needs of the tables that say which blocks are computed, made for `parts` of them.

    As the kernel's `manual_sharding_spec` cuts them, which is for who hands it to `shard_map` from outside.
    """

    def cut(x: jax.Array | None, axis: int) -> jax.Array | None:
        return x if x is None else jax.lax.dynamic_slice_in_dim(x, index * (n := x.shape[axis] // parts), n, axis)

    tables = {name: cut(getattr(mask_info, name), 1) for name in ("data_next", "mask_next", "block_mask")}
    return mask_info._replace(**tables, q_sequence=cut(mask_info.q_sequence, 0))
