"""The experts' MLPs and their gradients as grouped products: the plan that the kernels of both devices follow.

Rows lie in slots, in blocks of one expert each (layout.py). A grouped product multiplies every block with its expert's
weights and passes the float32 sums through an epilogue before they leave the chip; a contraction multiplies the rows of
each expert with each other. With W the weights of a block's expert and c the combine weight of a slot:

    forward     GATE_UP        gate = x Wgate, up = x Wup; h = silu(gate) * up
                DOWN           out = c * (h Wdown)              a token's A slots are then added up, in order
    backward    DOWN_BACK      dout = dy Wdown^T; dc = <dout, h>, and from c * dout: dgate, dup; also c * h
                GATE_UP_BACK   dx = dgate Wgate^T + dup Wup^T   added up by token, as out
                contractions   dWgate = x^T dgate, dWup = x^T dup, dWdown = (c * h)^T dy

Kept for the backward pass: the inputs, the layout, gate and up. Rows are gathered anew: no copy of x by slot is kept.
Sums are float32 throughout; gate, up, h, out and their gradients are rounded to the dtype of x once each, gradients of
the weights to the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels.moe.layout import layout_of, sum_of_rows, tokens_of


@dataclass(frozen=True)
class Product:
    """A grouped product.

    Attributes:
        name: of the kernel.
        sums: for each float32 sum that the epilogue gets, which rows go with which weights.
        transposed: weights [E, N, K] multiply as their transpose; else they are [E, K, N].
        epilogue: takes the sums [C, N], tiles of other rows [C, N] and, with `weighed`, c [C, 1], float32.
        outputs: how many of the tiles that it returns are written.
        weighed: the epilogue takes the combine weights.
        row_sums: of one tile more, the last, only the sum of each row is written, float32.
    """

    name: str
    sums: tuple[tuple[tuple[int, int], ...], ...]
    transposed: bool
    epilogue: Callable
    outputs: int
    weighed: bool = False
    row_sums: bool = False


def _swiglu(gate, up):
    return gate * _sigmoid(gate) * up, gate, up


def _weigh(out, c):
    return (c * out,)


def _swiglu_back(dout, gate, up, c):
    sigmoid = _sigmoid(gate)
    silu, dh = gate * sigmoid, c * dout
    h = silu * up
    return dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu, c * h, dout * h


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))  # no logistic: Mosaic GPU of 0.10.2 has none


GATE_UP = Product("moe_gate_up", (((0, 0),), ((0, 1),)), False, _swiglu, outputs=3)
GATE_UP_ALONE = replace(GATE_UP, outputs=1)  # h only: no backward pass follows
DOWN = Product("moe_down", (((0, 0),),), False, _weigh, outputs=1, weighed=True)
DOWN_BACK = Product("moe_down_back", (((0, 0),),), True, _swiglu_back, outputs=3, weighed=True, row_sums=True)
GATE_UP_BACK = Product("moe_gate_up_back", (((0, 0), (1, 1)),), True, lambda dx: (dx,), outputs=1)


class Device(NamedTuple):
    """What a device has to bring.

    Attributes:
        block: `(rows, experts, dtype) -> C`, the slots of a block.
        multiply: `(product, layout, rows, weights, tiles=(), combine_S=None)` -> the outputs [S, N] in the dtype of the
            rows, and the row sums float32 [S] where there are some. `rows` are [S, K], `tiles` [S, N]. What lies in a
            block without rows is not defined.
        contract: `(layout, a_SM, bs_SN, dtype)` -> for each of one or two b, [E, M, N]: a^T b over the rows of an
            expert, zero for none.
    """

    block: Callable
    multiply: Callable
    contract: Callable


def by(device: Device) -> Callable:
    """Return the implementation of `api.expert_mlp` by the kernels of a device."""

    def expert_mlp(x_TD, expert_ids_TA, combine_weights_TA, *weights):
        return _experts(device, x_TD, expert_ids_TA, combine_weights_TA, *weights)

    return expert_mlp


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(device, *inputs):
    return _forward(device, *inputs, gate_up=GATE_UP_ALONE)[0]


def _forward(device, x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD, gate_up=GATE_UP):
    E = w_gate_EDF.shape[0]
    layout = layout_of(expert_ids_TA, E, device.block(expert_ids_TA.size, E, x_TD.dtype), visit_all=True)
    x_SD = tokens_of(x_TD, layout.rows_GC.reshape(-1), layout)
    h_SF, *kept = device.multiply(gate_up, layout, (x_SD,), (w_gate_EDF, w_up_EDF))
    combine_S = _by_slot(combine_weights_TA, layout)
    (out_SD,) = device.multiply(DOWN, layout, (h_SF,), (w_down_EFD,), combine_S=combine_S)
    y_TD = sum_of_rows(out_SD.astype(jnp.float32), layout).astype(x_TD.dtype)
    return y_TD, (x_TD, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD, layout, *kept)


def _backward(device, kept, dy_TD):
    x_TD, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD, layout, gate_SF, up_SF = kept
    x_SD, dy_SD = (tokens_of(rows_TD, layout.rows_GC.reshape(-1), layout) for rows_TD in (x_TD, dy_TD))
    combine_S = _by_slot(combine_weights_TA, layout)
    dgate_SF, dup_SF, weighed_SF, dcombine_S = device.multiply(
        DOWN_BACK, layout, (dy_SD,), (w_down_EFD,), (gate_SF, up_SF), combine_S
    )
    (dx_SD,) = device.multiply(GATE_UP_BACK, layout, (dgate_SF, dup_SF), (w_gate_EDF, w_up_EDF))
    dw_gate_EDF, dw_up_EDF = device.contract(layout, x_SD, (dgate_SF, dup_SF), w_gate_EDF.dtype)
    (dw_down_EFD,) = device.contract(layout, weighed_SF, (dy_SD,), w_down_EFD.dtype)
    dx_TD = sum_of_rows(dx_SD.astype(jnp.float32), layout).astype(x_TD.dtype)
    dcombine_TA = dcombine_S.at[layout.slot_TA].get(mode="fill", fill_value=0).astype(combine_weights_TA.dtype)
    return dx_TD, None, dcombine_TA, dw_gate_EDF, dw_up_EDF, dw_down_EFD


_experts.defvjp(_forward, _backward)


def _by_slot(combine_weights_TA, layout):
    """Return float32 [S], the combine weight of every slot, 0 in empty ones."""
    combine_R = combine_weights_TA.reshape(-1).astype(jnp.float32)
    return combine_R.at[layout.rows_GC.reshape(-1)].get(mode="fill", fill_value=0)


LANES = 128
"""Widths are multiples of it on both devices: a tile of the result on a GPU, a row of registers on a TPU."""


def pad(x: jax.Array, axes: Sequence[int] = (-1,)) -> jax.Array:
    """Return `x` with zeros behind along `axes`, up to whole lanes: they change no product."""
    pads = [(0, 0)] * x.ndim
    for axis in axes:
        pads[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, pads)
