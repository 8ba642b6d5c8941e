"""Dynamic sampling: which prompts are asked, which groups are used, where the next batch goes on."""

from types import SimpleNamespace

import numpy as np
import pytest

from m1jax.rl.collect import collect
from m1jax.rl.loss import LossConfig
from m1jax.rl.run import Sampled, Scores
from m1jax.rl.settings import RolloutConfig


def collected(live: str, *, cursor=0, **rollout):
    """`live` says of each prompt, from number 0 on, whether its group has variance: "1" or "0"."""
    config = SimpleNamespace(
        rollout=RolloutConfig(**dict(prompts=4, responses=2, engine_rows=4) | rollout), loss=LossConfig(weight_cap=5.0)
    )
    asked, said = [], []

    def sample(count):
        first = cursor + sum(asked)
        asked.append(count)
        indices = range(first, first + count)
        rewards = np.array([[1.0, 0.0] if live[i] == "1" else [1.0, 1.0] for i in indices])
        shaped = rewards - [[0.1, 0.3]]  # by a penalty of length, which differs in every group
        scores = Scores(shaped, rewards, rewards, {"reward/format": first})
        return Sampled([SimpleNamespace(index=i) for i in indices], [[i, i] for i in indices], scores, None)

    run = SimpleNamespace(config=config, step=0, sample=sample, log=said.append)
    return collect(run), asked, said


def test_without_dynamic_sampling_there_is_one_round_and_the_batch_shrinks():
    generation, asked, said = collected("1001")
    assert asked == [4] and generation.again == [] and not said
    assert generation.used.tolist() == [True, False, False, True]
    assert "sampling/acceptance" not in generation.metrics
    assert generation.metrics["reward/zero_variance_share"] == 0.5


def test_dead_groups_are_replaced_in_calls_that_the_engine_fills():
    """Three groups are missing, then one; a call of the engine takes two prompts, so four and two are asked."""
    generation, asked, said = collected("1000" + "1100" + "01", dynamic_sampling=True, max_prompts=16)
    assert asked == [4, 4, 2] and not said
    assert np.flatnonzero(generation.used).tolist() == [0, 4, 5, 9]
    assert [p.index for p in generation.prompts] == list(range(10)) and generation.again == []
    assert generation.metrics["sampling/acceptance"] == 0.4 and generation.metrics["sampling/prompts_asked"] == 10
    assert generation.metrics["sampling/groups_short"] == 0
    assert generation.metrics["reward/format"] == pytest.approx((0 * 4 + 4 * 4 + 8 * 2) / 10)  # by prompts


def test_prompts_beyond_the_last_used_one_are_asked_again():
    generation, asked, _ = collected("0000" + "1111" + "11", cursor=2, dynamic_sampling=True, max_prompts=16)
    assert asked == [4, 2]
    assert np.flatnonzero(generation.used).tolist() == [2, 3, 4, 5] and generation.again == []
    generation, _, _ = collected("1110" + "11", dynamic_sampling=True, max_prompts=16)
    assert np.flatnonzero(generation.used).tolist() == [0, 1, 2, 4] and generation.again == [5]


def test_at_the_bound_the_batch_is_what_there_is_and_the_run_says_so():
    generation, asked, said = collected("0" * 20, dynamic_sampling=True, max_prompts=10)
    assert asked == [4, 4, 2] and generation.again == [] and not generation.used.any()
    assert generation.metrics["sampling/groups_short"] == 4 and generation.metrics["sampling/acceptance"] == 0
    assert said == [
        "warning: 0 of 10 groups have variance, 4 were wanted; step 1 goes on with these "
        "(config.rollout.max_prompts 10)"
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(dynamic_sampling=True), "max_prompts: 0 leaves dynamic sampling no prompt beyond the first 4"),
        (dict(max_prompts=8), "max_prompts: 8 is read by dynamic sampling only"),
        (dict(dynamic_sampling=True, max_prompts=8, overfit_one_batch=True), "overfit_one_batch: dynamic sampling"),
        (dict(save=True, replay="runs/x"), "save: these rollouts are saved already"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**dict(prompts=4, responses=2, engine_rows=4) | values)
