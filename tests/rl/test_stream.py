"""One answer token by token: the engine's answer, the recorded model's, the same three endings, the same bound."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl import stream as stream_lib
from m1jax.rl.engine_local import LocalEngine
from m1jax.rl.stream import stream
from m1jax.sharding import data_mesh
from m1jax.types import Sampling
from tests.model import golden
from tests.rl import small

MODEL = small.config()


@pytest.fixture(scope="module")
def params():
    return small.params(MODEL)


def engines(params, prompts, sampling, seed, stop_ids):
    engine = LocalEngine(MODEL, prompt_tokens=8, rows=4, stop_ids=stop_ids, mesh=data_mesh())
    engine.set_weights(params, 0)
    return [group[0] for group in engine.generate(prompts, 1, sampling, seed)]


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 9}])
def test_the_answer_is_the_engines(params, setting):
    prompts, sampling, stops = small.prompts(4), Sampling(max_tokens=8, **setting), (1, 4)
    answers = []
    for prompt, rollout in zip(prompts, engines(params, prompts, sampling, 9, stops), strict=True):
        ids, logprobs = zip(*stream(params, MODEL, prompt.token_ids, sampling, stops, 9, prompt.index), strict=True)
        assert list(ids) == rollout.token_ids.tolist()
        np.testing.assert_allclose(logprobs, rollout.rollout_logprobs, atol=1e-5)
        answers.append(ids)
    assert len(set(answers)) > 1


def test_greedy_is_the_recorded_models():
    numbers, greedy = golden.numbers(), Sampling(max_tokens=32, temperature=0.0)
    prompt = numbers["greedy_prompt"].tolist()
    ids, logprobs = zip(*stream(golden.weights(), golden.config(), prompt, greedy, (), 0), strict=True)
    assert list(ids) == numbers["greedy_ids"].tolist()
    np.testing.assert_allclose(logprobs, numbers["greedy_logprobs"], rtol=0, atol=2e-5)


def test_three_endings(params):
    """A head of zeros gives every id probability 1 / 23 = 0.0435: above a threshold of 0.04, below one of 0.9."""
    flat = {**params, "head": jnp.zeros_like(params["head"])}
    count = lambda stops, **setting: len(list(stream(flat, MODEL, [2, 3], Sampling(6, **setting), stops, 0)))  # noqa: E731
    assert count((), repetition_run=3, repetition_probability=0.9) == 6
    assert count((), repetition_run=3, repetition_probability=0.04) == 3
    assert count(range(23)) == 1


def test_prompts_of_one_bucket_share_the_two_programs(params):
    sampling = Sampling(max_tokens=3, top_k=5)  # a setting of this test's own
    jitted: list[Any] = [stream_lib._prefill, stream_lib._step]
    programs = lambda: [function._cache_size() for function in jitted]  # noqa: E731
    before = programs()
    for length in (1, 9, 16):
        assert len(list(stream(params, MODEL, [2] * length, sampling, (), 0))) == 3
    assert programs() == [count + 1 for count in before]


def test_the_cache_is_updated_in_place(params):
    sampling, key_B = Sampling(max_tokens=3), jax.random.split(jax.random.key(0), 1)
    one = np.ones((1, 16), np.int32)
    token_B, _, cache = stream_lib._prefill(params, one, one, key_B, config=MODEL, sampling=sampling)
    stream_lib._step(params, cache, token_B, key_B, 1, config=MODEL, sampling=sampling)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.layers))


def test_what_cannot_be_answered_is_refused_before_the_first_token(params):
    bounded = dataclasses.replace(MODEL, max_positions=10)
    stream(params, bounded, [2] * 4, Sampling(max_tokens=6), (), 0)
    with pytest.raises(UserError, match="5 tokens and an answer of up to 6 need 11 positions, .* made for 10; lower"):
        stream(params, bounded, [2] * 5, Sampling(max_tokens=6), (), 0)
    with pytest.raises(UserError, match="no tokens"):
        stream(params, MODEL, [], Sampling(max_tokens=6), (), 0)
