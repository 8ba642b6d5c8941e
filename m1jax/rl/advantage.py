"""Rewards to advantages: each response against the others of its own group. NumPy, float64, no model."""

from __future__ import annotations

import numpy as np

STD_FLOOR = 1e-6
"""A group whose rewards differ by less than this in standard deviation carries no signal. Compared with a floor, not
with zero: equal float rewards need not give an exact zero."""


def group_advantages(
    rewards_PR: np.ndarray, scale: str = "group_std", std: str = "population", used_P: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(reward - group mean) / standard deviation.

    Args:
        rewards_PR: R rewards for each of P prompts. NaN is a response without a reward: it leaves its group.
        scale: "group_std" divides by the group's standard deviation (GRPO, DAPO, CISPO); "batch_std" by that of all
            live responses around their groups' means (ScaleRL); "none" by nothing (Dr. GRPO).
        used_P: bool, groups that the batch is made of; None is all of them.
        std: "population" divides the squares by their count, "sample" by count - 1: 6.9% more at R = 8.

    Returns:
        advantages_PR, float64, 0 where not live, and live_PR: False where the group has no variance or the response
        no reward. What is not live leaves the batch and its token counts.

    Raises:
        ValueError: a reward is infinite.
    """
    rewards_PR = np.asarray(rewards_PR, np.float64)
    if np.isinf(rewards_PR).any():
        p, r = np.argwhere(np.isinf(rewards_PR))[0]
        raise ValueError(f"rewards[{p}, {r}] is {rewards_PR[p, r]}: a reward must be finite, or NaN for none")
    given_PR, less = ~np.isnan(rewards_PR), int(std == "sample")
    count_P = given_PR.sum(axis=1)
    mean_P = np.where(given_PR, rewards_PR, 0).sum(axis=1) / np.maximum(count_P, 1)
    centred_PR = np.where(given_PR, rewards_PR - mean_P[:, None], 0)
    squares_P = (centred_PR**2).sum(axis=1)
    std_P = np.sqrt(squares_P / np.maximum(count_P - less, 1))
    live_P = np.sqrt(squares_P / np.maximum(count_P, 1)) > STD_FLOOR
    if used_P is not None:
        live_P &= used_P
    live_PR = given_PR & live_P[:, None]
    if scale == "batch_std":
        std_P = np.sqrt(squares_P[live_P].sum() / max(count_P[live_P].sum() - less, 1))
    elif scale == "none":
        std_P = np.ones(1)
    advantages_PR = centred_PR / np.maximum(np.broadcast_to(std_P, live_P.shape), STD_FLOOR)[:, None]
    return np.where(live_PR, advantages_PR, 0.0), live_PR
