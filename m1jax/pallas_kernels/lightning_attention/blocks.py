"""What lies in each block of tokens, as numbers that a kernel multiplies by the slope and puts into exp.

Kernels walk a row in blocks of C tokens, from the first to the last or the other way. Segments, padding and the tail
are all in one table per block; a kernel knows none of them. Steps count live tokens, so that padding decays nothing:

    row of the table   value at token x                                                   where it has none
    TIME               live tokens before x in the block                                  DEAD
    START              TIME of the first token of x's segment in the block                2 DEAD
    ENTER              steps from the state that enters the block to x, at least 1        -1: x is not of its segment
    LEAVE              steps from x to the state that leaves the block, at least 0        -1: x is not of its segment
    THROUGH            steps from the entering state to the leaving one, in every place   -1: they differ in segment

Token y is seen by token x of its segment where START[x] <= TIME[y] <= TIME[x]; for padding either side fails.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

TIME, START, ENTER, LEAVE, THROUGH = range(5)
ROWS = 8
"""Rows of a block's table: the five above, and zeros up to the eight rows of a TPU's tile."""

DEAD = float(1 << 20)
"""Later than any token of a block."""


def tables(segment_ids_BT: jax.Array | None, tokens: int, block: int, spans: int = 1) -> jax.Array:
    """Return the tables, float32 [B, G, ROWS, C] of G blocks, equally many in each span; behind the row is padding.

    Args:
        segment_ids_BT: int32 [B, T], 0 for padding; None: every token is live and each row is one segment. B is then
            1 in the result: all rows are alike.
        tokens: T.
        block: C.
        spans: G is the least multiple of it whose blocks hold the tokens.
    """
    if segment_ids_BT is None:
        return _whole_row(tokens, block, spans)
    ids_BX = jnp.pad(segment_ids_BT, [(0, 0), (0, -tokens % (block * spans))])
    ids_BGC = ids_BX.reshape(ids_BX.shape[0], -1, block)
    live_BGC, place = ids_BGC > 0, jnp.arange(block)
    before = (place[:, None] < place).astype(jnp.float32)
    # A product with ones: exact, and quicker to compile than a running sum.
    time_BGC = jnp.einsum("bgy,yx->bgx", live_BGC.astype(jnp.float32), before, precision=jax.lax.Precision.HIGHEST)
    same_BGCC = ids_BGC[..., :, None] == ids_BGC[..., None, :]
    start_BGC = jnp.where(same_BGCC, time_BGC[..., None, :], DEAD).min(axis=-1)

    # A state belongs to the last token that it has seen; one that has seen none, to the first that it will see.
    count_BG1 = live_BGC.sum(axis=2, keepdims=True)
    last_BG1 = jnp.where(live_BGC, place, -1).max(axis=2, keepdims=True)
    last_id_BG = jnp.where(place == last_BG1, ids_BGC, 0).sum(axis=2)
    alive_BG = count_BG1[..., 0] > 0
    latest_BG = jax.lax.cummax(jnp.where(alive_BG, jnp.arange(alive_BG.shape[1]), -1), axis=1)
    first_id_B1 = jnp.take_along_axis(ids_BX, jnp.argmax(ids_BX > 0, axis=1, keepdims=True), axis=1)
    owner_BG = jnp.where(latest_BG < 0, first_id_B1, jnp.take_along_axis(last_id_BG, jnp.maximum(latest_BG, 0), axis=1))
    leaving_BG1 = owner_BG[..., None]
    entering_BG1 = jnp.concatenate([first_id_B1, owner_BG[:, :-1]], axis=1)[..., None]

    rows = {
        TIME: jnp.where(live_BGC, time_BGC, DEAD),
        START: jnp.where(live_BGC, start_BGC, 2 * DEAD),
        ENTER: jnp.where(live_BGC & (ids_BGC == entering_BG1), time_BGC + 1, -1),
        LEAVE: jnp.where(live_BGC & (ids_BGC == leaving_BG1), count_BG1 - 1 - time_BGC, -1),
        THROUGH: jnp.broadcast_to(jnp.where(entering_BG1 == leaving_BG1, count_BG1, -1), ids_BGC.shape),
    }
    return _stack(rows)


def _whole_row(tokens, block, spans):
    """Return the tables of one row of live tokens, without any look at neighbours."""
    G = -(-tokens // (block * spans)) * spans
    place_C = jnp.arange(block)
    count_1G1 = jnp.clip(tokens - block * jnp.arange(G), 0, block)[None, :, None]
    live_1GC = place_C < count_1G1
    rows = {
        TIME: jnp.where(live_1GC, place_C, DEAD),
        START: jnp.where(live_1GC, 0, 2 * DEAD),
        ENTER: jnp.where(live_1GC, place_C + 1, -1),
        LEAVE: jnp.where(live_1GC, count_1G1 - 1 - place_C, -1),
        THROUGH: jnp.broadcast_to(count_1G1, live_1GC.shape),
    }
    return _stack(rows)


def _stack(rows):
    table = jnp.stack([rows[row].astype(jnp.float32) for row in range(len(rows))], axis=2)
    return jnp.pad(table, [(0, 0), (0, 0), (0, ROWS - len(rows)), (0, 0)])


def decay(slope: jax.Array, steps: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Return exp(-slope * steps), 0 where there are no steps (or not `where`). Never exp of a positive number.

    Selected, not multiplied away: a slope of 0 is allowed, and exp(+large) * 0 would be NaN.
    """
    where = steps >= 0 if where is None else where
    return jnp.where(where, jnp.exp(-slope * jnp.where(where, steps, 0.0)), 0.0)
