"""How tokens reach the devices that hold their experts, and come back: the axis `expert`.

Every device along the axis has rows of its own and E / devices of the experts. A pair (token, chosen expert) that lives
elsewhere goes there and comes back; none is ever dropped, however uneven the routing.

    all_to_all   Pairs are sorted by their destination. In a round every device sends to every other one a fixed number
                 of places, computes what it got, and sends it back. Even routing needs one round; what does not fit
                 goes in the next one, and all devices go through as many as the fullest needs. Memory is that of one
                 round, forward and backward: the backward pass sends the tokens again.
    all_gather   Every device gets the tokens of its group, computes the pairs that are its own, and what it computed is
                 summed. No rounds, and the memory of all tokens of the group: for groups of a few.
    ragged       As all_to_all, and every place is used: one round of `ragged_all_to_all`, whose buffer holds the worst
                 case. XLA has it on TPUs and GPUs, not on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from m1jax.mesh import MeshConfig

ExpertMLP = Callable[..., jax.Array]
"""`(x_TD, expert_ids_TA, combine_weights_TA, *weights) -> y_TD` of the experts here; an id that is none of theirs adds
nothing (`m1jax.pallas_kernels.moe.api.expert_mlp`)."""


def exchanged(mlp: ExpertMLP, mesh: MeshConfig, x_MD, expert_ids_MA, combine_weights_MA, *weights) -> jax.Array:
    """`mlp` over the experts of all devices; ids are those among all experts, or beyond them for none at all."""
    if mesh.expert == 1:
        return mlp(x_MD, expert_ids_MA, combine_weights_MA, *weights)
    if mesh.expert_exchange == "all_gather":
        return _all_gather(mlp, x_MD, expert_ids_MA, combine_weights_MA, *weights)
    exchange = _in_rounds if mesh.expert_exchange == "all_to_all" else _ragged
    rows_RD: Any = exchange(mlp, mesh, x_MD, expert_ids_MA, *weights)
    rows_MAD = rows_RD.reshape(*expert_ids_MA.shape, -1).astype(jnp.promote_types(x_MD.dtype, jnp.float32))
    return jnp.einsum("ma,mad->md", combine_weights_MA, rows_MAD).astype(x_MD.dtype)


def _all_gather(mlp, x_MD, expert_ids_MA, combine_weights_MA, *weights):
    everybody = partial(jax.lax.all_gather, axis_name="expert", axis=0, tiled=True)
    own_ids = everybody(expert_ids_MA) - jax.lax.axis_index("expert") * len(weights[0])
    y_XD = mlp(everybody(x_MD), own_ids, everybody(combine_weights_MA), *weights)
    return jax.lax.psum_scatter(y_XD, "expert", scatter_dimension=0, tiled=True)


# -- rounds ------------------------------------------------------------------------------------------------------


def places(pairs: int, mesh: MeshConfig) -> int:
    """Pairs that a device sends to each other one in a round, a multiple of 8."""
    return -(-max(int(pairs * mesh.expert_capacity), 1) // (8 * mesh.expert)) * 8


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(mlp, mesh, x_MD, expert_ids_MA, *weights):
    """out_RD: the output of every pair (token, chosen expert), token by token; its combine weight is not in it."""
    table = _table(expert_ids_MA, len(weights[0]), mesh)

    def send_one_round(n, out_RD):
        return out_RD + _round(mlp, mesh, expert_ids_MA, table, n, x_MD, *weights)

    zeros = jnp.zeros((expert_ids_MA.size, x_MD.shape[1]), x_MD.dtype)
    return jax.lax.fori_loop(0, table[1], send_one_round, zeros)


def _in_rounds_forward(mlp, mesh, *inputs):
    return _in_rounds(mlp, mesh, *inputs), inputs


def _in_rounds_backward(mlp, mesh, inputs, dout_RD):
    x_MD, expert_ids_MA, *weights = inputs
    table = _table(expert_ids_MA, len(weights[0]), mesh)

    def send_one_round(n, sums):
        _, pull = jax.vjp(partial(_round, mlp, mesh, expert_ids_MA, table, n), x_MD, *weights)
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), sums, pull(dout_RD))

    wide = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in (x_MD, *weights)]
    sums = jax.lax.fori_loop(0, table[1], send_one_round, tuple(wide))
    dx_MD, *dweights = (total.astype(x.dtype) for total, x in zip(sums, (x_MD, *weights), strict=True))
    return dx_MD, None, *dweights


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _table(expert_ids_MA, experts_here, mesh):
    """(place_R, rounds): the number of every pair among those with its destination, and the rounds that all need."""
    destination_R = expert_ids_MA.reshape(-1) // experts_here
    same_RP = destination_R[:, None] == jnp.arange(mesh.expert)
    count_RP = jnp.cumsum(same_RP, axis=0, dtype=jnp.int32)
    place_R = jnp.sum(jnp.where(same_RP, count_RP - 1, 0), axis=1)
    fullest = count_RP[-1].max()
    # The same for all that send to each other, so that none leaves the loop while another still waits for it.
    rounds = jax.lax.pmax(-(-fullest // places(expert_ids_MA.size, mesh)), "expert")
    return place_R, rounds


def _round(mlp, mesh, expert_ids_MA, table, n, x_MD, *weights):
    """out_RD of the pairs whose places are in round n, 0 elsewhere; differentiable in x and the weights."""
    C, P, experts_here, A = places(expert_ids_MA.size, mesh), mesh.expert, len(weights[0]), expert_ids_MA.shape[1]
    expert_R, place_R = expert_ids_MA.reshape(-1), table[0] - n * C
    in_round_R = (place_R >= 0) & (place_R < C)
    slot_R = jnp.where(in_round_R, expert_R // experts_here * C + place_R, P * C)
    # Which pair each slot holds: rows move by gathers, also where this is transposed.
    pair_S = (
        jnp.full(P * C, expert_R.size, jnp.int32)
        .at[slot_R]
        .set(jnp.arange(expert_R.size, dtype=jnp.int32), mode="drop")
    )
    x_SD = _taken(x_MD, pair_S // A, slot_R.reshape(-1, A))
    expert_S = expert_R.at[pair_S].get(mode="fill", fill_value=experts_here * P) % experts_here
    expert_S = jnp.where(pair_S < expert_R.size, expert_S, experts_here)  # an empty place has no expert
    swap = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
    ones_S1 = jnp.ones((P * C, 1), jnp.promote_types(x_MD.dtype, jnp.float32))
    y_SD = swap(mlp(swap(x_SD), swap(expert_S)[:, None], ones_S1, *weights))
    return _taken(y_SD, slot_R, pair_S[:, None])


@jax.custom_vjp
def _taken(x_XD, index_Y, back_XZ):
    """x[index], 0 where the index is none. `back_XZ` are the places that each row of x is taken to, or none."""
    return x_XD.at[index_Y].get(mode="fill", fill_value=0)


def _taken_forward(x_XD, index_Y, back_XZ):
    return _taken(x_XD, index_Y, back_XZ), back_XZ


def _taken_backward(back_XZ, dy_YD):
    return sum(dy_YD.at[back_X].get(mode="fill", fill_value=0) for back_X in back_XZ.T), None, None


_taken.defvjp(_taken_forward, _taken_backward)


# -- one ragged round --------------------------------------------------------------------------------------------


def _ragged(mlp, mesh, x_MD, expert_ids_MA, *weights):
    """out_RD as `_in_rounds` has it."""
    P, here, experts_here, (M, A) = mesh.expert, jax.lax.axis_index("expert"), len(weights[0]), expert_ids_MA.shape
    expert_R = expert_ids_MA.reshape(-1)
    order_R = jnp.argsort(expert_R, stable=True)  # by destination, and there by expert
    back_R = jnp.argsort(order_R)
    sent_P = jnp.sum(expert_R // experts_here == jnp.arange(P)[:, None], axis=1, dtype=jnp.int32)
    sent_PP = jax.lax.all_gather(sent_P, "expert")  # [from, to]
    starts = lambda counts_P: jnp.cumsum(counts_P) - counts_P  # noqa: E731
    received_P = sent_PP[:, here]
    there_P = (jnp.cumsum(sent_PP, axis=0) - sent_PP)[here]  # where mine begin in each one's buffer

    def to_experts(x_RX, fill):
        buffer = jnp.full((P * M * A, *x_RX.shape[1:]), fill, x_RX.dtype)
        return jax.lax.ragged_all_to_all(x_RX, buffer, starts(sent_P), sent_P, there_P, received_P, axis_name="expert")

    x_SD = to_experts(_taken(x_MD, order_R // A, back_R.reshape(M, A)), 0)
    expert_S = to_experts(expert_R[order_R] % experts_here, experts_here)
    ones_S1 = jnp.ones((len(x_SD), 1), jnp.promote_types(x_MD.dtype, jnp.float32))
    y_SD = mlp(x_SD, expert_S[:, None], ones_S1, *weights)
    # The way back: what came from a device lies at `starts(received)` here, and goes to where that one had it.
    had_P = (jnp.cumsum(sent_PP, axis=1) - sent_PP)[:, here]
    out_RD = jax.lax.ragged_all_to_all(
        y_SD, jnp.zeros((M * A, y_SD.shape[1]), y_SD.dtype), starts(received_P), received_P, had_P, sent_P,
        axis_name="expert",
    )  # fmt: skip
    return _taken(out_RD, back_R, order_R[:, None])
