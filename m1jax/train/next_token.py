"""One supervised update: next-token cross entropy on packed rows, for SFT and pre-training alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from m1jax.model.config import ModelConfig
from m1jax.model.logprobs import token_logprobs
from m1jax.sharding import DATA
from m1jax.train.state import TrainState, apply_gradients
from m1jax.types import Array, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenBatch:
    """Packed rows.

    Attributes:
        tokens: int32 [M, B, T] over M micro-batches.
        segment_ids: int32 [M, B, T], 0 on padding.
        weights: float32 [M, B, T], what each token's -log p counts; the sum over all is 1, prompts have 0.
    """

    tokens: Array
    segment_ids: Array
    weights: Array


def make_supervised_update(
    model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, balance_coefficient: float
) -> Callable[[TrainState, TokenBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The update of a run, jitted, with the state donated.

    Loss = -sum(weights * logprobs) + balance_coefficient * load-balancing loss, which is averaged over micro-batches
    (it is not linear in the batch, so unlike the first term it depends a little on how the batch is cut).
    """

    def objective(params: Params, micro: TokenBatch, parts: int):
        logprobs_BT, entropy_BT, router = token_logprobs(params, model, micro.tokens, micro.segment_ids)
        live_BT = micro.weights > 0
        cross_entropy = -jnp.sum(jnp.where(live_BT, micro.weights * logprobs_BT, 0.0))
        objective = cross_entropy + balance_coefficient * router["balance_loss"] / parts
        entropy = jnp.sum(jnp.where(live_BT, micro.weights * entropy_BT, 0.0))
        return objective, {
            "loss": cross_entropy,
            "entropy": entropy,
            "balance_loss": router["balance_loss"] / parts,
            "largest_expert_load": router["expert_load"].max() / parts,
        }

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(None, DATA)), out_specs=P(), check_vma=False)
    def summed_gradients(params: Params, batch: TokenBatch):
        def add_micro_batch(grads, micro):
            new, metrics = jax.grad(objective, has_aux=True)(params, micro, batch.tokens.shape[0] * mesh.size)
            return jax.tree.map(jnp.add, grads, new), metrics

        grads, metrics_M = jax.lax.scan(add_micro_batch, jax.tree.map(jnp.zeros_like, params), batch)
        return jax.lax.psum((grads, jax.tree.map(lambda x: x.sum(axis=0), metrics_M)), DATA)

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: TokenBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = summed_gradients(state.params, batch)
        state, norms = apply_gradients(state, grads, optimizer, live=(batch.weights > 0).any())
        return state, {**metrics, **norms}

    return update
