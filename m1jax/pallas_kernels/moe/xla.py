"""The experts' MLPs as a counting sort and a loop over blocks of rows, in plain JAX with a hand-written backward.

A row is one pair (token, selected expert); there are R = T A. Rows are put in expert order and every expert's rows
are filled up to whole blocks of C slots, so that one block needs one expert's weights:

    selected     t0: e1 e2    t1: e0 e1    t2: e1 e2                     R = 6 rows, E = 3, C = 2
    block           0         1         2         3
    slots        t1  --    t0  t1    t2  --    t0  t2                    G = 4 blocks, enough for any routing
    expert          0         1         1         2

G is known beforehand, so shapes are static and no row is ever dropped. The order is known in both directions (the
slot of a row, the row of a slot), so rows move by gathers only, backward too: a scatter-add of rows is slow on CPU,
and elsewhere adds in an order that may change.

The loop goes over blocks, not a batched product over all of them: the activations of one block stay in cache, and
gate and up are computed again in the backward pass sooner than kept (half the time of the batched form on CPU).
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.custom_vjp
def expert_mlp(x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD):
    """Return y_TD; `api.expert_mlp` says what the arguments mean."""
    return _forward(x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD)[0]


def _forward(x_TD, expert_ids_TA, combine_weights_TA, *weights):
    layout, product = _layout(expert_ids_TA, weights[0].shape[0]), _product(x_TD)

    def run(block):
        rows_C, expert = block
        w_gate_DF, w_up_DF, w_down_FD = (w[expert] for w in weights)
        x_CD = _tokens(x_TD, rows_C, layout)
        gate_CF, up_CF = product("cd,df->cf", x_CD, w_gate_DF), product("cd,df->cf", x_CD, w_up_DF)
        return product("cf,fd->cd", (jax.nn.silu(gate_CF) * up_CF).astype(x_TD.dtype), w_down_FD)

    out_GCD = jax.lax.map(run, (layout.rows_GC, layout.expert_G))
    return _sum_rows(out_GCD, layout, combine_weights_TA).astype(x_TD.dtype), layout


def _fwd(*inputs):
    y_TD, layout = _forward(*inputs)
    return y_TD, (inputs, layout)


def _bwd(saved, dy_TD):
    (x_TD, _, combine_weights_TA, *weights), layout = saved
    product = _product(x_TD)
    combine_R = combine_weights_TA.reshape(-1)

    def run(dweights, block):
        rows_C, expert = block
        w_gate_DF, w_up_DF, w_down_FD = (w[expert] for w in weights)
        x_CD, dy_CD = _tokens(x_TD, rows_C, layout), _tokens(dy_TD, rows_C, layout)
        combine_C1 = combine_R.at[rows_C, None].get(mode="fill", fill_value=0)

        gate_CF, up_CF = product("cd,df->cf", x_CD, w_gate_DF), product("cd,df->cf", x_CD, w_up_DF)
        sigmoid_CF = jax.nn.sigmoid(gate_CF)
        silu_CF = gate_CF * sigmoid_CF
        hidden_CF = silu_CF * up_CF

        # The combine weight scales the output, so its gradient is <dy, hidden W_down> = <dy W_down^T, hidden>.
        dout_CF = product("cd,fd->cf", dy_CD, w_down_FD)
        dcombine_C = jnp.sum(dout_CF * hidden_CF, axis=1)
        dhidden_CF = combine_C1 * dout_CF
        dup_CF = (dhidden_CF * silu_CF).astype(x_TD.dtype)
        dgate_CF = (dhidden_CF * up_CF * (sigmoid_CF + silu_CF * (1 - sigmoid_CF))).astype(x_TD.dtype)
        dx_CD = product("cf,df->cd", dgate_CF, w_gate_DF) + product("cf,df->cd", dup_CF, w_up_DF)
        added = (
            product("cd,cf->df", x_CD, dgate_CF),
            product("cd,cf->df", x_CD, dup_CF),
            product("cf,cd->fd", (combine_C1 * hidden_CF).astype(x_TD.dtype), dy_CD),
        )
        dweights = [dw.at[expert].add(more) for dw, more in zip(dweights, added, strict=True)]
        return dweights, (dx_CD, dcombine_C)

    zeros = [jnp.zeros(w.shape, _wide(x_TD)) for w in weights]
    dweights, (dx_GCD, dcombine_GC) = jax.lax.scan(run, zeros, (layout.rows_GC, layout.expert_G))
    dx_TD = _sum_rows(dx_GCD, layout).astype(x_TD.dtype)
    dcombine_TA = dcombine_GC.reshape(-1)[layout.slot_TA].astype(combine_weights_TA.dtype)
    return dx_TD, None, dcombine_TA, *(dw.astype(w.dtype) for dw, w in zip(dweights, weights, strict=True))


expert_mlp.defvjp(_fwd, _bwd)


class _Layout(NamedTuple):
    """Where every row is: int32 arrays."""

    slot_TA: jax.Array  # [T, A], index of the row's slot among all G C
    rows_GC: jax.Array  # [G, C], index t A + a of the slot's row; R in an empty slot, which no array of rows has
    expert_G: jax.Array  # [G], expert of each block


def _layout(expert_ids_TA, num_experts):
    """Return the layout: a counting sort, stable, so equal ids give equal sums."""
    (T, A), E = expert_ids_TA.shape, num_experts
    R = T * A
    C = _block_size(R, E)
    G = (R + E * (C - 1)) // C  # every expert can waste all but one slot of one block
    mine_RE = expert_ids_TA.reshape(R, 1) == jnp.arange(E)
    counted_RE = jnp.cumsum(mine_RE, axis=0, dtype=jnp.int32)
    blocks_E = (counted_RE[-1] + C - 1) // C
    ends_E = jnp.cumsum(blocks_E)
    slot_R = jnp.sum(jnp.where(mine_RE, (ends_E - blocks_E) * C + counted_RE - 1, 0), axis=1)
    rows_S = jnp.full(G * C, R, jnp.int32).at[slot_R].set(jnp.arange(R, dtype=jnp.int32), unique_indices=True)
    expert_G = jnp.sum(jnp.arange(G)[:, None] >= ends_E, axis=1)  # E behind the last block: empty, any weights do
    return _Layout(slot_R.reshape(T, A), rows_S.reshape(G, C), jnp.minimum(expert_G, E - 1))


def _block_size(num_rows, num_experts):
    """Return C: about a quarter of an expert's mean share, so that an eighth of the slots are empty.

    A power of two in 16..256: smaller blocks spend their time fetching weights, larger ones leave the cache.
    """
    quarter = max(num_rows // (4 * num_experts), 1)
    return min(max(1 << (quarter.bit_length() - 1), 16), 256)


def _tokens(x_TD, rows_C, layout):
    """Return [C, D], the token of every slot, zeros in empty ones: those then add zero to everything."""
    return x_TD.at[rows_C // layout.slot_TA.shape[1]].get(mode="fill", fill_value=0)


def _sum_rows(slots_GCD, layout, combine_weights_TA=None):
    """Return [T, D], the (weighted) sum of each token's A slots, always added in the same order."""
    slots_SD = slots_GCD.reshape(-1, slots_GCD.shape[2])
    # One gather per a: XLA on CPU runs a gather of [T, A, D] and its sum four times slower.
    rows = [slots_SD.at[slot_T].get(mode="promise_in_bounds") for slot_T in layout.slot_TA.T]
    if combine_weights_TA is not None:
        rows = [combine_T[:, None] * row_TD for combine_T, row_TD in zip(combine_weights_TA.T, rows, strict=True)]
    return reduce(jnp.add, rows)


def _wide(x):
    """Return the dtype to add up in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _product(x):
    """Return an einsum that adds up wide."""
    return partial(jnp.einsum, preferred_element_type=_wide(x))
