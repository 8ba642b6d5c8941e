"""The local engine: noise that knows no batch, honest probabilities, three endings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.model import transformer
from m1jax.rl.engine_local import LocalEngine, computed_with, truncate
from m1jax.sharding import data_mesh
from m1jax.types import Problem, Prompt, Sampling
from tests.rl import small

MODEL = small.config()


def engine(rows=16, stop_ids=(1,), params=None, prompt_tokens=4):
    made = LocalEngine(MODEL, prompt_tokens=prompt_tokens, rows=rows, stop_ids=stop_ids, mesh=data_mesh())
    made.set_weights(small.params(MODEL) if params is None else params, 3)
    return made


@jax.jit
def forward(params, tokens_BT, segment_ids_BT):
    return transformer.head(params, transformer.hidden_states(params, MODEL, tokens_BT, segment_ids_BT)[0])


def next_logits(params, tokens):
    """Logits after the last token, by a full forward padded to one shape."""
    row = np.zeros((1, 12), np.int32)
    row[0, : len(tokens)] = tokens
    return forward(params, row, (np.arange(12)[None] < len(tokens)).astype(np.int32))[len(tokens) - 1]


def test_responses_to_a_prompt_are_the_same_alone_and_in_any_batch():
    prompts, sampling = small.prompts(4), Sampling(max_tokens=8)
    together = engine().generate(prompts, 4, sampling, seed=9)
    backwards = engine().generate(prompts[::-1], 4, sampling, seed=9)[::-1]
    for p, prompt in enumerate(prompts):
        (alone,) = engine().generate([prompt], 4, sampling, seed=9)
        for one, two, three in zip(alone, together[p], backwards[p], strict=True):
            assert one.token_ids.tolist() == two.token_ids.tolist() == three.token_ids.tolist()
            np.testing.assert_allclose(one.rollout_logprobs, two.rollout_logprobs, atol=1e-5)


def test_seed_prompt_index_and_sample_each_change_the_noise():
    prompt = small.prompts(1)[0]
    other = Prompt(77, prompt.problem, prompt.token_ids)
    sampling = Sampling(max_tokens=8)
    first = engine(stop_ids=()).generate([prompt, other], 2, sampling, seed=0)
    again = engine(stop_ids=()).generate([prompt], 2, sampling, seed=1)
    answers = [tuple(r.token_ids.tolist()) for r in (*first[0], *first[1], *again[0])]
    assert len(set(answers)) == 6


def test_a_response_does_not_depend_on_how_many_are_asked_for():
    prompt, sampling = small.prompts(1), Sampling(max_tokens=8)
    two, four = (engine().generate(prompt, n, sampling, seed=0)[0] for n in (2, 4))
    assert [r.token_ids.tolist() for r in two] == [r.token_ids.tolist() for r in four[:2]]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_frequencies_are_the_computed_probabilities(temperature):
    """Chi-square over the first token of 8192 responses: below the 99.9% quantile of 22 degrees of freedom, 48.27."""
    prompt = small.prompts(1)[0]
    one = engine(rows=8192, stop_ids=())
    rollouts = one.generate([prompt], 8192, Sampling(max_tokens=1, temperature=temperature), seed=4)[0]
    expected = 8192 * np.asarray(jax.nn.softmax(next_logits(one.params, prompt.token_ids) / temperature))
    counts = np.bincount([int(r.token_ids[0]) for r in rollouts], minlength=MODEL.vocab_size)
    assert expected.min() > 5  # the chi-square approximation holds
    assert ((counts - expected) ** 2 / expected).sum() < 48.27
    sampled = [np.exp(r.rollout_logprobs[0]) - expected[r.token_ids[0]] / 8192 for r in rollouts]
    assert np.abs(sampled).max() < 1e-5


def test_three_endings():
    """A head of zeros gives every id probability 1 / 23 = 0.0435: above a threshold of 0.04, below one of 0.9."""
    params = small.params(MODEL)
    params = {**params, "head": jnp.zeros_like(params["head"])}
    prompt = small.prompts(1)
    flat = engine(stop_ids=(), params=params)
    (length,) = flat.generate(prompt, 1, Sampling(max_tokens=6, repetition_run=3, repetition_probability=0.9), 0)[0]
    assert length.ending == "length" and len(length.token_ids) == 6
    (repeats,) = flat.generate(prompt, 1, Sampling(max_tokens=6, repetition_run=3, repetition_probability=0.04), 0)[0]
    assert repeats.ending == "repetition" and len(repeats.token_ids) == 3
    every_id = engine(stop_ids=tuple(range(23)), params=params)
    (stop,) = every_id.generate(prompt, 1, Sampling(max_tokens=6, repetition_run=1, repetition_probability=0.04), 0)[0]
    assert stop.ending == "stop" and len(stop.token_ids) == 1 and stop.weight_version == 3
    np.testing.assert_allclose(stop.rollout_logprobs, [-np.log(23)], rtol=1e-5)


def test_every_stop_id_ends_a_response_and_is_part_of_it():
    stops = (1, 4, 9, 16)
    groups = engine(stop_ids=stops).generate(small.prompts(4), 4, Sampling(max_tokens=8), seed=0)
    rollouts = [r for g in groups for r in g]
    stopped = [r for r in rollouts if r.ending == "stop"]
    assert {int(r.token_ids[-1]) for r in stopped} <= set(stops) and len(stopped) > 4
    assert all(not set(r.token_ids[:-1].tolist()) & set(stops) for r in rollouts)


def test_greedy_takes_the_most_probable_token():
    prompt = small.prompts(1)[0]
    one = engine(stop_ids=())
    (greedy,) = one.generate([prompt], 1, Sampling(max_tokens=5, temperature=0.0), seed=0)[0]
    tokens = list(prompt.token_ids)
    for expected in greedy.token_ids:
        assert int(next_logits(one.params, tokens).argmax()) == expected
        tokens.append(int(expected))


def test_truncation_keeps_the_smallest_set_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda **k: jnp.isfinite(truncate(logits, **k))[0].tolist()  # noqa: E731
    assert kept(top_p=0.6, top_k=0) == [True, True, False, False]
    assert kept(top_p=0.4, top_k=0) == [True, False, False, False]
    assert kept(top_p=1.0, top_k=3) == [True, True, True, False]
    assert kept(top_p=0.9, top_k=2) == [True, True, False, False]


def test_top_p_never_samples_outside_and_reports_the_full_softmax():
    prompt = small.prompts(1)
    one = engine(rows=256, stop_ids=())
    full = one.generate(prompt, 256, Sampling(max_tokens=1), seed=0)[0]
    cut = one.generate(prompt, 256, Sampling(max_tokens=1, top_p=0.5), seed=0)[0]
    logprob = {int(r.token_ids[0]): float(r.rollout_logprobs[0]) for r in full}
    kept = {int(r.token_ids[0]): float(r.rollout_logprobs[0]) for r in cut}
    assert len(kept) < len(logprob)
    assert sum(np.exp(v) for v in kept.values()) < 0.8
    for token, value in kept.items():
        np.testing.assert_allclose(value, logprob[token], atol=1e-6)


def test_weights_in_the_dtype_that_layers_compute_in_give_the_same_numbers():
    """To the last bit: every layer casts its weights in any case; what is read wide stays wide."""
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    params = small.params(MODEL)
    narrow = computed_with(params, model.dtype)
    kinds = {jax.tree_util.keystr(p): str(x.dtype) for p, x in jax.tree_util.tree_leaves_with_path(narrow)}
    assert {name.rpartition("['")[2] for name, dtype in kinds.items() if dtype == "float32"} == {
        "head']", "router']", "scale']"
    }  # fmt: skip
    ids, ones = np.arange(12)[None] % 20, np.ones((1, 12), np.int32)

    def logits(params):
        return transformer.head(params, transformer.hidden_states(params, model, ids, ones)[0])

    np.testing.assert_array_equal(jax.jit(logits)(params), jax.jit(logits)(narrow))


def test_prompt_longer_than_the_window_is_named():
    long = Prompt(12, Problem("count_bits", "q", "a"), (2,) * 5)
    with pytest.raises(UserError, match="prompt 12 of task count_bits has 5 tokens, more than the prompt window of 4"):
        engine().generate([long], 2, Sampling(max_tokens=2), seed=0)
