"""Rows whose tokens are dealt out to several devices, each of which has a stretch of every row (the axis `context`).

Positions and segments are known of whole rows, which are a few integers a token. Softmax layers gather keys and values
(8 heads of MiniMax-M1 against 64 of the queries). Lightning layers need one state a device: with S_i the state that
device i's own tokens leave, starting from zero, and n_k the live tokens of device k,

    S(entering j) = sum over i < j of  exp(-slope sum_{i<k<j} n_k) S_i      where i ends in the segment that j begins in
    o_t          += exp(-slope c_t) q_t S(entering j)                       for the tokens t of that segment,

c_t counting the live tokens of the device up to t. All states are gathered at once and added up by every device for
itself (LASP-2, arXiv 2502.07563; LASP+ of MiniMax-01, arXiv 2501.08313, section 2.2), so that nobody waits for a
neighbour, and what a device computes of its own tokens does not wait either. Segments may begin and end anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from m1jax.mesh import MeshConfig
from m1jax.model.collectives import own_part


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Where:
    """Where the tokens of a call are in their sequences.

    Attributes:
        positions_BT, segment_ids_BT: int32, of this device's tokens.
        key_positions_BS, key_segment_ids_BS: int32, of what softmax attention may look at: whole rows, or a cache.
        first_slot: int32 [], the slot of the cache that the first token goes to; None without one.
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    key_positions_BS: jax.Array
    key_segment_ids_BS: jax.Array
    first_slot: jax.Array | None


def without_cache(segment_ids_BS: jax.Array, mesh: MeshConfig) -> Where:
    """Of whole rows, which this device has a part of."""
    positions_BS = positions_in_segments(segment_ids_BS)
    part = partial(own_part, axis="context", mesh=mesh, dim=1)
    return Where(part(positions_BS), part(segment_ids_BS), positions_BS, segment_ids_BS, None)


def positions_in_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: each token's distance from its segment's start, counted in live tokens."""
    live_BT = segment_ids_BT > 0
    before_BT = jnp.cumsum(live_BT, axis=1, dtype=jnp.int32) - live_BT
    starts_BT = segment_ids_BT != jnp.pad(segment_ids_BT, ((0, 0), (1, 0)))[:, :-1]
    origin_BT = jax.lax.cummax(jnp.where(starts_BT & live_BT, before_BT, 0), axis=1)
    return (before_BT - origin_BT).astype(jnp.int32)


def add_entering_state(
    o_BTNH: jax.Array,
    q_BTNH: jax.Array,
    state_BNHH: jax.Array,
    slopes_N: jax.Array,
    where: Where,
    mesh: MeshConfig,
) -> jax.Array:
    """The outputs of lightning attention with what the devices before this one remember; see the top of the file.

    Args:
        o_BTNH, state_BNHH: of this device's tokens alone, from a state of zero.
        q_BTNH: its queries.
        slopes_N: decay of each head.
    """
    if mesh.context == 1:
        return o_BTNH
    wide, here = state_BNHH.dtype, jax.lax.axis_index("context")
    reach_PB, live_PB = entering(where.key_segment_ids_BS, here, mesh.context)
    weight_PBN = jnp.where(reach_PB[..., None], jnp.exp(-slopes_N.astype(wide) * live_PB[..., None]), 0)
    states_PBNHH = jax.lax.all_gather(state_BNHH, "context")
    entering_BNHH = jnp.einsum("pbn,pbnde->bnde", weight_PBN, states_PBNHH, precision=jax.lax.Precision.HIGHEST)

    live_BT = where.segment_ids_BT > 0
    counted_BT = jnp.cumsum(live_BT, axis=1)
    first_B1 = first_live(where.segment_ids_BT)[:, None]
    decay_BTN = jnp.exp(-slopes_N.astype(wide) * counted_BT[..., None])
    decay_BTN = jnp.where((live_BT & (where.segment_ids_BT == first_B1))[..., None], decay_BTN, 0)
    more_BTNH = jnp.einsum("btnd,bnde->btne", q_BTNH.astype(wide), entering_BNHH, precision=jax.lax.Precision.HIGHEST)
    return (o_BTNH.astype(wide) + decay_BTN[..., None] * more_BTNH).astype(o_BTNH.dtype)


def entering(segment_ids_BS: jax.Array, here: jax.Array | int, devices: int) -> tuple[jax.Array, jax.Array]:
    """Which devices' states enter device `here`, bool [P, B], and the live tokens in between, int32 [P, B].

    A state does where the device comes before, and ends in the segment that the first live token here belongs to: what
    lies between the two is of that segment then.
    """
    segment_ids_PBT = jnp.moveaxis(segment_ids_BS.reshape(len(segment_ids_BS), devices, -1), 1, 0)
    live_PB = (segment_ids_PBT > 0).sum(axis=-1, dtype=jnp.int32)
    last_PB = jax.vmap(lambda x_BT: first_live(x_BT[:, ::-1]))(segment_ids_PBT)
    first_B = first_live(jax.lax.dynamic_index_in_dim(segment_ids_PBT, here, keepdims=False))
    device_P1 = jnp.arange(devices)[:, None]
    reach_PB = (device_P1 < here) & (last_PB == first_B) & (first_B > 0)
    ends_PB = jnp.cumsum(live_PB, axis=0)
    before_here_B = jnp.where(device_P1 < here, live_PB, 0).sum(axis=0)
    return reach_PB, jnp.maximum(before_here_B - ends_PB, 0)


def first_live(segment_ids_BT: jax.Array) -> jax.Array:
    """int32 [B]: segment of each row's first live token, 0 where there is none."""
    first_B1 = jnp.argmax(segment_ids_BT > 0, axis=1)[:, None]
    return jnp.take_along_axis(segment_ids_BT, first_B1, axis=1)[:, 0]
