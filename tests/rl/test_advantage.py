"""Group advantages by hand."""

import numpy as np
import pytest

from m1jax.rl.advantage import group_advantages


def test_population_standard_deviation():
    """Rewards 1, 0, 0, 0: mean 1/4, population std sqrt(3)/4; the sample std would give 1.5 and -0.5."""
    advantages_PR, live_PR = group_advantages(np.array([[1.0, 0, 0, 0]]))
    np.testing.assert_allclose(advantages_PR, [[np.sqrt(3), *[-1 / np.sqrt(3)] * 3]], rtol=1e-12)
    assert live_PR.tolist() == [[True] * 4]
    sample_PR, _ = group_advantages(np.array([[1.0, 0, 0, 0]]), std="sample")
    np.testing.assert_allclose(sample_PR, [[1.5, -0.5, -0.5, -0.5]], rtol=1e-12)
    eight = np.array([[1.0] * 4 + [0.0] * 4])
    ratio = group_advantages(eight)[0] / group_advantages(eight, std="sample")[0]
    np.testing.assert_allclose(ratio, np.sqrt(8 / 7), rtol=1e-12)  # 6.9%


def test_group_without_variance_leaves_even_where_floats_differ_in_the_last_digit():
    equal = 0.1 + 0.2
    advantages_PR, live_PR = group_advantages(np.array([[0.3, equal, 0.3, equal], [0.0, 1.0, 0.0, 1.0]]))
    assert live_PR.all(axis=1).tolist() == [False, True] and not live_PR[0].any()
    np.testing.assert_array_equal(advantages_PR[0], 0)
    np.testing.assert_allclose(advantages_PR[1], [-1, 1, -1, 1])


def test_other_scales_by_hand():
    """Centred rewards +-1/2, +-1/2 and +-1, +-1; the third group is dead: batch std sqrt((4/4 + 4) / 8) = sqrt(5/8)."""
    rewards = np.array([[1.0, 0, 1, 0], [2.0, 0, 2, 0], [1.0, 1, 1, 1]])
    by_none, live_PR = group_advantages(rewards, "none")
    np.testing.assert_allclose(by_none, [[0.5, -0.5, 0.5, -0.5], [1, -1, 1, -1], [0] * 4])
    assert live_PR.any(axis=1).tolist() == [True, True, False]
    by_batch, _ = group_advantages(rewards, "batch_std")
    np.testing.assert_allclose(by_batch, by_none / np.sqrt(5 / 8), rtol=1e-12)
    by_batch, _ = group_advantages(rewards, "batch_std", "sample")
    np.testing.assert_allclose(by_batch, by_none / np.sqrt(5 / 7), rtol=1e-12)


def test_a_response_without_a_reward_leaves_its_group():
    """The others' advantages are those of a group of three; a group of one, and of none, has no variance."""
    nan = np.nan
    rewards = np.array([[1.0, nan, 0, 0], [nan, nan, nan, 1.0], [nan] * 4])
    for scale in ("group_std", "batch_std", "none"):
        for std in ("population", "sample"):
            advantages_PR, live_PR = group_advantages(rewards, scale, std)
            alone, _ = group_advantages(np.array([[1.0, 0, 0]]), scale, std)
            np.testing.assert_allclose(advantages_PR[0, [0, 2, 3]], alone[0], rtol=1e-12)
            assert live_PR.tolist() == [[True, False, True, True], [False] * 4, [False] * 4]
            assert (advantages_PR[1:] == 0).all() and advantages_PR[0, 1] == 0


def test_groups_of_one_are_dead_and_not_nan():
    for std in ("population", "sample"):
        advantages_PR, live_PR = group_advantages(np.array([[1.0], [0.0]]), std=std)
        assert not live_PR.any() and (advantages_PR == 0).all()


def test_reward_that_is_infinite_is_named():
    with pytest.raises(ValueError, match=r"rewards\[1, 0\] is inf"):
        group_advantages(np.array([[0.0, 1.0], [np.inf, 0.0]]))


def test_groups_that_are_not_used_leave_the_batch_and_its_deviation():
    rewards = np.array([[1.0, 0.0], [5.0, 0.0], [1.0, 0.0]])
    used = np.array([True, False, True])
    for scale in ("group_std", "batch_std"):
        advantages, live = group_advantages(rewards, scale, used_P=used)
        wanted, _ = group_advantages(rewards[used], scale)
        np.testing.assert_array_equal(advantages[used], wanted)
        assert live.tolist() == [[True, True], [False, False], [True, True]] and not advantages[1].any()
