"""Rollouts on disk: what is written comes back, and what does not fit is refused."""

import dataclasses

import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl.recorded import ReplayEngine, file_name, load_rollouts, save_rollouts
from m1jax.types import Sampling
from tests.rl import small

SAMPLING = Sampling(max_tokens=8)


def same(one, other):
    for a, b in zip([r for g in one for r in g], [r for g in other for r in g], strict=True):
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@pytest.fixture
def recorded(tmp_path):
    """A folder with the training rollouts of one call, and what they were."""
    prompts = small.prompts()
    rollouts = small.rollouts(prompts)
    rollouts[1][2] = dataclasses.replace(rollouts[1][2], ending="repetition", weight_version=7)
    save_rollouts(file_name(tmp_path / "rollouts", 7, 0), prompts, rollouts, 1.0)
    return tmp_path, prompts, rollouts


def test_what_an_engine_sampled_comes_back(recorded):
    run, prompts, rollouts = recorded
    replay = ReplayEngine(run, 1)
    replay.set_weights(None, 7)
    same(replay.generate(prompts, 4, SAMPLING, 0), rollouts)
    assert [p.name for p in (run / "rollouts").iterdir()] == ["00000007-0000000000.npz"]


def test_experts_come_back(recorded):
    """Of every rollout or of none: -1 too, in their own dtype."""
    run, prompts, rollouts = recorded
    rng, path = np.random.default_rng(0), file_name(run / "rollouts", 8, 0)
    experts = lambda p, r: rng.integers(-1, 3, (len(p.token_ids) + len(r.token_ids), 2, 2)).astype(np.int8)  # noqa: E731
    routed = [
        [dataclasses.replace(r, expert_ids=experts(p, r)) for r in group]
        for p, group in zip(prompts, rollouts, strict=True)
    ]
    save_rollouts(path, prompts, routed, 1.0)
    found = load_rollouts(path)[1]
    same(found, routed)
    assert found[0][0].expert_ids is not None and found[0][0].expert_ids.dtype == np.int8


def test_versions_of_tokens_come_back(recorded):
    """Of the rollouts that have several; the others have one, and say so as before."""
    run, prompts, rollouts = recorded
    path = file_name(run / "rollouts", 8, 0)
    first = rollouts[0][0]
    rollouts[0][0] = dataclasses.replace(
        first, weight_version=3, weight_versions=np.array([3] + [4] * (len(first.token_ids) - 1), np.int32)
    )
    save_rollouts(path, prompts, rollouts, 1.0)
    same(load_rollouts(path)[1], rollouts)


def test_what_does_not_fit_is_refused(recorded, tmp_path):
    run, prompts, _ = recorded
    replay = ReplayEngine(run, 1)
    with pytest.raises(UserError, match="no such rollouts"):
        replay.generate(prompts, 4, SAMPLING, 0)
    replay.set_weights(None, 7)
    other = [dataclasses.replace(prompts[0], token_ids=(2, 3, 4, 5)), *prompts[1:]]
    with pytest.raises(UserError, match="answers to other prompts; config.tasks"):
        replay.generate(other, 4, SAMPLING, 0)
    with pytest.raises(UserError, match="4 responses of up to 8 tokens; config.rollout.responses is 5"):
        replay.generate(prompts, 5, SAMPLING, 0)
    with pytest.raises(UserError, match="config.sampling.max_tokens 7"):
        replay.generate(prompts, 4, Sampling(max_tokens=7), 0)
    with pytest.raises(UserError, match="holds no saved rollouts; train it with --config.rollout.save=true"):
        ReplayEngine(tmp_path / "elsewhere", 1)
    with pytest.raises(UserError, match="holds the rollouts of 1 steps, config.steps is 2; lower it"):
        ReplayEngine(run, 2)
    with pytest.raises(UserError, match="sampled at temperature 1, .*config.sampling.temperature is 0.5"):
        replay.generate(prompts, 4, Sampling(max_tokens=8, temperature=0.5), 0)


def test_a_damaged_file_is_named(recorded):
    run, prompts, rollouts = recorded
    path = file_name(run / "rollouts", 7, 0)
    whole = path.read_bytes()
    for damaged in (whole[:100], *(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in range(0, 900, 30))):
        path.write_bytes(damaged)
        try:
            load_rollouts(path)  # a byte that nothing reads, a date for example, does no harm
        except UserError as error:
            assert "00000007-0000000000.npz: damaged" in str(error)
    save_rollouts(path, prompts, rollouts, 0.7)
    assert load_rollouts(path)[2] == 0.7
    same(load_rollouts(path)[1], rollouts)
