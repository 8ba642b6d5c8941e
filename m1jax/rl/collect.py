"""One generation batch: prompts asked, responses judged, and which groups the updates are made of.

A group can teach where its verified rewards differ, whatever length and KL add to them. Without dynamic sampling there
is one round, and other groups leave the batch. With it, further prompts stand in for them until enough groups can
teach, or until `rollout.max_prompts` were asked: then the updates are made of what there is. Prompts beyond
the last one that is used are asked again in the next batch, with its weights, so none is lost; where batches are
asked ahead (`m1jax.rl.ahead`) their answers are kept for it instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m1jax.rl.advantage import group_advantages
from m1jax.rl.run import Run, Sampled
from m1jax.types import Prompt, Rollout


@dataclass(frozen=True)
class Generation:
    """P prompts that were asked, with R responses each.

    Attributes:
        prompts, rollouts: in order.
        rewards_PR: float64, after shaping; NaN where a response has none.
        correct_PR: 1 where the verifier gave full credit.
        reference: log-probabilities of the frozen reference by response, or None.
        used: bool [P], the groups that the updates are made of.
        again: indices of the prompts that the next batch asks again.
        metrics: of the reward stage and of the sampling.
    """

    prompts: list[Prompt]
    rollouts: list[list[Rollout]]
    rewards_PR: np.ndarray
    correct_PR: np.ndarray
    reference: list[list[np.ndarray]] | None
    used: np.ndarray
    again: list[int]
    metrics: dict[str, float]


def collect(run: Run) -> Generation:
    """Ask prompts until the batch is full."""
    rollout = run.config.rollout
    per_call = max(rollout.engine_rows // rollout.responses, 1)  # the engine fills a call up with dummies
    limit = rollout.max_prompts if rollout.dynamic_sampling else rollout.prompts
    rounds: list[Sampled] = []
    alive = np.zeros(0, bool)
    while len(alive) < limit and alive.sum() < rollout.prompts:
        missing = rollout.prompts - int(alive.sum())
        count = min(-(-missing // per_call) * per_call if rounds else missing, rollout.prompts, limit - len(alive))
        rounds.append(run.sample(count))
        _, live_PR = group_advantages(rounds[-1].scores.verified_PR)
        alive = np.append(alive, live_PR.any(axis=1))
        if not rollout.dynamic_sampling:
            break

    chosen = np.flatnonzero(alive)[: rollout.prompts]
    full = rollout.dynamic_sampling and len(chosen) == rollout.prompts
    if rollout.dynamic_sampling and not full:
        run.log(
            f"warning: {len(chosen)} of {len(alive)} groups have variance, {rollout.prompts} were wanted; step "
            f"{run.step + 1} goes on with these (config.rollout.max_prompts {rollout.max_prompts})"
        )
    join = lambda name: np.concatenate([getattr(r.scores, name) for r in rounds])  # noqa: E731
    weights = [len(r.prompts) / len(alive) for r in rounds]
    metrics = {
        k: sum(w * r.scores.metrics[k] for w, r in zip(weights, rounds, strict=True)) for k in rounds[0].scores.metrics
    }
    metrics["reward/zero_variance_share"] = float(1 - alive.mean())
    if rollout.dynamic_sampling:
        metrics |= {
            "sampling/prompts_asked": len(alive),
            "sampling/acceptance": float(alive.mean()),
            "sampling/groups_short": rollout.prompts - len(chosen),
        }
    prompts = [p for r in rounds for p in r.prompts]
    consumed = int(chosen[-1]) + 1 if full else len(alive)
    return Generation(
        prompts=prompts,
        rollouts=[g for r in rounds for g in r.rollouts],
        rewards_PR=join("rewards_PR"),
        correct_PR=join("correct_PR"),
        reference=None if rounds[0].reference is None else [g for r in rounds for g in r.reference or ()],
        used=np.isin(np.arange(len(alive)), chosen),
        again=[p.index for p in prompts[consumed:]],
        metrics=metrics,
    )
