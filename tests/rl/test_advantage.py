"""Group advantages by hand."""

import numpy as np
import pytest

from m1jax.rl.advantage import group_advantages


def test_population_standard_deviation():
    """Rewards 1, 0, 0, 0: mean 1/4, population std sqrt(3)/4; the sample std would give 1.5 and -0.5."""
    advantages_PR, live_P = group_advantages(np.array([[1.0, 0, 0, 0]]))
    np.testing.assert_allclose(advantages_PR, [[np.sqrt(3), *[-1 / np.sqrt(3)] * 3]], rtol=1e-12)
    assert live_P.tolist() == [True]


def test_group_without_variance_leaves_even_where_floats_differ_in_the_last_digit():
    equal = 0.1 + 0.2
    advantages_PR, live_P = group_advantages(np.array([[0.3, equal, 0.3, equal], [0.0, 1.0, 0.0, 1.0]]))
    assert live_P.tolist() == [False, True]
    np.testing.assert_array_equal(advantages_PR[0], 0)
    np.testing.assert_allclose(advantages_PR[1], [-1, 1, -1, 1])


def test_reward_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"rewards\[1, 0\] is nan"):
        group_advantages(np.array([[0.0, 1.0], [np.nan, 0.0]]))
