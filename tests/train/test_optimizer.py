"""The schedule, by hand: its unit is an update, and the first one is not lost."""

import numpy as np
import pytest

from m1jax.train.optimizer import OptimizerConfig, learning_rate


def rates(count=8, **values):
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, **values))
    return [float(schedule(update)) for update in range(count)]


def test_the_first_update_has_a_rate():
    np.testing.assert_allclose(rates(warmup_updates=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert rates(1) == [1.0] and rates(2, warmup_updates=1) == [1.0, 1.0]


def test_decay_begins_after_the_warm_up_and_ends_at_its_fraction():
    linear = rates(warmup_updates=2, schedule="linear", decay_updates=4, final_fraction=0.2)
    np.testing.assert_allclose(linear, [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2], rtol=1e-6)
    cosine = rates(5, schedule="cosine", decay_updates=4, final_fraction=0.0)
    np.testing.assert_allclose(cosine, (1 + np.cos(np.pi * np.arange(5) / 4)) / 2, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(schedule="linear"), "decay_updates: 0 must be at least 1 for schedule 'linear'"),
        (dict(schedule="step"), "schedule: 'step' must be one of"),
        (dict(warmup_updates=-1), "warmup_updates: -1 must be at least 0"),
    ],
)
def test_senseless_schedules_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(learning_rate=1.0, **values)
