"""Rewards to advantages: each response against the others of its own group. NumPy, float64, no model."""

from __future__ import annotations

import numpy as np

STD_FLOOR = 1e-6
"""A group whose rewards differ by less than this in standard deviation carries no signal. Compared with a floor, not
with zero: equal float rewards need not give an exact zero."""


def group_advantages(rewards_PR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(reward - group mean) / group standard deviation.

    The standard deviation is the population one (divided by R, not R - 1, which is 6.9% smaller at R = 8).

    Args:
        rewards_PR: R rewards for each of P prompts.

    Returns:
        advantages_PR, float64, 0 where the group has no variance, and live_P, False for those groups: they leave the
        batch and its token counts.

    Raises:
        ValueError: a reward is not finite.
    """
    rewards_PR = np.asarray(rewards_PR, np.float64)
    if not np.isfinite(rewards_PR).all():
        p, r = np.argwhere(~np.isfinite(rewards_PR))[0]
        raise ValueError(f"rewards[{p}, {r}] is {rewards_PR[p, r]}: a reward must be finite")
    centred_PR = rewards_PR - rewards_PR.mean(axis=1, keepdims=True)
    std_P = np.sqrt((centred_PR**2).mean(axis=1))
    live_P = std_P > STD_FLOOR
    advantages_PR = np.where(live_P[:, None], centred_PR / np.maximum(std_P, STD_FLOOR)[:, None], 0.0)
    return advantages_PR, live_P
