"""Where the rows of the experts lie: a stable counting sort into blocks, and the table of the blocks.

A row is one pair (token, selected expert); there are R = T A. Rows are put in expert order and every expert's rows
are filled up to whole blocks of C slots, so that one block needs one expert's weights:

    selected     t0: e1 e2    t1: e0 e1    t2: e1 e2                     R = 6 rows, E = 3, C = 2
    block           0         1         2         3
    slots        t1  --    t0  t1    t2  --    t0  t2                    G = 4 blocks, enough for any routing
    expert          0         1         1         2

G is known beforehand, so shapes are static and no row is ever dropped. The order is known in both directions (the
slot of a row, the row of a slot), so rows move by gathers only, backward too: a scatter-add of rows is slow on CPU,
and elsewhere adds in an order that may change.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layout(NamedTuple):
    """Where every row is: int32 arrays."""

    slot_TA: jax.Array  # [T, A], index of the row's slot among all S = G C; S for a row without an expert
    rows_GC: jax.Array  # [G, C], index t A + a of the slot's row; R in an empty slot, which no array of rows has
    begin_E: jax.Array  # [E], first block of each expert
    end_E: jax.Array  # [E], the block behind its last one that holds rows
    expert_G: jax.Array  # [G], expert of each block; behind the last one, the last expert
    live_G: jax.Array  # [G], rows in each block


def layout_of(expert_ids_TA: jax.Array, num_experts: int, block: int, *, visit_all: bool = False) -> Layout:
    """Return the layout of the selected experts in blocks of C = `block` slots.

    Equal ids give an equal layout, and the rows of an expert are in the order of tokens. A row whose id is none of
    0..E-1 lies nowhere. With `visit_all` an expert
    without rows has one block, an empty one, so that what is written block by block is written for it too.
    """
    (T, A), E, C = expert_ids_TA.shape, num_experts, block
    R = T * A
    # Every expert can waste all but one slot of one block, or all of them where it has one for nothing.
    G = R // C + E if visit_all else (R + E * (C - 1)) // C
    mine_RE = expert_ids_TA.reshape(R, 1) == jnp.arange(E)
    counted_RE = jnp.cumsum(mine_RE, axis=0, dtype=jnp.int32)
    count_E = counted_RE[-1]
    filled_E = (count_E + C - 1) // C
    ends_E = jnp.cumsum(jnp.maximum(filled_E, 1) if visit_all else filled_E)
    begin_E = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E[:-1]])
    slot_R = jnp.sum(jnp.where(mine_RE, begin_E * C + counted_RE - 1, 0), axis=1, dtype=jnp.int32)
    slot_R = jnp.where(mine_RE.any(axis=1), slot_R, G * C)
    rows_S = jnp.full(G * C, R, jnp.int32).at[slot_R].set(jnp.arange(R, dtype=jnp.int32), mode="drop")
    expert_G = jnp.minimum(jnp.sum(ends_E <= jnp.arange(G)[:, None], axis=1, dtype=jnp.int32), E - 1)
    live_G = jnp.clip(count_E[expert_G] - (jnp.arange(G) - begin_E[expert_G]) * C, 0, C)
    return Layout(
        slot_R.reshape(T, A), rows_S.reshape(G, C), begin_E, begin_E + filled_E, expert_G, live_G.astype(jnp.int32)
    )


def tokens_of(x_TD: jax.Array, rows_X: jax.Array, layout: Layout) -> jax.Array:
    """Return [X, D], the token of every slot, zeros in empty ones: those then add zero to everything."""
    return x_TD.at[rows_X // layout.slot_TA.shape[1]].get(mode="fill", fill_value=0)


def sum_of_rows(slots_SD: jax.Array, layout: Layout, combine_weights_TA: jax.Array | None = None) -> jax.Array:
    """Return [T, D], the (weighted) sum of each token's A slots, always added in the same order."""
    # One gather per a: XLA on CPU runs a gather of [T, A, D] and its sum four times slower.
    rows = [slots_SD.at[slot_T].get(mode="fill", fill_value=0) for slot_T in layout.slot_TA.T]
    if combine_weights_TA is not None:
        rows = [combine_T[:, None] * row_TD for combine_T, row_TD in zip(combine_weights_TA.T, rows, strict=True)]
    return reduce(jnp.add, rows)
