"""What decoding remembers: one pytree for both kinds of layer.

A lightning layer remembers a state of constant size, a softmax layer one key and one value per slot. All rows share
the slot they write next, so that a decode step writes a column instead of scattering; padding leaves dead slots
behind, and every slot carries its own true position.

    slots     0 1 2 3 4 5 6 7 8 ...
    row 0     p p p p . . g g g        p prompt, g generated, . dead (padding of the prompt)
    row 1     p p p p p p g g          lengths = live slots = position of the next token
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from m1jax.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The memory of B sequences.

    Attributes:
        layers: per layer a dict: lightning {"state": float32 [B, N, H, H]}, softmax {"keys", "values": [B, K, S, H] in
            the compute dtype, heads before slots as the products read them}.
        slot_positions: int32 [B, S], position of the token in each slot.
        slot_segments: int32 [B, S], 1 where a slot is live, else 0.
        next_slot: int32 [], the slot that the next call writes first.
        lengths: int32 [B], live tokens so far.
    """

    layers: tuple[dict[str, jax.Array], ...]
    slot_positions: jax.Array
    slot_segments: jax.Array
    next_slot: jax.Array
    lengths: jax.Array


def empty(config: ModelConfig, rows: int, slots: int) -> Cache:
    """A cache of zeros for `rows` sequences of at most `slots` tokens, padding included; of this device's heads."""
    state_dtype = jnp.promote_types(config.dtype, jnp.float32)
    N, K = config.num_heads // config.mesh.tensor, config.num_kv_heads // config.mesh.tensor
    state, keys = (rows, N, config.head_dim), (rows, K, slots, config.head_dim)
    new = {
        "lightning": lambda: {"state": jnp.zeros((*state, config.head_dim), state_dtype)},
        "softmax": lambda: {name: jnp.zeros(keys, config.dtype) for name in ("keys", "values")},
    }
    return Cache(
        layers=tuple(new[kind]() for kind in config.kinds),
        slot_positions=jnp.zeros((rows, slots), jnp.int32),
        slot_segments=jnp.zeros((rows, slots), jnp.int32),
        next_slot=jnp.zeros((), jnp.int32),
        lengths=jnp.zeros((rows,), jnp.int32),
    )


def claim_slots(cache: Cache, segment_ids_BT: jax.Array) -> tuple[Cache, jax.Array]:
    """Mark the next T slots as these tokens'; return the cache and the tokens' positions int32 [B, T].

    Keys and values of the slots are written layer by layer afterwards.
    """
    live_BT = (segment_ids_BT > 0).astype(jnp.int32)
    before_BT = jnp.cumsum(live_BT, axis=1, dtype=jnp.int32) - 1
    positions_BT = jnp.maximum(cache.lengths[:, None] + before_BT, 0)
    write = lambda table_BS, new_BT: write_slots(table_BS, new_BT, cache.next_slot)  # noqa: E731
    return Cache(
        layers=cache.layers,
        slot_positions=write(cache.slot_positions, positions_BT),
        slot_segments=write(cache.slot_segments, live_BT),
        next_slot=cache.next_slot + segment_ids_BT.shape[1],
        lengths=cache.lengths + live_BT.sum(axis=1, dtype=jnp.int32),
    ), positions_BT


def write_slots(table: jax.Array, new: jax.Array, first_slot: jax.Array, axis: int = 1) -> jax.Array:
    """`table` with the slots from `first_slot` on replaced by `new` along their axis."""
    return jax.lax.dynamic_update_slice_in_dim(table, new, first_slot, axis)


def repeat_rows(cache: Cache, repeats: int) -> Cache:
    """Every row `repeats` times, consecutively: the responses to one prompt start from one prefill."""
    return jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=0) if x.ndim else x, cache)
