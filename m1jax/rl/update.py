"""All updates of one generation batch in one jitted call: `state, batch -> state, metrics`.

    for each pass, for each of the U updates:
        sum the gradients of its M micro-batches (empty ones are skipped, not computed)
        clip, AdamW; an update without a live token changes nothing

The anchor of the importance ratio is frozen before the first update. The loss is a plain sum over tokens, so the cut
into micro-batches changes no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from m1jax.model.config import ModelConfig
from m1jax.model.logprobs import token_logprobs
from m1jax.rl.loss import LossConfig, LossInput, importance_ratio, kept, mismatch_weight, policy_loss
from m1jax.sharding import DATA
from m1jax.train.state import TrainState, apply_gradients
from m1jax.types import Batch, Params

REPLICATED, ROWS = PartitionSpec(), PartitionSpec(None, DATA)
"""Parameters lie whole on every device; a micro-batch's rows (axis 1 of [M, B, T]) are dealt out."""

GRADIENT_DECADES = (-20, 1)
"""Range of the log10-gradient histogram; smaller and larger magnitudes fall into its first and last bin."""

GRADIENT_SAMPLE = 2**14
"""Entries of one parameter array that the histogram looks at: a share is known to 0.004."""


def make_update(
    model: ModelConfig,
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    temperature: float,
    passes: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The update function of a run, jitted, with the state donated.

    Metrics come back as arrays over the updates [passes * U] (see `_update_metrics`), the histogram with one more axis.
    """
    logprobs = partial(_batch_logprobs, model=model, temperature=temperature)

    @partial(
        jax.shard_map, mesh=mesh, check_vma=False,
        in_specs=(REPLICATED, ROWS, ROWS), out_specs=(REPLICATED, REPLICATED, ROWS, ROWS),
    )  # fmt: skip
    def summed_gradients(params: Params, micro_batches: Batch, anchors: jax.Array):
        """Over all micro-batches and devices: gradients, loss; and per token policy log-probs and entropies."""

        def add_micro_batch(grads, micro):
            batch, anchor_BT = micro
            return skip_if_empty(batch, partial(accumulate, params, grads, anchor_BT), grads)

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, (values_M, policy_MBT, entropy_MBT) = jax.lax.scan(add_micro_batch, zeros, (micro_batches, anchors))
        grads, value = jax.lax.psum((grads, values_M.sum()), DATA)
        return grads, value, policy_MBT, entropy_MBT

    def accumulate(params, grads, anchor_BT, batch):
        (value, (policy_BT, entropy_BT)), new = jax.value_and_grad(objective, has_aux=True)(params, batch, anchor_BT)
        return jax.tree.map(jnp.add, grads, new), (value, policy_BT, entropy_BT)

    def objective(params, batch, anchor_BT):
        policy_BT, entropy_BT = logprobs(params, batch)
        return policy_loss(loss_input(batch, anchor_BT, policy_BT), loss), (policy_BT, entropy_BT)

    def loss_input(batch, anchor_BT, policy_BT):
        weights_BT = batch.weights
        if loss.mismatch_cap is not None:  # the anchor is the trainer's
            live_BT = weights_BT > 0
            weights_BT = weights_BT * mismatch_weight(anchor_BT, batch.rollout_logprobs, live_BT, loss.mismatch_cap)
        return LossInput(policy_BT, anchor_BT, batch.advantages, weights_BT, batch.group_ids)

    def one_update(state: TrainState, mini: tuple[Batch, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        micro_batches, anchors = mini
        grads, value, policy_MBT, entropy_MBT = summed_gradients(state.params, micro_batches, anchors)
        state, norms = apply_gradients(state, grads, optimizer, live=(micro_batches.weights > 0).any())
        metrics = _update_metrics(micro_batches, loss_input(micro_batches, anchors, policy_MBT), entropy_MBT, loss)
        return state, {"loss": value, **norms, **metrics, **gradient_magnitudes(grads)}

    @partial(jax.shard_map, mesh=mesh, check_vma=False, in_specs=(REPLICATED, ROWS), out_specs=ROWS)
    def trainer_anchors(params: Params, micro_batches: Batch) -> jax.Array:
        compute = lambda batch: (None, logprobs(params, batch)[0])  # noqa: E731
        return jax.lax.map(lambda batch: skip_if_empty(batch, compute, None)[1], micro_batches)

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        anchors = batch.rollout_logprobs
        if loss.ratio_anchor == "trainer":
            anchors = jax.lax.map(partial(trainer_anchors, state.params), batch)
        one_pass = lambda state, _: jax.lax.scan(one_update, state, (batch, anchors))  # noqa: E731
        state, metrics = jax.lax.scan(one_pass, state, length=passes)
        return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), metrics)

    return update


def skip_if_empty(batch: Batch, compute: Callable[[Batch], Any], otherwise: Any) -> Any:
    """compute(batch), or (otherwise, zeros) without any work where the micro-batch has no live token."""
    _, outputs = jax.eval_shape(compute, batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
    return jax.lax.cond((batch.weights > 0).any(), compute, lambda _: (otherwise, zeros), batch)


def _batch_logprobs(params: Params, batch: Batch, *, model: ModelConfig, temperature: float):
    policy_BT, entropy_BT, _ = token_logprobs(params, model, batch.tokens, batch.segment_ids, temperature)
    return policy_BT, entropy_BT


def _update_metrics(batch: Batch, x: LossInput, entropy: jax.Array, loss: LossConfig) -> dict[str, jax.Array]:
    """Scalars of one update over its live tokens; `policy` is before the update's own step.

    E1 of the paper: `probability_correlation` is Pearson's between exp(policy) and exp(rollout) log-probabilities,
    `largest_logprob_gap` the largest |difference|; both measure trainer against engine where no update came between.
    """
    live, policy, anchors = batch.weights > 0, x.policy_logprobs, x.anchor_logprobs
    count = jnp.maximum(live.sum(), 1)
    mean = lambda x: jnp.sum(jnp.where(live, x, 0.0)) / count  # noqa: E731
    share = lambda x: jnp.sum(x & live) / count  # noqa: E731
    ratio, dropped = importance_ratio(policy, anchors, live), ~kept(x, loss)
    p, q = (jnp.where(live, jnp.exp(jnp.where(live, x, 0.0)), 0.0) for x in (policy, batch.rollout_logprobs))
    p, q = jnp.where(live, p - mean(p), 0.0), jnp.where(live, q - mean(q), 0.0)
    covariance, deviation = jnp.sum(p * q), jnp.sqrt(jnp.sum(p * p) * jnp.sum(q * q))
    gap = jnp.where(live, jnp.abs(policy - batch.rollout_logprobs), 0.0)
    return {
        "tokens": live.sum(),
        "entropy": mean(entropy),
        "abs_log_ratio": mean(jnp.abs(policy - anchors)),
        "largest_abs_log_ratio": jnp.where(live, jnp.abs(policy - anchors), 0.0).max(),
        "ratio_mean": mean(ratio),
        "ratio_capped_mean": mean(jnp.clip(ratio, loss.weight_floor, loss.cap)),
        "ratio_largest": jnp.where(live, ratio, 0.0).max(),
        "capped_share_positive": share((ratio > loss.cap) & (batch.advantages > 0)),
        "capped_share_negative": share((ratio > loss.cap) & (batch.advantages < 0)),
        "dropped_share_positive": share(dropped & (batch.advantages > 0)),
        "dropped_share_negative": share(dropped & (batch.advantages < 0)),
        "probability_correlation": jnp.where(deviation > 0, covariance / jnp.maximum(deviation, 1e-30), 1.0),
        "largest_logprob_gap": gap.max(),
    }


def gradient_magnitudes(grads: Params) -> dict[str, jax.Array]:
    """E2 of the paper: histogram of log10 |gradient| (counts per decade) and the share below 1e-14.

    Exact zeros (experts that got no token, ids that did not occur) are counted apart. Of a large array a fixed random
    sample stands for all its entries: to look at every one took a quarter of an update.
    """
    low, high = GRADIENT_DECADES
    samples = [_sample(g) for g in jax.tree.leaves(grads)]
    magnitudes = jnp.concatenate([jnp.abs(x).astype(jnp.float32) for x, _ in samples])
    stands_for = jnp.concatenate([jnp.full(x.shape, entries, jnp.float32) for x, entries in samples])
    count = lambda which: jnp.sum(jnp.where(which, stands_for, 0.0))  # noqa: E731
    zero = magnitudes == 0
    decade = jnp.clip(jnp.floor(jnp.log10(jnp.where(zero, 1.0, magnitudes))), low, high - 1).astype(jnp.int32) - low
    nonzero = jnp.maximum(count(~zero), 1)
    return {
        "gradient_histogram": jnp.stack([count((decade == d) & ~zero) for d in range(high - low)]),
        "gradient_share_below_1e-14": count((magnitudes < 1e-14) & ~zero) / nonzero,
        "gradient_share_zero": count(zero) / stands_for.sum(),
    }


def _sample(g: jax.Array) -> tuple[jax.Array, float]:
    """Entries of `g`, all of them or GRADIENT_SAMPLE at places drawn once, and how many entries each stands for."""
    if g.size <= GRADIENT_SAMPLE:
        return g.reshape(-1), 1.0
    draw = np.random.default_rng(0)
    places = tuple(draw.integers(0, n, GRADIENT_SAMPLE) for n in g.shape)  # by axis: no index overflows
    return g[places], g.size / GRADIENT_SAMPLE
