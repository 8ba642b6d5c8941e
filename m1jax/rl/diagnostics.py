"""What an update tells of itself: scalars of its tokens, its gradient and its optimizer. Pure functions, on the device.

All of them look at what the update has computed anyway: arrays of tokens, and of large parameter arrays a sample.
`m1jax.rl.monitors` turns them into the metrics of a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from m1jax.mesh import flat
from m1jax.rl.loss import LossConfig, LossInput, importance_ratio, kept, kl_terms
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.state import TrainState
from m1jax.types import Batch, Params

GRADIENT_DECADES = (-20, 1)
"""Range of the log10-gradient histogram; smaller and larger magnitudes fall into its first and last bin."""

GRADIENT_SAMPLE = 2**14
"""Entries of one parameter array that are looked at: a share is known to 0.004."""

PROBABILITIES = (0.1, 0.5)
"""Bounds of the bins by behaviour probability: rare tokens (the forks of MiniMax-M1, section 3.1), unsure and sure
ones."""

Entries = tuple[jax.Array, jax.Array]
"""Values [N] of some entries of a parameter tree, and how many entries each stands for [N]."""


def token_metrics(batch: Batch, x: LossInput, entropy: jax.Array, loss: LossConfig) -> dict[str, jax.Array]:
    """Scalars of one update over its live tokens; the policy is the one before the update's own step.

    E1 of the paper: `probability_correlation` is Pearson's between exp(policy) and exp(rollout) log-probabilities,
    `largest_logprob_gap` the largest |difference|; both measure trainer against engine where no update came between.
    The arrays `tokens_by_probability`, `capped_by_probability` and `dropped_by_probability` count tokens in the bins
    of PROBABILITIES.
    """
    live, policy, anchors = batch.weights > 0, x.policy_logprobs, x.anchor_logprobs
    count = jnp.maximum(live.sum(), 1)
    mean = lambda x: jnp.sum(jnp.where(live, x, 0.0)) / count  # noqa: E731
    share = lambda x: jnp.sum(x & live) / count  # noqa: E731
    ratio = importance_ratio(policy, anchors, live)
    capped, dropped = live & (ratio > loss.cap), live & ~kept(x, loss)
    p, q = (jnp.where(live, jnp.exp(jnp.where(live, x, 0.0)), 0.0) for x in (policy, batch.rollout_logprobs))
    bins = jnp.searchsorted(jnp.array(PROBABILITIES, q.dtype), q, side="right")
    by_probability = lambda x: jnp.stack([jnp.sum(x & (bins == b)) for b in range(len(PROBABILITIES) + 1)])  # noqa: E731
    p, q = jnp.where(live, p - mean(p), 0.0), jnp.where(live, q - mean(q), 0.0)
    covariance, deviation = jnp.sum(p * q), jnp.sqrt(jnp.sum(p * p) * jnp.sum(q * q))
    gap = jnp.where(live, jnp.abs(policy - batch.rollout_logprobs), 0.0)
    reference = {}
    if x.reference_logprobs is not None:
        reference["kl"] = mean(kl_terms(x.logprobs, jnp.where(live, x.reference_logprobs, 0.0), "k3"))
    return reference | {
        "tokens": live.sum(),
        "entropy": mean(entropy),
        "abs_log_ratio": mean(jnp.abs(policy - anchors)),
        "largest_abs_log_ratio": jnp.where(live, jnp.abs(policy - anchors), 0.0).max(),
        "ratio_mean": mean(ratio),
        "ratio_capped_mean": mean(jnp.clip(ratio, loss.weight_floor, loss.cap)),
        "ratio_largest": jnp.where(live, ratio, 0.0).max(),
        "capped_share_positive": share(capped & (batch.advantages > 0)),
        "capped_share_negative": share(capped & (batch.advantages < 0)),
        "dropped_share_positive": share(dropped & (batch.advantages > 0)),
        "dropped_share_negative": share(dropped & (batch.advantages < 0)),
        "tokens_by_probability": by_probability(live),
        "capped_by_probability": by_probability(capped),
        "dropped_by_probability": by_probability(dropped),
        "probability_correlation": jnp.where(deviation > 0, covariance / jnp.maximum(deviation, 1e-30), 1.0),
        "largest_logprob_gap": gap.max(),
    }


def replay_differences(
    own_LMA: jax.Array, expert_ids_BTLA: jax.Array, segment_ids_BT: jax.Array
) -> dict[str, jax.Array]:
    """Recorded choices (token, slot) of live tokens in each layer, and those that are not among the trainer's own.

    int32 [L] each, sums as those of `routing_sums` in `m1jax.pallas_kernels.moe.router`.
    """
    recorded_LMA = jnp.moveaxis(expert_ids_BTLA.reshape(-1, *expert_ids_BTLA.shape[2:]), 1, 0).astype(jnp.int32)
    known_LMA = (recorded_LMA >= 0) & (segment_ids_BT.reshape(1, -1, 1) > 0)
    agrees_LMA = (recorded_LMA[..., :, None] == own_LMA[..., None, :]).any(axis=-1)
    count = lambda which: jnp.sum(which, axis=(1, 2), dtype=jnp.int32)  # noqa: E731
    return {"recorded": count(known_LMA), "recorded_differs": count(known_LMA & ~agrees_LMA)}


def sample_entries(tree: Params, specs: Any = None) -> Entries:
    """float32: all entries of small arrays, GRADIENT_SAMPLE of a large one at places that are drawn once, for ever.

    Inside `jax.shard_map`, with the PartitionSpecs of the tree, the same places of the whole arrays: every device gives
    the entries that it has.
    """
    values, stands_for = [], []
    for x, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs) or itertools.repeat(P())):  # noqa: B905
        axes = (*spec, *(None,) * (x.ndim - len(spec)))
        devices = [math.prod(map(jax.lax.axis_size, flat(entry))) for entry in axes]
        axes = [entry if d > 1 else None for entry, d in zip(axes, devices, strict=True)]
        shape = [n * d for n, d in zip(x.shape, devices, strict=True)]
        size, draw = math.prod(shape), np.random.default_rng(0)
        if size > GRADIENT_SAMPLE:
            places = [draw.integers(0, n, GRADIENT_SAMPLE) for n in shape]  # by axis: no index overflows
            taken = _entries(x, places, axes)
        elif any(axes):
            taken = _entries(x, np.unravel_index(np.arange(size), shape), axes)
        else:
            taken = x.reshape(-1)  # gathers of small arrays were a sixth of an update's program
        values.append(taken.astype(jnp.float32))
        stands_for.append(np.full(taken.size, size / taken.size, np.float32))
    return jnp.concatenate(values), jnp.asarray(np.concatenate(stands_for))


def _entries(x: jax.Array, places: Sequence[np.ndarray], axes: Sequence[Any]) -> jax.Array:
    """Entries of an array of which this device has a part along some mesh axes."""
    here, elsewhere = [], False
    for place, n, entry in zip(places, x.shape, axes, strict=True):
        own = place - (jax.lax.axis_index(entry) * n if entry else 0)
        elsewhere |= (own < 0) | (own >= n)
        here.append(own)
    if not any(axes):
        return x[tuple(here)]
    taken = x.at[tuple(here)].get(mode="clip")
    return jax.lax.psum(jnp.where(elsewhere, 0, taken), tuple(axis for entry in axes for axis in flat(entry)))


def gradient_magnitudes(gradient: Entries) -> dict[str, jax.Array]:
    """E2 of the paper: histogram of log10 |gradient| (counts per decade) and the share below 1e-14.

    Exact zeros (experts that got no token, ids that did not occur) are counted apart. To look at every entry of a
    large array took a quarter of an update.
    """
    low, high = GRADIENT_DECADES
    magnitudes, stands_for = jnp.abs(gradient[0]), gradient[1]
    count = lambda which: jnp.sum(jnp.where(which, stands_for, 0.0))  # noqa: E731
    zero = magnitudes == 0
    decade = jnp.clip(jnp.floor(jnp.log10(jnp.where(zero, 1.0, magnitudes))), low, high - 1).astype(jnp.int32) - low
    nonzero = jnp.maximum(count(~zero), 1)
    return {
        "gradient_histogram": jnp.stack([count((decade == d) & ~zero) for d in range(high - low)]),
        "gradient_share_below_1e-14": count((magnitudes < 1e-14) & ~zero) / nonzero,
        "gradient_share_zero": count(zero) / stands_for.sum(),
    }


def cosine(one: Entries, other: Entries) -> jax.Array:
    """E2 of the paper: cosine of two gradients, estimated on their sample; NaN where one is zero."""
    (x, weights), (y, _) = one, other
    # Each scaled to its largest entry first: squares of 1e-23 would be zero in float32.
    x, y = (v / jnp.maximum(jnp.abs(v).max(), 1e-37) for v in (x, y))
    dot = lambda a, b: jnp.sum(weights * a * b)  # noqa: E731
    return dot(x, y) / jnp.sqrt(dot(x, x) * dot(y, y))


def eps_dominated_share(
    state: TrainState, adam: OptimizerConfig, sampled: Callable[[Params], Entries] = sample_entries
) -> jax.Array:
    """E2 of the paper: share of AdamW's denominators sqrt(v) + eps in which eps is the larger part.

    After the update, v corrected for its start at zero; entries that never had a gradient are left out, by the first
    moment: v underflows for gradients below 1e-19.
    """
    v, stands_for = sampled(optax.tree.get(state.opt_state, "nu"))
    seen = jnp.where(sampled(optax.tree.get(state.opt_state, "mu"))[0] != 0, stands_for, 0.0)
    corrected = v / (1 - adam.b2 ** jnp.maximum(state.updates, 1).astype(jnp.float32))
    return jnp.sum(jnp.where(jnp.sqrt(corrected) < adam.eps, seen, 0.0)) / jnp.maximum(seen.sum(), 1)
