"""From rollouts to arrays: placement, weights by hand, nothing lost and nothing twice."""

import numpy as np
import pytest

from m1jax.data.packing import pack
from m1jax.rl.batch import BatchShape, UpdateConfig, make_batch, of_responses
from m1jax.types import Problem, Prompt, Rollout


def prompt(index, length=2):
    return Prompt(index, Problem("t", "q", "a"), tuple(range(100 + index, 100 + index + length)))


def rollout(index, sample, length):
    ids = np.arange(length, dtype=np.int32) + 1 + 10 * sample
    return Rollout(index, sample, ids, -np.arange(1, length + 1, dtype=np.float32), "stop", 0)


def batch_of(lengths, live=None, aggregation="group_tokens", updates=1, row_tokens=0, micro=2, window=10):
    prompts = [prompt(i) for i in range(len(lengths))]
    rollouts = [[rollout(i, s, n) for s, n in enumerate(group)] for i, group in enumerate(lengths)]
    advantages = np.array([[10 * i + s + 1.0 for s in range(len(g))] for i, g in enumerate(lengths)])
    live = np.ones(len(lengths), bool) if live is None else np.array(live)
    if live.ndim == 1:  # by group
        live = np.repeat(live[:, None], len(lengths[0]), axis=1)
    config = UpdateConfig(updates_per_batch=updates, micro_batch_rows=micro, row_tokens=row_tokens)
    shape = BatchShape.of(config, len(lengths), len(lengths[0]), window)
    return make_batch(prompts, rollouts, advantages, live, shape, aggregation, longest=20)


def test_group_tokens_is_equation_4_by_hand():
    """Groups of 4 and 6 response tokens in one update: 1/4/2 and 1/6/2 a token."""
    batch = batch_of([[1, 3], [2, 4]])
    weights = {float(a): set(batch.weights[batch.advantages == a].tolist()) for a in np.unique(batch.advantages) if a}
    for advantage, expected in {1.0: 1 / 8, 2.0: 1 / 8, 11.0: 1 / 12, 12.0: 1 / 12}.items():
        assert weights[advantage] == {np.float32(expected)}


def test_update_tokens_by_hand_and_the_difference_of_the_two():
    """All 10 tokens of the update weigh 1/10. On the group of 4 tokens the two differ by 1/8 - 1/10 = 1/40 a token."""
    by_update, by_group = batch_of([[1, 3], [2, 4]], aggregation="update_tokens"), batch_of([[1, 3], [2, 4]])
    assert set(by_update.weights[by_update.weights > 0].tolist()) == {np.float32(0.1)}
    small = (by_group.advantages > 0) & (by_group.advantages < 10)
    np.testing.assert_allclose((by_group.weights - by_update.weights)[small], 1 / 40, atol=1e-8)
    np.testing.assert_allclose(by_group.weights.sum(), by_update.weights.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("aggregation", "by_response"),
    [
        ("sample_mean", [1 / 1 / 4, 1 / 3 / 4, 1 / 2 / 4, 1 / 4 / 4]),
        ("constant", [1 / 20 / 4] * 4),
        (
            "sample_and_token",
            [(1 / 4 + 1 / 10) / 2, (1 / 12 + 1 / 10) / 2, (1 / 8 + 1 / 10) / 2, (1 / 16 + 1 / 10) / 2],
        ),
    ],
)
def test_other_aggregations_by_hand(aggregation, by_response):
    """Responses of 1, 3, 2 and 4 tokens, at most 20 allowed."""
    batch = batch_of([[1, 3], [2, 4]], aggregation=aggregation)
    for advantage, weight in zip((1.0, 2.0, 11.0, 12.0), by_response, strict=True):
        found = batch.weights[batch.advantages == advantage]
        np.testing.assert_allclose(found, weight, rtol=1e-6)


def test_a_response_without_a_reward_leaves_the_batch_and_its_counts():
    batch = batch_of([[1, 3], [2, 4]], live=[[True, False], [True, True]], aggregation="update_tokens")
    assert set(np.unique(batch.weights).tolist()) == {0.0, np.float32(1 / 7)}
    assert 2.0 not in batch.advantages


def test_tokens_know_their_group():
    batch = batch_of([[1, 3], [2, 4]], live=[True, True])
    live = batch.weights > 0
    assert (batch.group_ids[~live] == 0).all()
    assert (batch.group_ids[live] == np.where(batch.advantages[live] < 10, 1, 2)).all()


def test_rows_hold_prompt_then_response_and_weigh_the_response_alone():
    batch = batch_of([[3, 1]], micro=1, window=6, row_tokens=6)
    tokens, weights, logprobs = (
        x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.weights, batch.rollout_logprobs)
    )
    assert tokens[0, :6].tolist() == [100, 101, 1, 2, 3, 0]
    assert (weights[0] > 0)[:6].tolist() == [False, False, True, True, True, False]
    assert logprobs[0, :6].tolist() == [0, 0, -1, -2, -3, 0]
    assert batch.segment_ids.reshape(2, -1)[0, :6].tolist() == [1, 1, 1, 1, 1, 0]


def test_every_update_is_normalised_by_its_own_tokens():
    batch = batch_of([[1, 3], [2, 4], [5, 5], [1, 1]], updates=2, aggregation="update_tokens")
    np.testing.assert_allclose(batch.weights.reshape(2, -1).sum(axis=1), 1.0, rtol=1e-6)
    assert np.unique(batch.weights[0][batch.weights[0] > 0]).tolist() == [np.float32(1 / 10)]
    assert np.unique(batch.weights[1][batch.weights[1] > 0]).tolist() == [np.float32(1 / 12)]


def test_a_stop_token_that_is_the_padding_token_too_is_an_action_like_others():
    """Lengths say what is a response, never ids: here the last token of every response is id 0, as padding is."""
    prompts = [prompt(0), prompt(1)]
    ids = np.array([5, 6, 0], np.int32)
    rollouts = [[Rollout(p, r, ids, np.full(3, -1.0, np.float32), "stop", 0) for r in range(2)] for p in range(2)]
    shape = BatchShape.of(UpdateConfig(updates_per_batch=1, micro_batch_rows=4), 2, 2, 10)
    live = np.ones((2, 2), bool)
    batch = make_batch(prompts, rollouts, live, live, shape, "update_tokens", 5)
    assert (batch.weights > 0).sum() == 12 and ((batch.tokens == 0) & (batch.weights > 0)).sum() == 4


def test_groups_without_variance_leave_the_batch_and_its_counts():
    batch = batch_of([[1, 3], [2, 4]], live=[False, True])
    assert set(np.unique(batch.weights).tolist()) == {0.0, np.float32(1 / 6)}
    assert 100 not in batch.tokens


def test_live_groups_are_dealt_out_evenly():
    """Five live groups of eight over four updates: 2, 1, 1, 1. Prompt i starts with token 100 + i."""
    batch = batch_of([[1, 1]] * 8, updates=4, live=[True, False, True, True, False, True, True, False])
    starts = (batch.segment_ids > 0) & (np.diff(batch.segment_ids, axis=-1, prepend=0) != 0)
    prompts = [sorted(set(batch.tokens[u][starts[u]].tolist())) for u in range(4)]
    assert prompts == [[100, 102], [103], [105], [106]]


@pytest.mark.parametrize("row_tokens", [0, 25, 40])
def test_every_response_token_is_there_exactly_once(row_tokens):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (8, 4)).tolist()
    batch = batch_of(lengths, updates=2, row_tokens=row_tokens)
    live = batch.weights > 0
    assert live.sum() == np.sum(lengths)
    found = sorted(zip(batch.advantages[live].tolist(), batch.rollout_logprobs[live].tolist(), strict=True))
    expected = sorted(
        (10 * i + s + 1.0, -float(t)) for i, g in enumerate(lengths) for s, n in enumerate(g) for t in range(1, n + 1)
    )
    assert found == expected


def test_worst_case_fits_its_static_shape():
    for row_tokens in (0, 19, 20, 33):
        batch_of([[8] * 4] * 4, row_tokens=row_tokens, micro=3, window=10)


def test_batch_refuses_what_does_not_belong_together():
    shape = BatchShape(1, 1, 4, 10)
    with pytest.raises(ValueError, match="rollout of prompt 7 stands under prompt 0"):
        make_batch([prompt(0)], [[rollout(7, 0, 2)]], np.ones((1, 1)), np.ones((1, 1), bool), shape, "group_tokens", 8)
    with pytest.raises(ValueError, match="updates_per_batch: 3 does not divide the 4 prompts"):
        BatchShape.of(UpdateConfig(updates_per_batch=3), 4, 2, 10)
    with pytest.raises(ValueError, match="row_tokens: 9 is shorter than the longest prompt and response, 10"):
        BatchShape.of(UpdateConfig(updates_per_batch=1, row_tokens=9), 4, 2, 10)


@pytest.mark.parametrize("row_tokens", [0, 25])
def test_values_of_a_batch_come_back_by_response(row_tokens):
    """The way to the device and back: what was put in as reference log-probabilities is found at its response."""
    lengths = [[1, 3, 8], [2, 4, 1], [5, 5, 5], [7, 1, 2]]
    prompts = [prompt(i) for i in range(4)]
    rollouts = [[rollout(i, s, n) for s, n in enumerate(group)] for i, group in enumerate(lengths)]
    reference = [
        [np.random.default_rng(9 * i + s).normal(size=n) for s, n in enumerate(g)] for i, g in enumerate(lengths)
    ]
    shape = BatchShape.of(UpdateConfig(updates_per_batch=2, micro_batch_rows=2, row_tokens=row_tokens), 4, 3, 10)
    live = np.ones((4, 3), bool)
    batch = make_batch(prompts, rollouts, live, live, shape, "constant", 20, reference)
    found = of_responses(batch.reference_logprobs, prompts, rollouts, shape)
    for group, wanted in zip(found, reference, strict=True):
        for x, y in zip(group, wanted, strict=True):
            np.testing.assert_array_equal(x, y.astype(np.float32))
    assert batch.reference_logprobs is not None and (batch.reference_logprobs[batch.weights == 0] == 0).all()
    assert make_batch(prompts, rollouts, live, live, shape, "constant", 20).reference_logprobs is None


def test_packing_is_tight_and_never_overlaps():
    sizes = [5, 3, 7, 2, 2, 1]
    places = pack(sizes, 10)
    assert max(row for row, _, _ in places) == 1
    cells = [(row, t) for (row, start, _), size in zip(places, sizes, strict=True) for t in range(start, start + size)]
    assert len(cells) == len(set(cells)) == sum(sizes)
    with pytest.raises(ValueError, match="11 tokens does not fit a row of 10"):
        pack([11], 10)
