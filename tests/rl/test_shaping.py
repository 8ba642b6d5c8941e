"""Rewards after the verifiers: endings, overlong penalty, KL sums. By hand."""

import numpy as np
import pytest

from m1jax.rl.shaping import by_ending, kl_sums, overlong
from m1jax.types import Rollout


def test_each_ending_has_its_policy():
    rewards, endings = [1.0, 1.0, 1.0, 0.5], ["stop", "length", "repetition", "length"]
    np.testing.assert_array_equal(by_ending(rewards, endings, {}), rewards)
    shaped = by_ending(rewards, endings, {"length": "wrong", "repetition": "filter"})
    np.testing.assert_array_equal(shaped, [1.0, 0.0, np.nan, 0.0])
    np.testing.assert_array_equal(by_ending(rewards, endings, {"length": "filter"}), [1.0, np.nan, 1.0, np.nan])


def test_overlong_penalty_is_that_of_dapo():
    """DAPO's own numbers: window 20,480, buffer 4,096: nothing up to 16,384, half at 18,432, all of it at the end."""
    lengths = [0, 16_384, 17_408, 18_432, 20_480, 30_000]
    np.testing.assert_allclose(overlong(lengths, 20_480, 4_096), [0, 0, 0.25, 0.5, 1, 1])


@pytest.mark.parametrize(("estimator", "term"), [("k1", -0.5), ("k2", 0.125), ("k3", np.exp(0.5) - 1.5)])
def test_kl_is_summed_over_each_response(estimator, term):
    """Reference above the policy by 0.5 on every token; responses of 1, 3, 2 and 4 tokens."""
    lengths = [[1, 3], [2, 4]]
    rollouts = [
        [Rollout(p, r, np.zeros(n, np.int32), np.full(n, -2.0, np.float32), "stop", 0) for r, n in enumerate(row)]
        for p, row in enumerate(lengths)
    ]
    reference = [[np.full(n, -1.5, np.float32) for n in row] for row in lengths]
    np.testing.assert_allclose(kl_sums(rollouts, reference, estimator), term * np.array(lengths), rtol=1e-5)
