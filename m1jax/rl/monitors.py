"""The metrics of one generation batch under the names that people read. Pure functions, NumPy on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from m1jax.rl.update import GRADIENT_DECADES
from m1jax.types import ENDINGS, Prompt, Rollout


def rollout_metrics(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Sequence[Rollout]],
    rewards_PR: np.ndarray,
    correct_PR: np.ndarray,
    live_PR: np.ndarray,
) -> dict[str, float]:
    """Reward, accuracy by task, entropy, length by ending, shares of endings and of groups without variance."""
    flat = [r for group in rollouts for r in group]
    lengths = np.array([len(r.token_ids) for r in flat])
    surprisals = -np.concatenate([r.rollout_logprobs for r in flat])
    metrics = {
        "reward/mean": float(rewards_PR.mean()),
        "reward/accuracy": float(correct_PR.mean()),
        "reward/zero_variance_share": float(1 - live_PR.any(axis=1).mean()),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_p99": float(np.percentile(lengths, 99)),
        "rollout/tokens": int(lengths.sum()),
        # -log p of what was sampled: unbiased for the entropy, over all responses, groups that leave the batch too.
        "rollout/entropy": float(surprisals.mean()),
    }
    for task in dict.fromkeys(p.problem.task for p in prompts):
        mine = np.array([p.problem.task == task for p in prompts])
        metrics[f"reward/accuracy/{task}"] = float(correct_PR[mine].mean())
    for ending in ENDINGS:
        mine = np.array([r.ending == ending for r in flat])
        metrics[f"rollout/share_{ending}"] = float(mine.mean())
        if mine.any():
            metrics[f"rollout/length_{ending}"] = float(lengths[mine].mean())
    return metrics


def update_metrics(device: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Metrics of `m1jax.rl.update` [updates] to the scalars of a step; updates without a live token do not count.

    Of the first update come the numbers that compare trainer and engine (no update lies between them); of the last
    ones and of all of them those that tell how far the policy has moved from the behaviour policy.
    """
    applied = np.flatnonzero(np.asarray(device["tokens"]) > 0)
    if not applied.size:
        return {"train/updates_applied": 0}
    values = {name: np.asarray(x, np.float64)[applied] for name, x in device.items()}
    first, mean, largest = (lambda n: values[n][0]), (lambda n: values[n].mean()), (lambda n: values[n].max())
    later = values["abs_log_ratio"][1:]
    metrics = {
        "train/updates_applied": int(applied.size),
        "train/tokens": int(values["tokens"].sum()),
        "train/loss": mean("loss"),
        "train/grad_norm": mean("grad_norm"),
        "train/grad_norm_largest": largest("grad_norm"),
        "train/update_norm": mean("update_norm"),
        "train/param_norm": values["param_norm"][-1],
        "train/entropy": first("entropy"),
        "mismatch/probability_correlation": first("probability_correlation"),
        "mismatch/largest_logprob_gap": first("largest_logprob_gap"),
        "ratio/abs_log_first_update": first("abs_log_ratio"),
        "ratio/abs_log_largest_first_update": first("largest_abs_log_ratio"),
        "ratio/mean": mean("ratio_mean"),
        "ratio/capped_mean": mean("ratio_capped_mean"),
        "ratio/largest": largest("ratio_largest"),
        "ratio/capped_share_positive": mean("capped_share_positive"),
        "ratio/capped_share_negative": mean("capped_share_negative"),
        "ratio/dropped_share_positive": mean("dropped_share_positive"),
        "ratio/dropped_share_negative": mean("dropped_share_negative"),
        "gradient/share_below_1e-14": mean("gradient_share_below_1e-14"),
        "gradient/share_zero": mean("gradient_share_zero"),
    }
    if later.size:
        metrics["ratio/abs_log_later_updates"] = later.mean()
    counts = values["gradient_histogram"].mean(axis=0)
    for decade, count in zip(range(*GRADIENT_DECADES), counts / max(counts.sum(), 1), strict=True):
        metrics[f"gradient/log10_{decade}"] = count
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
