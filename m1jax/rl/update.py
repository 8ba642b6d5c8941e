"""All updates of one generation batch in one jitted call: `state, batch -> state, metrics`.

    for each pass, for each of the U updates:
        sum the gradients of its M micro-batches (empty ones are skipped, not computed)
        clip, AdamW; an update without a live token changes nothing

The anchor of the importance ratio is frozen before the first update. The loss is a plain sum over tokens, so the cut
into micro-batches changes no gradient; that of the balance loss is one sum for each micro-batch, over all its devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from m1jax.mesh import ROWS, TOKENS
from m1jax.model import transformer
from m1jax.model.collectives import own_part
from m1jax.model.config import ModelConfig
from m1jax.model.logprobs import token_logprobs
from m1jax.rl.diagnostics import (
    cosine,
    eps_dominated_share,
    gradient_magnitudes,
    replay_differences,
    sample_entries,
    token_metrics,
)
from m1jax.rl.loss import LossConfig, LossInput, mismatch_weight, policy_loss
from m1jax.sharding import BATCH, no_gradients, on_mesh, placed, replicated, sum_gradients
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.router import NO_AUXILIARY_LOSS, RouterConfig, auxiliary_loss
from m1jax.train.state import TrainState, apply_gradients, state_specs
from m1jax.types import Batch, Params


def make_update(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    temperature: float,
    passes: int,
    adam: OptimizerConfig | None = None,
    router: RouterConfig = NO_AUXILIARY_LOSS,
    replay: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The update function of a run, jitted, with the state donated.

    Metrics come back as arrays over the updates [passes * U] (see `m1jax.rl.diagnostics`), histograms with one more
    axis, and as "router" the sums that `m1jax.train.router` reads. `adam` says what `optimizer` is, for the share of
    its denominators under eps. Where the batch holds the engine's experts they are compared with the trainer's own
    choice; with `replay` they also serve.

    The state is laid out as `m1jax.train.state.state_specs` says, and the rows of a micro-batch are dealt out
    (`m1jax.sharding.BATCH`). Whatever the mesh, loss and gradient are those of one device up to rounding.
    """
    model, specs = on_mesh(model, mesh), transformer.parameter_specs(model)
    sampled = jax.shard_map(
        partial(sample_entries, specs=specs), mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False
    )
    forward = partial(_forward, model=model, temperature=temperature, replay=replay)
    frozen_logprobs = make_frozen_logprobs(model, mesh, temperature=temperature, replay=replay)

    @partial(
        jax.shard_map, mesh=mesh, check_vma=False,
        in_specs=(specs, BATCH, BATCH), out_specs=(specs, P(), P(), BATCH, BATCH),
    )  # fmt: skip
    def summed_gradients(params: Params, micro_batches: Batch, anchors: jax.Array):
        """Over all micro-batches and devices: gradients, loss, routers; per token policy log-probs and entropies."""
        tokens = jax.lax.psum((micro_batches.segment_ids > 0).sum(), ROWS)

        def add_micro_batch(grads, micro):
            batch, anchor_BT = micro
            return skip_if_empty(batch, accumulate, grads, params, anchor_BT, tokens)

        batches = micro_batches, anchors
        grads, (sums_M, policy_MBT, entropy_MBT) = jax.lax.scan(add_micro_batch, no_gradients(params), batches)
        value, routed = jax.tree.map(lambda x: x.sum(axis=0), sums_M)
        value, routed = jax.lax.psum(value, ROWS), jax.lax.psum(routed, TOKENS)
        return sum_gradients(grads, specs), value, routed, policy_MBT, entropy_MBT

    @jax.jit
    def accumulate(batch, grads, params, anchor_BT, tokens):
        new, outputs = jax.grad(objective, has_aux=True)(params, batch, anchor_BT, tokens)
        return jax.tree.map(jnp.add, grads, new), outputs

    def objective(params, batch, anchor_BT, tokens):
        policy_BT, entropy_BT, routed = forward(params, batch)
        value = policy_loss(loss_input(batch, anchor_BT, policy_BT), loss)
        own_ids = routed.pop("expert_ids", None)  # a dense model has none
        if own_ids is not None and batch.expert_ids is not None:
            recorded, segment_ids = (
                own_part(x, "context", model.mesh, 1) for x in (batch.expert_ids, batch.segment_ids)
            )
            routed |= replay_differences(own_ids, recorded, segment_ids)
        # Devices with the same rows compute the same value: each counts for its share (m1jax.model.collectives).
        shared = value / model.mesh.along(("context", "tensor"))
        shared += auxiliary_loss(routed, router, tokens) / model.mesh.tensor
        return shared, ((value, routed), policy_BT, entropy_BT)

    def loss_input(batch, anchor_BT, policy_BT):
        weights_BT = batch.weights
        if loss.mismatch_cap is not None:  # the anchor is the trainer's
            live_BT = weights_BT > 0
            weights_BT = weights_BT * mismatch_weight(anchor_BT, batch.rollout_logprobs, live_BT, loss.mismatch_cap)
        return LossInput(policy_BT, anchor_BT, batch.advantages, weights_BT, batch.group_ids, batch.reference_logprobs)

    def one_update(carry, mini: tuple[Batch, jax.Array]):
        (state, previous), (micro_batches, anchors) = carry, mini
        grads, value, routed, policy_MBT, entropy_MBT = summed_gradients(state.params, micro_batches, anchors)
        live = (micro_batches.weights > 0).any()
        state, norms = apply_gradients(state, grads, optimizer, live)
        sample = sampled(grads)
        metrics = token_metrics(micro_batches, loss_input(micro_batches, anchors, policy_MBT), entropy_MBT, loss)
        metrics |= gradient_magnitudes(sample) | {"gradient_cosine": cosine(sample, previous)} | norms
        if adam is not None:
            metrics["eps_dominated_share"] = eps_dominated_share(state, adam, sampled)
        metrics |= {"loss": value, "router": routed}
        return (state, jax.tree.map(partial(jnp.where, live), sample, previous)), metrics

    laid_out = placed(mesh, state_specs(model, optimizer)), replicated(mesh)

    @partial(jax.jit, donate_argnums=0, out_shardings=laid_out)
    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        anchors = batch.rollout_logprobs
        if loss.ratio_anchor == "trainer":
            anchors = frozen_logprobs(state.params, batch)
        one_pass = lambda carry, _: jax.lax.scan(one_update, carry, (batch, anchors))  # noqa: E731
        nothing = jax.tree.map(jnp.zeros_like, sampled(state.params))  # before the first update
        (state, _), metrics = jax.lax.scan(one_pass, (state, nothing), length=passes)
        return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), metrics)

    return update


def make_frozen_logprobs(
    model: ModelConfig, mesh: Mesh, *, temperature: float, replay: bool = False
) -> Callable[[Params, Batch], jax.Array]:
    """`params, batch -> log-probabilities [U, M, B, T]` of its tokens without a gradient: trainer anchor, reference.

    With `replay` the experts that served in the engine serve here; the reference chooses its own.
    """
    model, specs = on_mesh(model, mesh), transformer.parameter_specs(model)
    forward = partial(_forward, model=model, temperature=temperature, replay=replay)

    @partial(jax.shard_map, mesh=mesh, check_vma=False, in_specs=(specs, BATCH), out_specs=BATCH)
    def of_update(params: Params, micro_batches: Batch) -> jax.Array:
        compute = jax.jit(lambda batch, _, params: (None, forward(params, batch)[0]))
        return jax.lax.map(lambda batch: skip_if_empty(batch, compute, None, params)[1], micro_batches)

    return jax.jit(lambda params, batch: jax.lax.map(partial(of_update, params), batch))


def skip_if_empty(batch: Batch, compute: Callable[..., Any], carried: Any, *more: Any) -> Any:
    """compute(batch, carried, *more), or (carried, zeros) without any work where no token is live on any device.

    `compute` comes out of `jax.jit`, so that it is traced once for its shapes and for itself.
    """
    operands = batch, carried, *more
    _, outputs = jax.eval_shape(compute, *operands)
    live = jax.lax.pmax((batch.weights > 0).any(), ROWS)  # the same everywhere: `compute` is full of messages

    def nothing(batch, carried, *more):
        return carried, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)

    return jax.lax.cond(live, compute, nothing, *operands)


def _forward(params: Params, batch: Batch, *, model: ModelConfig, temperature: float, replay: bool):
    expert_ids = batch.expert_ids if replay else None
    return token_logprobs(params, model, batch.tokens, batch.segment_ids, temperature, expert_ids)
