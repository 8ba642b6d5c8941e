"""One supervised update: next-token cross entropy on packed rows, for SFT and pre-training alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from m1jax.mesh import ROWS, TOKENS
from m1jax.model import transformer
from m1jax.model.config import ModelConfig
from m1jax.model.logprobs import token_logprobs
from m1jax.sharding import BATCH, no_gradients, on_mesh, placed, replicated, sum_gradients
from m1jax.train.router import RouterConfig, auxiliary_loss
from m1jax.train.state import TrainState, apply_gradients, state_specs
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
    model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, router: RouterConfig
) -> Callable[[TrainState, TokenBatch], tuple[TrainState, dict[str, Any]]]:
    """The update of a run, jitted, with the state donated.

    Loss = -sum(weights * logprobs) + the auxiliary losses of the routers. The metrics are scalars, and as "router" the
    sums that `m1jax.train.router` reads.
    """
    model, specs = on_mesh(model, mesh), transformer.parameter_specs(model)

    def objective(params: Params, micro: TokenBatch, tokens: jax.Array):
        logprobs_BT, entropy_BT, routed = token_logprobs(params, model, micro.tokens, micro.segment_ids)
        routed.pop("expert_ids", None)
        live_BT = micro.weights > 0
        cross_entropy = -jnp.sum(jnp.where(live_BT, micro.weights * logprobs_BT, 0.0))
        # Devices with the same rows compute the same value: each counts for its share (m1jax.model.collectives).
        shared = cross_entropy / model.mesh.along(("context", "tensor"))
        shared += auxiliary_loss(routed, router, tokens) / model.mesh.tensor
        entropy = jnp.sum(jnp.where(live_BT, micro.weights * entropy_BT, 0.0))
        return shared, ({"loss": cross_entropy, "entropy": entropy}, {"router": routed})

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, BATCH), out_specs=(specs, P()), check_vma=False)
    def summed_gradients(params: Params, batch: TokenBatch):
        tokens = jax.lax.psum((batch.segment_ids > 0).sum(), ROWS)

        def add_micro_batch(grads, micro):
            new, sums = jax.grad(objective, has_aux=True)(params, micro, tokens)
            return jax.tree.map(jnp.add, grads, new), sums

        grads, sums_M = jax.lax.scan(add_micro_batch, no_gradients(params), batch)
        of_rows, of_tokens = jax.tree.map(lambda x: x.sum(axis=0), sums_M)
        return sum_gradients(grads, specs), jax.lax.psum(of_rows, ROWS) | jax.lax.psum(of_tokens, TOKENS)

    @partial(jax.jit, donate_argnums=0, out_shardings=(placed(mesh, state_specs(model, optimizer)), replicated(mesh)))
    def update(state: TrainState, batch: TokenBatch) -> tuple[TrainState, dict[str, Any]]:
        grads, metrics = summed_gradients(state.params, batch)
        state, norms = apply_gradients(state, grads, optimizer, live=(batch.weights > 0).any())
        return state, {**metrics, **norms}

    return update
