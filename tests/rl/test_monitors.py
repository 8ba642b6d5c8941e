"""Metrics of a step, by hand; and what the reward stage does before them."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl.loss import LossConfig
from m1jax.rl.monitors import rollout_metrics
from m1jax.rl.run import Run, Scorer, Scores
from m1jax.rl.settings import RewardConfig
from m1jax.types import Problem, Prompt, Rollout, Verdict

PROMPTS = [Prompt(0, Problem("t", "q", "a"), (1, 2)), Prompt(1, Problem("u", "q", "a"), (1,))]


def rollout(prompt, sample, length, ending="stop", logprob=-0.5):
    return Rollout(prompt, sample, np.arange(length, dtype=np.int32), np.full(length, logprob, np.float32), ending, 0)


ROLLOUTS = [[rollout(0, 0, 2), rollout(0, 1, 4)], [rollout(1, 0, 6), rollout(1, 1, 8, "length", -1.0)]]


def test_metrics_of_the_rollouts_by_hand():
    rewards, correct = np.array([[1.0, 0.0], [np.nan, 0.5]]), np.array([[1, 0], [1, 0]])
    metrics = rollout_metrics(PROMPTS, ROLLOUTS, rewards, correct)
    assert metrics["reward/mean"] == 0.5  # of three: the fourth has none
    assert metrics["reward/accuracy"] == metrics["reward/accuracy/t"] == metrics["reward/accuracy/u"] == 0.5
    assert metrics["rollout/length_correct"] == 4 and metrics["rollout/length_incorrect"] == 6
    assert metrics["rollout/length_stop"] == 4 and metrics["rollout/length_length"] == 8
    assert metrics["rollout/share_length"] == 0.25 and "rollout/length_repetition" not in metrics
    entropy = (12 * 0.5 + 8 * 1.0) / 20  # by tokens
    assert metrics["rollout/entropy"] == pytest.approx(entropy)
    assert metrics["rollout/perplexity"] == pytest.approx(np.exp(entropy))


def test_kl_is_taken_from_the_reward_and_leaves_what_was_verified():
    """k1 with a reference 0.25 below the engine on every token: 0.25 a token, times a coefficient of 2."""
    verified = np.array([[1.0, 0.0], [1.0, 1.0]])
    run = SimpleNamespace(
        config=SimpleNamespace(
            rollout=SimpleNamespace(responses=2, router_replay="off", save=False), sampling=None,
            loss=LossConfig(weight_cap=5.0, kl_coefficient=2.0, kl_in="reward", kl_estimator="k1"),
        ),
        clock=SimpleNamespace(stage=lambda _: nullcontext()), step=0,
        prompts=SimpleNamespace(take=lambda count, step: (PROMPTS, ROLLOUTS)),
        reference=lambda prompts, rollouts: [[r.rollout_logprobs - 0.25 for r in group] for group in rollouts],
        scorer=SimpleNamespace(score=lambda *_: Scores(verified, verified, verified, {})),
    )  # fmt: skip
    sampled = Run.sample(run, 2)
    lengths = np.array([[2, 4], [6, 8]])
    np.testing.assert_allclose(sampled.scores.rewards_PR, verified - 0.5 * lengths)
    np.testing.assert_array_equal(sampled.scores.verified_PR, verified)
    assert sampled.scores.metrics["reward/kl_penalty"] == pytest.approx(2.5)


def test_the_share_without_a_score_is_that_of_the_answers():
    """One response of four has an answer, and its verifier does not know: that is all of the answers."""
    texts = iter(["none"] * 3 + ["<think></think><answer>1</answer>"])
    scorer = Scorer(
        SimpleNamespace(stop_ids=(), decode=lambda ids: next(texts)),
        {name: SimpleNamespace(verifier="v:v") for name in "tu"},
        SimpleNamespace(score=lambda jobs: [Verdict(float("nan"), "unscored") for _ in jobs]),
        RewardConfig(max_unscored_share=0.5),
        window=8,
    )
    with pytest.raises(UserError, match="step 3: the verifiers gave 100% of the answers no score"):
        scorer.score(3, PROMPTS, ROLLOUTS)
