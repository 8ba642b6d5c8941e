"""The decoder against the recorded reference model, and its three ways of computing the same thing.

Tolerance of the recorded numbers: 1e-4 absolute on logits of scale 10 is what differing float32 implementations
need; ours agree to about 1e-5, so 2e-5 is asserted.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.model import cache as cache_lib
from m1jax.model import transformer
from m1jax.model.logprobs import token_logprobs
from tests.model import golden

CONFIG = golden.config()
TINY = dataclasses.replace(CONFIG, lightning_chunk=16, attention_block=16)


@pytest.fixture(scope="module")
def params():
    return golden.weights()


@pytest.fixture(scope="module")
def numbers():
    return golden.numbers()


@partial(jax.jit, static_argnums=1)
def logits(params, config, tokens_BT, segment_ids_BT, cache=None):
    hidden_MD, cache, _ = transformer.hidden_states(params, config, tokens_BT, segment_ids_BT, cache)
    return transformer.head(params, hidden_MD).reshape(*tokens_BT.shape, -1), cache


jit_logprobs = jax.jit(token_logprobs, static_argnums=1)


def test_logits_and_logprobs_are_the_reference_models(params, numbers):
    tokens_BT = jnp.asarray(numbers["input_ids"])
    ours_BTV, _ = logits(params, CONFIG, tokens_BT, jnp.ones_like(tokens_BT))
    np.testing.assert_allclose(ours_BTV[:, numbers["positions"]], numbers["logits"], rtol=0, atol=2e-5)
    logprobs_BT, _, _ = jit_logprobs(params, CONFIG, tokens_BT, jnp.ones_like(tokens_BT))
    np.testing.assert_allclose(logprobs_BT[:, 1:], numbers["logprobs"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["m1_kernel", "qwen2_tiny", "qwen2_tiny_tied", "llama_tiny_tied"])
def test_other_recorded_models(name):
    """Qwen2 with and without its own head, Llama, and a hybrid with heads of 64, by configuration alone.

    Qwen2's hidden states reach 32 and its logits differ by 2.2e-5 on some machines.
    """
    config, numbers, params = golden.config(name), golden.numbers(name), golden.weights(name)
    tokens_BT = jnp.asarray(numbers["input_ids"])
    ours_BTV, _ = logits(params, config, tokens_BT, jnp.ones_like(tokens_BT))
    np.testing.assert_allclose(ours_BTV[:, numbers["positions"]], numbers["logits"], rtol=0, atol=4e-5)
    logprobs_BT, _, _ = jit_logprobs(params, config, tokens_BT, jnp.ones_like(tokens_BT))
    np.testing.assert_allclose(logprobs_BT[:, 1:], numbers["logprobs"], rtol=0, atol=4e-5)


@pytest.mark.parametrize("name", ["qwen2_tiny", "qwen2_tiny_tied", "llama_tiny_tied"])
def test_gradients_of_other_recorded_models(name):
    """Biases and the tied embedding, which is reached from both ends, among them; the README's tolerance is 1e-4."""
    config, numbers, params = golden.config(name), golden.numbers(name), golden.weights(name)
    tokens_BT = jnp.asarray(numbers["grad_input_ids"])
    loss = lambda p: -token_logprobs(p, config, tokens_BT, jnp.ones_like(tokens_BT))[0][:, 1:].mean()  # noqa: E731
    value, ours = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(value - numbers["loss"]) < 1e-5
    theirs = jax.tree_util.tree_leaves_with_path(golden.gradients(name))
    for (path, reference), mine in zip(theirs, jax.tree.leaves(ours), strict=True):
        error = np.linalg.norm(mine - reference) / np.linalg.norm(reference)
        assert error < 2e-5, (jax.tree_util.keystr(path), error)


def test_trace_shows_what_each_layer_gives(params, numbers):
    """Raw outputs and router choices of the recorded model; nothing changes by looking."""
    tokens_BT = jnp.asarray(numbers["input_ids"])
    ones_BT = jnp.ones_like(tokens_BT)
    hidden_MD, _, layers = transformer.trace(params, CONFIG, tokens_BT, ones_BT)
    plain_MD, _, _ = transformer.hidden_states(params, CONFIG, tokens_BT, ones_BT)
    np.testing.assert_array_equal(hidden_MD, plain_MD)
    outputs = layers["output_LMD"].reshape(8, *tokens_BT.shape, -1)[:, :, numbers["positions"]]
    np.testing.assert_allclose(outputs, numbers["hidden"], rtol=0, atol=1e-4)
    chosen = np.argsort(-layers["router_probabilities_LME"], axis=-1)[..., :2]
    np.testing.assert_array_equal(chosen.reshape(numbers["router_ids"].shape), numbers["router_ids"])


def test_left_padded_batch_is_the_reference_models(params, numbers):
    tokens_BT, mask_BT = jnp.asarray(numbers["padded_input_ids"]), numbers["padded_attention_mask"]
    ours_BTV, _ = logits(params, CONFIG, tokens_BT, jnp.asarray(mask_BT, jnp.int32))
    np.testing.assert_allclose(ours_BTV * mask_BT[..., None], numbers["padded_logits"], rtol=0, atol=2e-5)


def test_prefill_states_are_the_reference_models(params, numbers):
    tokens_BT = jnp.asarray(numbers["input_ids"])
    _, cache = logits(params, CONFIG, tokens_BT, jnp.ones_like(tokens_BT), cache_lib.empty(CONFIG, *tokens_BT.shape))
    states = numbers["states"]
    ours = np.stack([layer["state"] for layer in cache.layers if "state" in layer])
    np.testing.assert_allclose(ours, states, rtol=0, atol=1e-5 * np.abs(states).max())


def test_gradient_of_every_weight_is_the_reference_models(params, numbers):
    tokens_BT = jnp.asarray(numbers["grad_input_ids"])

    def loss(params):
        logprobs_BT, _, _ = token_logprobs(params, CONFIG, tokens_BT, jnp.ones_like(tokens_BT))
        return -logprobs_BT[:, 1:].mean()

    value, ours = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(value - numbers["loss"]) < 1e-5
    for (path, mine), reference in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(golden.gradients()), strict=True
    ):
        error = np.linalg.norm(mine - reference) / np.linalg.norm(reference)
        assert error < 2e-5, (jax.tree_util.keystr(path), error)


def test_greedy_decoding_is_the_reference_models(params, numbers):
    prompt_BT = jnp.asarray(numbers["greedy_prompt"])[None]
    cache = cache_lib.empty(CONFIG, 1, prompt_BT.shape[1] + len(numbers["greedy_ids"]))
    out_BTV, cache = logits(params, CONFIG, prompt_BT, jnp.ones_like(prompt_BT), cache)
    for expected, logprob in zip(numbers["greedy_ids"], numbers["greedy_logprobs"], strict=True):
        token = int(out_BTV[0, -1].argmax())
        assert token == expected
        assert abs(jax.nn.log_softmax(out_BTV[0, -1])[token] - logprob) < 2e-5
        out_BTV, cache = logits(params, CONFIG, jnp.full((1, 1), token), jnp.ones((1, 1), jnp.int32), cache)


@pytest.mark.parametrize("model", ["two_layers", "recorded"])
def test_decode_equals_prefill_equals_full_forward_at_every_split(model, params):
    """Three rows of unequal length, a prompt then token by token: the full forward's logits.

    Every split with a model of one layer of each kind, whose chunks and blocks of 4 the splits fall across; one split
    with the recorded model of eight layers.
    """
    config, T, splits = TINY, 8, (5,)
    if model == "two_layers":
        config = dataclasses.replace(
            CONFIG,
            num_layers=2,
            layer_pattern=("lightning", "softmax"),
            lightning_chunk=4,
            attention_block=4,
            init_std=0.2,
        )
        params, splits = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), config), range(1, T)
    lengths = np.array([T, 5, 1])
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(1, 256, (3, T)))
    segment_ids_BT = jnp.asarray(np.arange(T) < lengths[:, None], jnp.int32)
    live = np.asarray(segment_ids_BT, bool)
    full_BTV, _ = logits(params, config, tokens_BT, segment_ids_BT)
    for split in splits:
        head_BTV, cache = logits(
            params, config, tokens_BT[:, :split], segment_ids_BT[:, :split], cache_lib.empty(config, 3, T)
        )
        chunk_BTV, _ = logits(params, config, tokens_BT[:, split:], segment_ids_BT[:, split:], cache)
        prefill_BTV = np.concatenate([head_BTV, chunk_BTV], axis=1)
        assert np.abs(prefill_BTV - full_BTV)[live].max() < 1e-5, split
        steps = [head_BTV]
        for t in range(split, T):
            step_B1V, cache = logits(params, config, tokens_BT[:, t : t + 1], segment_ids_BT[:, t : t + 1], cache)
            steps.append(step_B1V)
        assert np.abs(np.concatenate(steps, axis=1) - full_BTV)[live].max() < 1e-5, split
        np.testing.assert_array_equal(cache.lengths, lengths)


def test_packed_segments_equal_separate_rows(params):
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(1, 256, n) for n in (9, 21, 5))
    packed = jnp.asarray(np.concatenate([a, b, c, np.zeros(3, int)]))[None]
    segment_ids = jnp.asarray(np.repeat([1, 2, 3, 0], [9, 21, 5, 3]))[None]
    packed_BTV, _ = logits(params, TINY, packed, segment_ids)
    start = 0
    for row in (a, b, c):
        alone_BTV, _ = logits(params, TINY, jnp.asarray(row)[None], jnp.ones((1, len(row)), jnp.int32))
        np.testing.assert_allclose(packed_BTV[0, start : start + len(row)], alone_BTV[0], rtol=0, atol=2e-5)
        start += len(row)


def test_ways_to_compute_give_the_same_gradients(params):
    tokens_BT = jnp.asarray(np.random.default_rng(2).integers(1, 256, (2, 20)))

    def gradient(config):
        loss = lambda p: token_logprobs(p, config, tokens_BT, jnp.ones_like(tokens_BT))[0][:, 1:].mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain = gradient(TINY)
    for how in ({"remat": "layer"}, {"scan_layers": False}, {"scan_layers": False, "remat": "layer"}):
        other = gradient(dataclasses.replace(TINY, **how))
        # Sums in another order: a few eps of float32 of the terms, which reach 3.
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-6, err_msg=str(how)), plain, other)


def test_a_seed_means_the_parameters_that_it_always_meant():
    """Runs are told by their seeds: these four entries are of runs on record, each drawn by the key of another path."""
    drawn = transformer.init(jax.random.key(0), dataclasses.replace(CONFIG, init_std=0.02))
    lightning, softmax = (drawn["periods"][name] for name in ("0_lightning", "1_softmax"))
    found = [drawn["embedding"][0, 0], drawn["head"][0, 0], lightning["attention"]["qkv"].reshape(-1)[-1]]
    found.append(softmax["mlp"]["gate"].reshape(-1)[-1])
    np.testing.assert_allclose(found, [0.00152285, 0.01203511, 0.02615115, -0.00827950], rtol=1e-5)


def test_every_parameter_names_its_axes():
    shapes = jax.eval_shape(lambda key: transformer.init(key, TINY), jax.random.key(0))
    axes = transformer.logical_axes(TINY)
    flat_axes = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    for (path, shape), names in zip(jax.tree_util.tree_leaves_with_path(shapes), flat_axes, strict=True):
        assert len(names) == len(shape.shape), jax.tree_util.keystr(path)
    qkv = axes["periods"]["0_lightning"]["attention"]["qkv"]
    assert tuple(qkv) == ("periods", "layers", "embed", "heads", None, "head_dim")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 12}, "num_layers: 12 is not a multiple of layer_pattern's 8 layers"),
        ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads 4"),
        ({"rotary_dim": 18}, "rotary_dim: 18 must be even and at most head_dim 16"),
        ({"experts_per_token": 5}, "experts_per_token: 5 exceeds num_experts 4"),
        ({"layer_pattern": ("linear",)}, "layer_pattern: .*linear.* unknown"),
        ({"remat": "all"}, "remat: 'all' must be one of"),
        ({"experts_per_token": 0}, "experts_per_token: 0 of 4 experts would do nothing"),
        ({"max_positions": -1}, "max_positions: -1 must be at least 0"),
    ],
)
def test_impossible_shapes_are_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
