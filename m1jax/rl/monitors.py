"""The metrics of one generation batch under the names that people read. Pure functions, NumPy on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m1jax.rl.diagnostics import GRADIENT_DECADES, PROBABILITIES
from m1jax.train.router import router_metrics
from m1jax.types import ENDINGS, Prompt, Rollout


def rollout_metrics(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Sequence[Rollout]],
    rewards_PR: np.ndarray,
    correct_PR: np.ndarray,
) -> dict[str, float]:
    """Reward, accuracy by task, entropy, lengths by ending and outcome, shares of endings.

    Over all prompts that were asked. A NaN among the rewards is a response without one; it counts in everything but
    the mean reward.
    """
    flat = [r for group in rollouts for r in group]
    lengths = np.array([len(r.token_ids) for r in flat])
    surprisals = -np.concatenate([r.rollout_logprobs for r in flat])
    metrics = {
        "reward/mean": float(np.nanmean(rewards_PR)) if (rewards_PR == rewards_PR).any() else 0.0,
        "reward/accuracy": float(correct_PR.mean()),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_p99": float(np.percentile(lengths, 99)),
        "rollout/tokens": int(lengths.sum()),
        # -log p of what was sampled: unbiased for the entropy, over all responses, groups that leave the batch too.
        "rollout/entropy": float(surprisals.mean()),
        "rollout/perplexity": float(np.exp(surprisals.mean())),
    }
    for task in dict.fromkeys(p.problem.task for p in prompts):
        mine = np.array([p.problem.task == task for p in prompts])
        metrics[f"reward/accuracy/{task}"] = float(correct_PR[mine].mean())
    for outcome, mine in (("correct", correct_PR.ravel() >= 1), ("incorrect", correct_PR.ravel() < 1)):
        if mine.any():
            metrics[f"rollout/length_{outcome}"] = float(lengths[mine].mean())
    for ending in ENDINGS:
        mine = np.array([r.ending == ending for r in flat])
        metrics[f"rollout/share_{ending}"] = float(mine.mean())
        if mine.any():
            metrics[f"rollout/length_{ending}"] = float(lengths[mine].mean())
    return metrics


def update_metrics(device: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of `m1jax.rl.update` [updates] to the scalars of a step; updates without a live token do not count.

    Of the first update come the numbers that compare trainer and engine (no update lies between them); of the last
    ones and of all of them those that tell how far the policy has moved from the behaviour policy.
    """
    applied = np.flatnonzero(np.asarray(device["tokens"]) > 0)
    if not applied.size:
        return {"train/updates_applied": 0}
    values = {name: np.asarray(x, np.float64)[applied] for name, x in device.items() if name != "router"}
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
    names = _bin_names()
    for what in ("capped", "dropped"):
        counts, of = (values[f"{n}_by_probability"].sum(axis=0) for n in (what, "tokens"))
        shares = counts / np.maximum(of, 1)
        metrics |= {f"ratio/{what}_share_{name}": x for name, x, n in zip(names, shares, of, strict=True) if n}
    if later.size:
        metrics["ratio/abs_log_later_updates"] = later.mean()
        if rare := values["tokens_by_probability"][1:, 0].sum():
            metrics["rare/gradient_share_later_updates"] = 1 - values["dropped_by_probability"][1:, 0].sum() / rare
        if np.isfinite(cosines := values["gradient_cosine"][1:]).any():
            metrics["gradient/cosine_consecutive"] = np.nanmean(cosines)
    if "kl" in values:
        metrics["train/kl"] = values["kl"][-1]
    if "eps_dominated_share" in values:
        metrics["optimizer/eps_dominated_share"] = values["eps_dominated_share"][-1]
    metrics |= _router_metrics({name: np.asarray(x, np.float64)[applied] for name, x in device["router"].items()})
    counts = values["gradient_histogram"].mean(axis=0)
    for decade, count in zip(range(*GRADIENT_DECADES), counts / max(counts.sum(), 1), strict=True):
        metrics[f"gradient/log10_{decade}"] = count
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}


def _router_metrics(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over the updates of what the routers did, from their sums [updates, L, ...]."""
    if not sums:
        return {}
    by_update = [router_metrics({name: x[u] for name, x in sums.items()}) for u in range(len(sums["tokens"]))]
    metrics: dict[str, Any] = {name: np.mean([update[name] for update in by_update]) for name in by_update[0]}
    if "recorded" in sums:
        differs = sums["recorded_differs"].sum(axis=1) / np.maximum(sums["recorded"].sum(axis=1), 1)
        metrics["router/replay_differs"] = differs[0]
        if len(differs) > 1:
            metrics["router/replay_differs_later_updates"] = differs[1:].mean()
    return metrics


def _bin_names() -> list[str]:
    """`p_below_0.1`, `p_0.1_to_0.5`, `p_above_0.5`."""
    between = [f"p_{low:g}_to_{high:g}" for low, high in zip(PROBABILITIES, PROBABILITIES[1:], strict=False)]
    return [f"p_below_{PROBABILITIES[0]:g}", *between, f"p_above_{PROBABILITIES[-1]:g}"]
