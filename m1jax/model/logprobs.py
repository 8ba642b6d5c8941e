"""Log-probabilities of the tokens that a batch holds: the one place where predictions shift by one.

The logits of all tokens would be the largest array of a training step. They exist for a block of rows at a time only,
R = `ModelConfig.head_rows` of M = B * T: the forward pass keeps one logsumexp per row, the backward pass computes each
block's logits again and adds up the gradient of the head's weight over the blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from m1jax.mesh import ONE, MeshConfig
from m1jax.model.collectives import gathered, own_part, sum_of_parts, whole
from m1jax.model.config import ModelConfig
from m1jax.model.layers import at_least_float32
from m1jax.model.transformer import hidden_states
from m1jax.types import Array, Params

AUTOMATIC_LOGITS = 2**24
"""Logits that exist at the same time where `ModelConfig.head_rows` is 0: 64 MiB of float32."""


def token_logprobs(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    segment_ids_BT: Array,
    temperature: float = 1.0,
    expert_ids_BTLA: Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """log p(tokens[b, t] | earlier tokens of its segment) under softmax(logits / temperature).

    Args:
        params, config: the policy.
        tokens_BT: int32 token ids; whole rows, also where their tokens are dealt out to several devices.
        segment_ids_BT: int32, 0 on padding. The first token of a segment has no prefix: its entry is meaningless and
            must be masked by the caller.
        temperature: the sampler's; the trainer must divide by the same one or the ratio is wrong by a power.
        expert_ids_BTLA: experts that have to serve, of `hidden_states`.

    Returns:
        logprobs_BT and entropy_BT (nats, of the distribution that token t was drawn from; no gradient), at least
        float32, aligned with tokens_BT; what the routers did, of `hidden_states`.
    """
    B, T = tokens_BT.shape
    hidden_MD, _, router = hidden_states(params, config, tokens_BT, segment_ids_BT, None, expert_ids_BTLA)
    # The last position predicts nothing inside the row: its output comes to entry 0, which is masked.
    next_BT = own_part(jnp.roll(jnp.asarray(tokens_BT), -1, axis=1), "context", config.mesh, 1)
    # A tied head stays the embedding [V, D]: transposed it would be a copy of the largest weight.
    tied = "head" not in params
    weight, dims = (params["embedding"], ("vocab", "embed")) if tied else (params["head"], ("embed", "vocab"))
    per_token: Any = _logprobs_and_entropy(
        hidden_MD, gathered(weight, dims, config.mesh, weight.dtype), next_BT.reshape(-1), dims.index("embed"),
        temperature, block_rows(config, len(hidden_MD)), config.mesh,
    )  # fmt: skip
    align = lambda x_M: jnp.roll(whole(x_M.reshape(B, -1), "context", config.mesh, 1), 1, axis=1)  # noqa: E731
    logprobs_M, entropy_M = per_token
    return align(logprobs_M), align(entropy_M), router


def block_rows(config: ModelConfig, M: int) -> int:
    """Rows R of one block: `config.head_rows` or the automatic power of two, less where M rows then split evenly."""
    columns = config.vocab_size // config.mesh.tensor
    most = config.head_rows or 1 << max((AUTOMATIC_LOGITS // columns).bit_length() - 1, 0)
    blocks = max(-(-M // most), 1)
    return -(-M // blocks)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _logprobs_and_entropy(hidden_MD, weight, tokens_M, d_axis: int, temperature: float, R: int, mesh: MeshConfig = ONE):
    """logprobs_M and entropy_M (no gradient), at least float32.

    Args:
        hidden_MD: what predicts each token.
        weight: the head, [D, V] (d_axis 0) or [V, D] (d_axis 1), or this device's part of V.
        tokens_M: int32, the tokens predicted.
        d_axis: axis of `weight` that is D.
        temperature: divides the logits.
        R: rows of a block.
        mesh: says how many devices share V.
    """
    return _forward(hidden_MD, weight, tokens_M, d_axis, temperature, R, mesh)[0]


def _forward(hidden_MD, weight, tokens_M, d_axis, temperature, R, mesh):
    stored, weight = weight, at_least_float32(weight)
    tokens_M = _own_columns(tokens_M, weight.shape[1 - d_axis], mesh)

    def block(rows):
        hidden_RD, tokens_R = rows
        logits_RV = _logits(hidden_RD, weight, d_axis, temperature)
        logsumexp_R = _logsumexp(logits_RV, mesh)
        chosen_R1 = jnp.take_along_axis(logits_RV, tokens_R[:, None], axis=-1, mode="fill", fill_value=0)
        p_RV = jnp.exp(logits_RV - logsumexp_R[:, None])  # the backward pass's p_RV, which XLA shares in one block
        mean_R = jnp.sum(p_RV * logits_RV, axis=-1)
        chosen_R, mean_R = sum_of_parts(jnp.stack([chosen_R1[:, 0], mean_R]), mesh)
        return chosen_R - logsumexp_R, logsumexp_R - mean_R, logsumexp_R

    M = len(hidden_MD)
    if M <= R:
        logprobs_M, entropy_M, logsumexp_M = block((hidden_MD, tokens_M))
    else:
        by_block = jax.lax.map(block, (_blocks(hidden_MD, R), _blocks(tokens_M, R)))
        logprobs_M, entropy_M, logsumexp_M = (x.reshape(-1)[:M] for x in by_block)
    return (logprobs_M, entropy_M), (hidden_MD, stored, tokens_M, logsumexp_M)


def _backward(d_axis, temperature, R, mesh, kept, cotangents):
    """d logits = d logprob * (onehot - softmax) / temperature; the weight's gradient adds up in at least float32.

    Devices that share V have all computed the same log-probabilities, so that d logprob is the sum of theirs.
    """
    hidden_MD, stored, tokens_M, logsumexp_M = kept
    weight = at_least_float32(stored)

    def block(rows):
        hidden_RD, tokens_R, logsumexp_R, dlogprobs_R = rows
        logits_RV = _logits(hidden_RD, weight, d_axis, temperature)
        p_RV = jnp.exp(logits_RV - logsumexp_R[:, None])
        onehot_RV = tokens_R[:, None] == jnp.arange(p_RV.shape[1])
        dlogits_RV = jnp.where(onehot_RV, 1 - p_RV, -p_RV) * (dlogprobs_R / temperature)[:, None]
        dhidden_RD = _product(dlogits_RV, weight, 1, 1 - d_axis).astype(hidden_RD.dtype)
        wide_RD = at_least_float32(hidden_RD)
        one, other = (wide_RD, dlogits_RV) if d_axis == 0 else (dlogits_RV, wide_RD)
        return _product(one, other, 0, 0), dhidden_RD

    rows = hidden_MD, tokens_M, logsumexp_M, sum_of_parts(cotangents[0], mesh)
    M = len(hidden_MD)
    if M <= R:
        dweight, dhidden_MD = block(rows)
    else:

        def add_block(dweight, rows):
            new, dhidden_RD = block(rows)
            return dweight + new, dhidden_RD

        # Rows of padding have zero for d logprob: they add exact zeros.
        zeros = jnp.zeros(weight.shape, logsumexp_M.dtype)
        dweight, dhidden_bRD = jax.lax.scan(add_block, zeros, jax.tree.map(partial(_blocks, R=R), rows))
        dhidden_MD = dhidden_bRD.reshape(-1, hidden_MD.shape[1])[:M]
    return dhidden_MD, dweight.astype(stored.dtype), None


_logprobs_and_entropy.defvjp(_forward, _backward)


def _own_columns(tokens_M: jax.Array, columns: int, mesh: MeshConfig) -> jax.Array:
    """Tokens by their column among this device's; one that is none of them is beyond the last."""
    if mesh.tensor == 1:
        return tokens_M
    own_M = tokens_M - jax.lax.axis_index("tensor") * columns
    return jnp.where((own_M >= 0) & (own_M < columns), own_M, columns)


def _logsumexp(logits_RV: jax.Array, mesh: MeshConfig) -> jax.Array:
    """logsumexp_R over the columns of all devices."""
    if mesh.tensor == 1:
        return jax.nn.logsumexp(logits_RV, axis=-1)
    top_R = jax.lax.pmax(logits_RV.max(axis=-1), "tensor")
    return top_R + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits_RV - top_R[:, None]), axis=-1), "tensor"))


def _logits(hidden_RD: jax.Array, weight: jax.Array, d_axis: int, temperature: float) -> jax.Array:
    """logits_RV / temperature, as `transformer.head` computes them."""
    return _product(at_least_float32(hidden_RD), weight, 1, d_axis) / temperature


def _product(x: Any, y: Any, x_axis: int, y_axis: int) -> jax.Array:
    """Product of two matrices over the given axes, in full precision; a transpose is never stored."""
    x, y = (a.astype(jnp.promote_types(x.dtype, y.dtype)) for a in (x, y))
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def _blocks(x_M: jax.Array, R: int) -> jax.Array:
    """[M, ...] as [blocks, R, ...], zeros behind the last row."""
    padding = [(0, -len(x_M) % R)] + [(0, 0)] * (x_M.ndim - 1)
    return jnp.pad(x_M, padding).reshape(-1, R, *x_M.shape[1:])
