"""What lies in each block of tokens, as numbers that a kernel multiplies by the slope and puts into exp.

Kernels walk a row in blocks of C tokens, from the first to the last or the other way. Segments, padding and the tail
are all in one table per token; a kernel knows none of them. Time counts live tokens, so that padding decays nothing:

    row of the table   value at token x                                                   where it has none
    TIME               live tokens before x in its row                                    DEAD
    START              TIME of the first token of x's segment                             2 DEAD
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
"""Rows of the table: the five above, and zeros up to the eight rows of a TPU's tile."""

DEAD = float(1 << 24)
"""Later than any token: float32 counts exactly up to here, 1.6 times MiniMax-M1's longest context."""


def tables(segment_ids_BT: jax.Array | None, tokens: int, block: int, spans: int = 1) -> jax.Array:
    """Return the table, float32 [B, ROWS, G * block] with G blocks, equally many in each span; behind is padding.

    Args:
        segment_ids_BT: int32 [B, T], 0 for padding; None: every token is live and each row is one segment. B is then
            1 in the result: all rows are alike.
        tokens: T.
        block: C.
        spans: G is the least multiple of it whose blocks hold the tokens.
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((1, tokens), jnp.int32)
    ids_BX = jnp.pad(segment_ids_BT, [(0, 0), (0, -tokens % (block * spans))])
    B, X = ids_BX.shape
    live_BX = ids_BX > 0
    after_BX = jnp.cumsum(live_BX, axis=1, dtype=jnp.int32)  # live tokens up to and with x
    time_BX = after_BX - 1

    # A state belongs to the last token that it has seen; one that has seen none, to the first that it will see.
    place_BX = jnp.broadcast_to(jnp.arange(X, dtype=jnp.int32), (B, X))
    last_BX = jax.lax.cummax(jnp.where(live_BX, place_BX, -1), axis=1)  # the last live place up to and with x
    first_B1 = jnp.argmax(live_BX, axis=1, keepdims=True).astype(jnp.int32)
    owner_BX = jnp.take_along_axis(ids_BX, jnp.where(last_BX < 0, first_B1, last_BX), axis=1)
    before_BX = jnp.concatenate([jnp.take_along_axis(ids_BX, first_B1, axis=1), owner_BX[:, :-1]], axis=1)
    starts_BX = live_BX & ((ids_BX != before_BX) | (time_BX == 0))
    start_BX = jax.lax.cummax(jnp.where(starts_BX, time_BX, 0), axis=1)

    def at_edges(x_BX, first_B1):
        """Return what a value after each token is at both edges of every block, [B, G, 1] each."""
        last_BG = x_BX[:, block - 1 :: block]
        return jnp.concatenate([first_B1, last_BG[:, :-1]], axis=1)[:, :, None], last_BG[:, :, None]

    count_in, count_out = at_edges(after_BX, jnp.zeros((B, 1), jnp.int32))
    owner_in, owner_out = at_edges(owner_BX, before_BX[:, :1])
    ids_BGC, time_BGC, live_BGC = (x.reshape(B, -1, block) for x in (ids_BX, time_BX, live_BX))
    table = {
        TIME: jnp.where(live_BGC, time_BGC, int(DEAD)),
        START: jnp.where(live_BGC, start_BX.reshape(B, -1, block), int(2 * DEAD)),
        ENTER: jnp.where(live_BGC & (ids_BGC == owner_in), time_BGC + 1 - count_in, -1),
        LEAVE: jnp.where(live_BGC & (ids_BGC == owner_out), count_out - 1 - time_BGC, -1),
        THROUGH: jnp.broadcast_to(jnp.where(owner_in == owner_out, count_out - count_in, -1), ids_BGC.shape),
    }
    rows = [table[row].reshape(B, X) for row in range(len(table))]
    return jnp.pad(jnp.stack(rows, axis=1).astype(jnp.float32), [(0, 0), (0, ROWS - len(rows)), (0, 0)])


def decay(slope: jax.Array, steps: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Return exp(-slope * steps), 0 where there are no steps (or not `where`). Never exp of a positive number.

    Selected, not multiplied away: a slope of 0 is allowed, and exp(+large) * 0 would be NaN.
    """
    where = steps >= 0 if where is None else where
    return jnp.where(where, jnp.exp(-slope * jnp.where(where, steps, 0.0)), 0.0)
