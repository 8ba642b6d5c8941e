"""Rewards after the verifiers: how a response ended, how long it grew, how far it went from the reference. NumPy.

    reward = verified reward                 by the policy of its ending: kept, wrong (0) or filtered (NaN: none)
             - overlong_penalty * overlong   0 up to window - buffer, then linear up to 1 at the window
             - kl_coefficient * sum_t k_t    with loss.kl_in="reward"

A filtered response leaves its group and the batch (`m1jax.rl.advantage`). Lengths are generated tokens, the stop token
included, the prompt not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m1jax.rl.loss import kl_terms
from m1jax.types import Rollout

ENDING_POLICIES = ("keep", "wrong", "filter")
"""The verifier's reward stands; it is 0, whatever the verifier says; or the response leaves the batch."""


def by_ending(rewards_N: np.ndarray, endings_N: Sequence[str], policies: dict[str, str]) -> np.ndarray:
    """Rewards after the policy of each response's ending; an ending without a policy keeps its reward."""
    policy_N = np.array([policies.get(ending, "keep") for ending in endings_N])
    return np.select([policy_N == "wrong", policy_N == "filter"], [0.0, np.nan], np.asarray(rewards_N, np.float64))


def kl_sums(
    rollouts: Sequence[Sequence[Rollout]], reference: Sequence[Sequence[np.ndarray]], estimator: str
) -> np.ndarray:
    """float64 [P, R]: an estimate of the KL from behaviour policy to reference, summed over each response."""
    lengths = [len(r.token_ids) for group in rollouts for r in group]
    behaviour = np.concatenate([r.rollout_logprobs for group in rollouts for r in group])
    held_to = np.concatenate([x for group in reference for x in group])
    terms = kl_terms(behaviour, held_to, estimator, np)
    sums = np.add.reduceat(terms.astype(np.float64), np.cumsum([0, *lengths[:-1]]))
    return sums.reshape(len(rollouts), -1)


def overlong(lengths_N: np.ndarray, window: int, buffer: int) -> np.ndarray:
    """DAPO's soft punishment (arXiv 2503.14476, equation 13) as a share: 0 up to window - buffer, 1 at the window."""
    return np.clip((np.asarray(lengths_N) - (window - buffer)) / buffer, 0.0, 1.0)
