"""Which prompts are asked when, how old the weights may be that answered them, and what a resumed run asks first."""

from __future__ import annotations

from concurrent.futures import Future

import jax
import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl.ahead import Ahead
from m1jax.rl.engine_local import LocalEngine
from m1jax.sharding import data_mesh
from m1jax.types import Problem, Prompt, Rollout, Sampling
from tests.rl import small

SAMPLING = Sampling(max_tokens=4)


class Source:
    def __getitem__(self, index):
        return Prompt(index, Problem("t", f"q{index}", "a"), (2, 3))


class Scripted:
    """An engine whose answers come when a test says so: `finish(index)`; before that they are under way.

    A response has the version at which its prompt was asked, and of the two tokens the second that of its end.
    """

    def __init__(self, at_once=True):
        self.at_once, self.version, self.asked = at_once, 0, []
        self.under_way: dict[int, tuple[int, Future]] = {}

    def set_weights(self, params, version):
        self.version = version

    def generate(self, prompts, responses, sampling, seed):
        self.asked += [(p.index, self.version) for p in prompts]
        return [self._answers(p.index, self.version, responses) for p in prompts]

    def submit(self, prompts, responses, sampling, seed):
        self.asked += [(p.index, self.version) for p in prompts]
        futures = []
        for prompt in prompts:
            futures.append(Future())
            self.under_way[prompt.index] = self.version, futures[-1]
            if self.at_once:
                self.finish(prompt.index)
        return futures

    def finish(self, *indices):
        for index in indices:
            began, future = self.under_way.pop(index)
            if not future.cancelled():
                future.set_result(self._answers(index, began, 2))

    def _answers(self, index, began, responses):
        ids, logprobs = np.array([5, 6], np.int32), np.zeros(2, np.float32)
        spans = np.array([began, self.version], np.int32) if began < self.version else None
        return [
            Rollout(index, i, ids, logprobs, "stop", began, weight_versions=spans) for i in range(responses)
        ]  # fmt: skip


def ahead(engine, staleness, unfinished="wait", **more) -> Ahead:
    return Ahead(engine, Source(), SAMPLING, 0, 4, 2, staleness, unfinished, **more)  # type: ignore[arg-type]


def batch(queue: Ahead, engine: Scripted, step: int, again=()) -> list[int]:
    """One batch and its update: the indices that were taken."""
    prompts, rollouts = queue.take(4, step)
    assert [p.index for p in prompts] == [group[0].prompt_index for group in rollouts]
    queue.done(list(again))
    queue.ask_ahead(step, 100)
    engine.set_weights(None, step + 1)
    return [p.index for p in prompts]


def test_on_policy_every_batch_is_asked_when_its_turn_has_come():
    engine = Scripted()
    queue = ahead(engine, 0)
    assert [batch(queue, engine, step) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert engine.asked == [(i, i // 4) for i in range(12)]
    assert queue.take_metrics() == {} and queue.position == (12, [])


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_batches_are_asked_so_many_updates_before_they_are_used(staleness):
    engine = Scripted()
    queue, ages = ahead(engine, staleness), []
    for step in range(6):
        assert batch(queue, engine, step) == [4 * step + i for i in range(4)]
        ages.append(queue.take_metrics()["rollout/staleness_largest"])
    assert ages == [min(step, staleness) for step in range(6)]  # the first ones are asked when they are needed
    assert queue.position == (24, [])  # what was asked ahead is asked again by a run that is resumed


def test_answers_that_outlast_an_update_keep_the_version_of_each_token():
    engine = Scripted()
    queue = ahead(engine, 1)
    batch(queue, engine, 0)
    engine.at_once = False
    batch(queue, engine, 1)  # asks 8 to 11 with the weights of 1
    queue.take_metrics()
    engine.finish(8, 9, 10, 11)
    _, rollouts = queue.take(4, 2)
    assert [r.weight_versions.tolist() for group in rollouts for r in group] == [[1, 2]] * 8
    metrics = queue.take_metrics()
    assert metrics["rollout/staleness_largest"] == 1 and metrics["rollout/staleness_mean"] == 0.5


def test_unfinished_groups_go_to_the_next_batch_and_the_oldest_come_first():
    engine = Scripted()
    queue = ahead(engine, 3, "next_batch")
    assert batch(queue, engine, 0) == [0, 1, 2, 3]
    engine.at_once = False
    assert sorted(i for i, _ in engine.asked) == list(range(12))  # 8 under way: (3 + 1) / 2 batches
    assert batch(queue, engine, 1) == [4, 5, 6, 7]
    assert sorted(engine.under_way) == [12, 13, 14, 15]
    engine.finish(13, 15)
    assert batch(queue, engine, 2) == [8, 9, 10, 11]
    engine.finish(16, 17, 18)
    assert batch(queue, engine, 3) == [13, 15, 16, 17]  # 12 and 14 are still under way
    assert queue.position == (18, [12, 14])
    engine.finish(12, 14)
    engine.finish(19)
    assert batch(queue, engine, 4) == [12, 14, 18, 19]
    assert queue.take_metrics()["rollout/dropped_stale"] == 0


def test_groups_beyond_the_bound_are_given_up_counted_and_asked_anew():
    engine = Scripted()
    queue = ahead(engine, 2, "next_batch")  # 6 under way
    batch(queue, engine, 0)
    engine.at_once = False
    batch(queue, engine, 1)  # 4 to 7; 8 and 9 are there already
    engine.finish(10, 11)
    assert batch(queue, engine, 2) == [8, 9, 10, 11]
    late = [engine.under_way[i][1] for i in (12, 13)]  # asked with the weights of 1
    engine.finish(14, 15, 16, 17)
    assert batch(queue, engine, 3) == [14, 15, 16, 17]
    assert all(future.cancelled() for future in late)  # they would be 3 batches old in the next one
    metrics = queue.take_metrics()
    assert metrics["rollout/dropped_stale"] == 4 and metrics["rollout/staleness_largest"] <= 2
    assert [v for i, v in engine.asked if i in (12, 13)] == [1, 1, 3, 3]


@pytest.mark.parametrize("staleness", [0, 2])
def test_what_a_batch_gives_back_comes_first_in_the_next_one(staleness):
    """With a bound above 0 its answers are kept, else they are asked again with newer weights."""
    engine = Scripted()
    queue = ahead(engine, staleness)
    assert batch(queue, engine, 0, again=[2, 3]) == [0, 1, 2, 3]
    assert queue.position == (2, []) and sorted(queue._ages) == ([0, 1] if staleness else [])
    assert batch(queue, engine, 1) == [2, 3, 4, 5]
    assert [v for i, v in engine.asked if i == 2] == ([0] if staleness else [0, 1])
    assert queue.position == (6, [])
    if staleness:  # the ages of what was trained on: two groups of weights 0 at step 0, four at step 1
        assert queue.take_metrics()["rollout/staleness_mean"] == pytest.approx(4 / 6)


def test_a_resumed_run_asks_first_what_was_asked_and_not_used():
    engine = Scripted(at_once=False)
    queue = ahead(engine, 3, "next_batch")
    queue.ask_ahead(0, 100)  # 0 to 7
    engine.finish(0, 2, 3, 6)
    prompts, _ = queue.take(4, 1)
    assert [p.index for p in prompts] == [0, 2, 3, 6]
    assert queue.position == (0, [])  # nothing is trained on yet
    queue.done([])
    cursor, carried = queue.position
    assert (cursor, carried) == (7, [1, 4, 5])  # 7 is asked again as a new one
    engine = Scripted()
    queue = ahead(engine, 0, cursor=cursor, carried=carried)
    assert batch(queue, engine, 1) == [1, 4, 5, 7] and queue.position == (8, [])


def test_the_first_failure_reaches_whoever_waits():
    engine = Scripted(at_once=False)
    queue = ahead(engine, 2, "next_batch")
    queue.ask_ahead(0, 100)
    engine.finish(0, 1, 2)
    engine.under_way[3][1].set_exception(RuntimeError("gone"))
    with pytest.raises(RuntimeError, match="gone"):
        queue.take(4, 0)


def test_an_engine_that_can_only_be_waited_for_is_on_policy():
    class Plain:
        def set_weights(self, params, version): ...
        def generate(self, prompts, responses, sampling, seed): ...

    ahead(Plain(), 0)
    with pytest.raises(UserError, match=r"config.rollout.staleness: 1, and this engine \(Plain\) has no `submit`"):
        ahead(Plain(), 1)


def test_the_local_engine_answers_behind_an_update_with_the_weights_it_was_asked_with():
    """Whatever becomes of the parameters meanwhile: the trainer's update writes over their memory."""
    model = small.config()
    engine = LocalEngine(model, prompt_tokens=4, rows=8, stop_ids=(1,), mesh=data_mesh())
    prompts = small.prompts(4)
    params = [small.params(model, seed) for seed in (0, 1)]
    engine.set_weights(params[0], 0)
    expected = engine.generate(prompts, 4, SAMPLING, 7)
    futures = engine.submit(prompts, 4, SAMPLING, 7)
    jax.tree.map(lambda x: x.delete(), params[0])
    engine.set_weights(params[1], 1)
    found = [future.result(60) for future in futures]
    for r, s in zip(sum(expected, []), sum(found, []), strict=True):
        assert s.weight_version == 0
        np.testing.assert_array_equal(r.token_ids, s.token_ids)
        np.testing.assert_array_equal(r.rollout_logprobs, s.rollout_logprobs)
    newer = engine.submit(prompts, 4, SAMPLING, 7)[0].result(60)
    assert newer[0].weight_version == 1
    engine.close()


def test_nothing_is_asked_ahead_that_no_batch_will_take():
    engine = Scripted()
    queue = ahead(engine, 3)
    for step in range(5):
        queue.take(4, step)
        queue.done([])
        queue.ask_ahead(step, 5)
        engine.set_weights(None, step + 1)
    assert len(engine.asked) == 20 and queue.position == (20, [])
