"""Lightning attention and its gradients as walks over blocks: the plan that the kernels of both devices follow.

A *job* is lightning attention of some (query, key, value), forwards or backwards in time. Output and all gradients
are jobs, because each is a sum over pairs of tokens with the same decay (y before x, steps between them):

    o_x  = sum_y decay (q_x . k_y) v_y      + the state that enters      o  = job(q,  k, v)    forwards,  from S0
    dq_x = sum_y decay (do_x . v_y) k_y     + its transpose              dq = job(do, v, k)    forwards,  from S0^T
    dk_y = sum_x decay (v_y . do_x) q_x     + the cotangent that leaves  dk = job(v, do, q)    backwards, from dS^T
    dv_y = sum_x decay (k_y . q_x) do_x     + the cotangent that leaves  dv = job(k, q, do)    backwards, from dS

So a kernel walks and knows nothing of gradients: `walk(tensors, jobs, ...)` takes the jobs of one direction together,
so that they share what is read. The backward pass is two walks: one forwards for dq, which makes each state again
instead of keeping it, one backwards for dk and dv (Lightning Attention-2, arXiv:2401.04658, algorithm 4). With S the
state of a job, in blocks of C tokens and with the table of `blocks`:

    O = ((Q K^T) * D) V + read * (Q S)        S <- through S + K^T (write * V)

    forwards    D[x, y]: y at or before x     read = decay of ENTER, write = decay of LEAVE
    backwards   D[x, y]: y at or after x      read = decay of LEAVE, write = decay of ENTER
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels.lightning_attention.blocks import ENTER, LEAVE, START, TIME, decay


class Job(NamedTuple):
    """Which of the tensors of a walk are query, key and value."""

    query: int
    key: int
    value: int


class Walk(Protocol):
    """What a device has to bring."""

    def __call__(
        self,
        tensors_BTNH: Sequence[jax.Array],
        jobs: Sequence[Job],
        slopes_N: jax.Array,
        segment_ids_BT: jax.Array | None,
        states_BNHH: Sequence[jax.Array],
        *,
        reverse: bool,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return for each job its output [B, T, N, H] and the float32 state [B, N, H, H] that it ends with."""
        ...


def by(walk: Walk) -> Callable:
    """Return the implementation of `api.lightning_attention` by `walk`, whose blocks are the kernel's own."""

    def lightning_attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH, *, chunk):
        del chunk
        B, _, N, H = q_BTNH.shape
        if initial_state_BNHH is None:
            initial_state_BNHH = jnp.zeros((B, N, H, H), jnp.float32)
        state_BNHH = initial_state_BNHH.astype(jnp.float32)
        qkv = (_silence(x, segment_ids_BT) for x in (q_BTNH, k_BTNH, v_BTNH))
        return _attend(walk, *qkv, slopes_N, segment_ids_BT, state_BNHH)

    return lightning_attention


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(walk, q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH):
    (o_BTNH,), (state_BNHH,) = walk(
        (q_BTNH, k_BTNH, v_BTNH), (Job(0, 1, 2),), slopes_N, segment_ids_BT, (initial_state_BNHH,), reverse=False
    )
    return o_BTNH, state_BNHH


def _forward(walk, *inputs):
    return _attend(walk, *inputs), inputs


def _backward(walk, inputs, cotangents):
    q, k, v, slopes_N, segments, state = inputs
    do, dstate = _silence(cotangents[0], segments), cotangents[1]
    (dq,), _ = walk((do, v, k), (Job(0, 1, 2),), slopes_N, segments, (state.swapaxes(2, 3),), reverse=False)
    (dk, dv), (_, dstate) = walk(
        (q, k, v, do), (Job(2, 3, 0), Job(1, 0, 3)), slopes_N, segments, (dstate.swapaxes(2, 3), dstate), reverse=True
    )
    return dq, dk, dv, None, None, dstate


_attend.defvjp(_forward, _backward)


def _silence(x_BTNH, segment_ids_BT):
    """Return `x` with zeros at padding: what stands there may be infinite, and a decay of 0 times that is NaN.

    XLA makes it part of what computes `x`.
    """
    if segment_ids_BT is None:
        return x_BTNH
    return jnp.where((segment_ids_BT > 0)[:, :, None, None], x_BTNH, 0)


class Decays(NamedTuple):
    """The decays of one block for one head."""

    D: jax.Array  # [C, C], row x and column y
    read: jax.Array  # [C, 1]
    write: jax.Array  # [C, 1]


def decays(slope: jax.Array, by_row: Callable, by_column: Callable, *, reverse: bool) -> Decays:
    """Return the decays of a block; `by_row(ROW)` is a row of its table as [C, 1], `by_column(ROW)` as [1, C]."""
    time_x, time_y = by_row(TIME), by_column(TIME)
    if reverse:
        steps, seen = time_y - time_x, (time_y >= time_x) & (time_x >= by_column(START))
    else:
        steps, seen = time_x - time_y, (time_y <= time_x) & (time_y >= by_row(START))
    read, write = (LEAVE, ENTER) if reverse else (ENTER, LEAVE)
    return Decays(decay(slope, steps, seen), decay(slope, by_row(read)), decay(slope, by_row(write)))


def pad_heads(x: jax.Array, width: int, axes: Sequence[int] = (-1,)) -> jax.Array:
    """Return `x` with zeros behind each head along `axes`, up to `width`: they change no product and no state."""
    pads = [(0, 0)] * x.ndim
    for axis in axes:
        pads[axis] = (0, width - x.shape[axis])
    return jnp.pad(x, pads)
