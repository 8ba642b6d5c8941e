"""The experts' MLPs as a loop over blocks of rows (layout.py), in plain JAX with a hand-written backward.

The loop goes over the experts and, within, over the blocks that an expert really has: its weights are fetched once,
the activations of one block stay in cache, and empty experts and unused blocks cost nothing. The forward pass keeps
gate and up where a backward pass is to follow. A handful of tokens (a decode step) go through every expert instead:
that reads each weight once, where it lies, and copying an expert's weights out takes longer than its products.
"""

from functools import partial

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels.moe.layout import layout_of, sum_of_rows, tokens_of

FEW_TOKENS = 16
"""Up to this many tokens go through every expert, where there are no more than two experts to a row."""

TOGETHER = 4
"""Blocks of an expert that are computed at once; what is left of them, one by one."""


def expert_mlp(x_TD, expert_ids_TA, combine_weights_TA, *weights):
    """Return y_TD; `api.expert_mlp` says what the arguments mean."""
    few = x_TD.shape[0] <= FEW_TOKENS and weights[0].shape[0] <= 2 * expert_ids_TA.size
    return (_through_every_expert if few else _in_blocks)(x_TD, expert_ids_TA, combine_weights_TA, *weights)


def _through_every_expert(x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD):
    E, product = w_gate_EDF.shape[0], _product(x_TD)
    # The experts are a batch of all three products: else XLA on CPU transposes the weights first.
    x_ETD = jnp.broadcast_to(x_TD, (E, *x_TD.shape))
    gate_ETF, up_ETF = (product("etd,edf->etf", x_ETD, w_EDF) for w_EDF in (w_gate_EDF, w_up_EDF))
    out_ETD = product("etf,efd->etd", (jax.nn.silu(gate_ETF) * up_ETF).astype(x_TD.dtype), w_down_EFD)
    selected_TAE = expert_ids_TA[:, :, None] == jnp.arange(E)
    combine_TE = jnp.sum(jnp.where(selected_TAE, combine_weights_TA[:, :, None], 0), axis=1)
    return jnp.einsum("te,etd->td", combine_TE, out_ETD).astype(x_TD.dtype)


# -- blocks of rows, forward and backward ------------------------------------------------------------------------


@jax.custom_vjp
def _in_blocks(x_TD, expert_ids_TA, combine_weights_TA, *weights):
    return _forward(x_TD, expert_ids_TA, combine_weights_TA, *weights, keep=False)[0]


def _forward(x_TD, expert_ids_TA, combine_weights_TA, *weights, keep):
    """(y_TD, the layout, gate_SF and up_SF if they are to be kept)."""
    E, product = weights[0].shape[0], _product(x_TD)
    layout = layout_of(expert_ids_TA, E, _block_size(expert_ids_TA.size, E))

    def one_expert(slots, expert):
        begin, end, w_gate_DF, w_up_DF, w_down_FD = expert

        def block(rows_C, start, slots):
            x_CD = tokens_of(x_TD, rows_C, layout)
            gate_CF, up_CF = product("cd,df->cf", x_CD, w_gate_DF), product("cd,df->cf", x_CD, w_up_DF)
            out_CD = product("cf,fd->cd", (jax.nn.silu(gate_CF) * up_CF).astype(x_TD.dtype), w_down_FD)
            return [_put(x_SX, start, x_CX) for x_SX, x_CX in zip(slots, (out_CD, gate_CF, up_CF), strict=keep)]

        return _over_blocks(layout, begin, end, block, slots), None

    (D, F), S = weights[0].shape[1:], layout.rows_GC.size
    slots = [jnp.zeros((S, width), _wide(x_TD)) for width in ((D, F, F) if keep else (D,))]
    (out_SD, *kept), _ = jax.lax.scan(one_expert, slots, (layout.begin_E, layout.end_E, *weights))
    return sum_of_rows(out_SD, layout, combine_weights_TA).astype(x_TD.dtype), layout, kept


def _fwd(*inputs):
    y_TD, layout, kept = _forward(*inputs, keep=True)
    return y_TD, (inputs, layout, kept)


def _bwd(saved, dy_TD):
    (x_TD, _, combine_weights_TA, *weights), layout, (gate_SF, up_SF) = saved
    product, combine_R = _product(x_TD), combine_weights_TA.reshape(-1)

    def one_expert(slots, expert):
        begin, end, *own = expert
        w_gate_DF, w_up_DF, w_down_FD = own

        def block(rows_C, start, sums):
            dweights, (dx_SD, dcombine_S) = sums
            x_CD, dy_CD = tokens_of(x_TD, rows_C, layout), tokens_of(dy_TD, rows_C, layout)
            combine_C1 = combine_R.at[rows_C, None].get(mode="fill", fill_value=0)
            gate_CF, up_CF = (jax.lax.dynamic_slice_in_dim(x_SF, start, rows_C.size) for x_SF in (gate_SF, up_SF))
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
            slots = _put(dx_SD, start, dx_CD), _put(dcombine_S, start, dcombine_C)
            return jax.tree.map(jnp.add, dweights, added), slots

        zeros = tuple(jnp.zeros(w.shape, _wide(x_TD)) for w in own)
        dweights, slots = _over_blocks(layout, begin, end, block, (zeros, slots))
        return slots, tuple(dw.astype(w.dtype) for dw, w in zip(dweights, own, strict=True))

    slots = jnp.zeros((layout.rows_GC.size, x_TD.shape[1]), _wide(x_TD)), jnp.zeros(layout.rows_GC.size, _wide(x_TD))
    (dx_SD, dcombine_S), dweights = jax.lax.scan(one_expert, slots, (layout.begin_E, layout.end_E, *weights))
    dx_TD = sum_of_rows(dx_SD, layout).astype(x_TD.dtype)
    dcombine_TA = dcombine_S.at[layout.slot_TA].get(mode="fill", fill_value=0)
    return dx_TD, None, dcombine_TA.astype(combine_weights_TA.dtype), *dweights


_in_blocks.defvjp(_fwd, _bwd)


def _over_blocks(layout, begin, end, block, carry):
    """Run `block(rows, first slot, carry)` over the blocks begin..end, `TOGETHER` at once while there are as many."""
    rows_S, (G, C) = layout.rows_GC.reshape(-1), layout.rows_GC.shape
    together = min(TOGETHER, G)  # the loop is traced where it never runs, too

    def at(count, g, carry):
        return block(jax.lax.dynamic_slice_in_dim(rows_S, g * C, count * C), g * C, carry)

    whole = (end - begin) // together
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: at(together, begin + i * together, carry), carry)
    return jax.lax.fori_loop(begin + whole * together, end, partial(at, 1), carry)


def _put(slots_SX, start, x_CX):
    """Return slots_SX with those from `start` on replaced."""
    return jax.lax.dynamic_update_slice_in_dim(slots_SX, x_CX.astype(slots_SX.dtype), start, axis=0)


def _block_size(num_rows, num_experts):
    """Return C: about an eighth of an expert's mean share, so that a sixteenth of the slots are empty.

    A power of two in 8..64; `TOGETHER` of them are what products want: smaller ones spend their time fetching weights
    and adding up their gradients, larger ones leave the cache.
    """
    eighth = max(num_rows // (8 * num_experts), 1)
    return min(max(1 << (eighth.bit_length() - 1), 8), 64)


def _wide(x):
    """Return the dtype to add up in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _product(x):
    """Return an einsum that adds up wide."""
    return partial(jnp.einsum, preferred_element_type=_wide(x))
