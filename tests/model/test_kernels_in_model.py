"""The decoder with each implementation of its kernels, against the recorded models and in a whole RL step.

Kernels of GPUs and TPUs are interpreted, on the first tokens of the recorded sequences.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.config import build, to_dict
from m1jax.errors import UserError
from m1jax.model import cache as cache_lib
from m1jax.model import transformer
from m1jax.model.config import LIGHTNING_KERNELS, MOE_KERNELS, KernelConfig
from m1jax.model.kernels import lightning_kernel, moe_kernel
from m1jax.model.logprobs import token_logprobs
from m1jax.pallas_kernels.compat import interpreted, lowering_for
from m1jax.pallas_kernels.lightning_attention import api
from m1jax.pallas_kernels.moe import api as moe_api
from m1jax.pallas_kernels.moe.ragged import has_tokamax
from m1jax.rl.loop import train
from m1jax.rl.settings import RLConfig
from m1jax.train.sft import SFTConfig
from m1jax.train.sft import train as fine_tune
from tests import runs
from tests.model import golden

T = 130  # two blocks of 64 and a tail


def with_kernel(name, implementation, dtype="float32"):
    """The golden model with `implementation` wherever there is one of that name."""
    of_lightning = implementation if implementation in LIGHTNING_KERNELS else "auto"
    kernels = KernelConfig(lightning=of_lightning, moe=implementation)
    return dataclasses.replace(golden.config(name), kernels=kernels, dtype=dtype)


def logits(params, config, tokens_BT, segment_ids_BT, cache=None):
    hidden_MD, cache, _ = transformer.hidden_states(params, config, tokens_BT, segment_ids_BT, cache)
    return transformer.head(params, hidden_MD).reshape(*tokens_BT.shape, -1), cache


def compiled(config):
    """Return `logits` of this config, traced anew, done when they return (see the test of slots in test_kernels.py)."""
    run = jax.jit(lambda *args: logits(args[0], config, *args[1:]))
    return lambda *args: jax.block_until_ready(run(*args))


TOKAMAX = pytest.param("tokamax", marks=pytest.mark.skipif(not has_tokamax(), reason="an extra"))
SLOW_TINY = pytest.param("m1_tiny", marks=pytest.mark.slow)  # eight layers


@pytest.mark.parametrize("name", [SLOW_TINY, "m1_kernel"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic_tpu", "ragged_dot", TOKAMAX])
def test_recorded_logits_states_and_greedy_tokens(implementation, name):
    config, numbers, params = with_kernel(name, implementation), golden.numbers(name), golden.weights(name)
    run = compiled(config)
    kept = numbers["positions"] < T
    with interpreted():
        tokens_BT = jnp.asarray(numbers["input_ids"][:, :T])
        ours_BTV, _ = run(params, tokens_BT, jnp.ones_like(tokens_BT))
        np.testing.assert_allclose(
            ours_BTV[:, numbers["positions"][kept]], numbers["logits"][:, kept], rtol=0, atol=2e-5
        )

        if name == "m1_tiny":
            live_BT = numbers["padded_attention_mask"].astype(np.int32)
            padded_BT, cache = jnp.asarray(numbers["padded_input_ids"]), cache_lib.empty(config, 3, 48)
            ours_BTV, cache = run(params, padded_BT, live_BT, cache)
            ours, theirs = (np.asarray(x)[live_BT > 0] for x in (ours_BTV, numbers["padded_logits"]))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
            states = [layer["state"] for layer in cache.layers if "state" in layer]
            for ours, theirs in zip(states, numbers["padded_states"], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

        prompt_BT, ids = jnp.asarray(numbers["greedy_prompt"])[None], numbers["greedy_ids"][:6]
        ours_BTV, cache = run(params, prompt_BT, jnp.ones_like(prompt_BT), cache_lib.empty(config, 1, 110))
        for t, (token, logprob) in enumerate(zip(ids, numbers["greedy_logprobs"], strict=False)):
            last_V = jax.nn.log_softmax(ours_BTV[0, -1])
            assert int(last_V.argmax()) == token, t
            assert abs(float(last_V[token]) - logprob) < 2e-5, t
            one_11 = jnp.full((1, 1), token, jnp.int32)
            ours_BTV, cache = run(params, one_11, jnp.ones_like(one_11), cache)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "mosaic_tpu", "ragged_dot", TOKAMAX])
def test_recorded_gradients(implementation):
    """`xla` is held to them in test_transformer."""
    config, numbers, params = with_kernel("m1_tiny", implementation), golden.numbers(), golden.weights()
    tokens_BT = jnp.asarray(numbers["grad_input_ids"])
    loss = lambda p: -token_logprobs(p, config, tokens_BT, jnp.ones_like(tokens_BT))[0][:, 1:].mean()  # noqa: E731
    with interpreted():
        value, ours = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(value - numbers["loss"]) < 1e-5
    theirs = jax.tree_util.tree_leaves_with_path(golden.gradients())
    for (path, expected), found in zip(theirs, jax.tree.leaves(ours), strict=True):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        pytest.param("mosaic_tpu", "m1_tiny", marks=pytest.mark.slow),
        ("mosaic_tpu", "m1_kernel"),
        pytest.param("mosaic_gpu", "m1_tiny", marks=pytest.mark.heavy),  # minutes of its interpreter
        ("mosaic_gpu", "m1_kernel"),
    ],
)
def test_in_bfloat16_kernels_are_no_further_from_the_record_than_plain_jax(implementation, name):
    """Weights and activations in bfloat16 err by themselves; what the kernels add by rounding q, k and v is less."""
    numbers, params = golden.numbers(name), golden.weights(name)
    kept, tokens_BT = numbers["positions"] < T, jnp.asarray(numbers["input_ids"][:, :T])
    error = {}
    for each in ("xla", implementation):
        # Layer by layer: Flax refuses a scan over what the GPU interpreter's callbacks return.
        config = dataclasses.replace(with_kernel(name, each, "bfloat16"), scan_layers=False)
        run = compiled(config)
        with interpreted():
            whole_BTV, _ = run(params, tokens_BT, jnp.ones_like(tokens_BT))
            cache = cache_lib.empty(config, 2, T)
            ours_BTV, cache = run(params, tokens_BT[:, :-3], jnp.ones_like(tokens_BT[:, :-3]), cache)
            for t in range(T - 3, T):
                step_BTV, cache = run(params, tokens_BT[:, t : t + 1], jnp.ones((2, 1), jnp.int32), cache)
                np.testing.assert_allclose(
                    jax.nn.softmax(step_BTV[:, 0]), jax.nn.softmax(whole_BTV[:, t]), rtol=0, atol=0.05
                )
        away = np.asarray(whole_BTV[:, numbers["positions"][kept]], np.float64) - numbers["logits"][:, kept]
        error[each] = np.sqrt((away**2).mean())
    assert error[implementation] < 1.5 * error["xla"], error


def test_names_in_a_config_are_those_of_the_kernels():
    assert set(LIGHTNING_KERNELS) == {"auto", *api.IMPLEMENTATIONS}
    assert set(MOE_KERNELS) == {"auto", *moe_api.IMPLEMENTATIONS}


def test_auto_is_the_best_of_the_backend():
    def chosen(dtype):
        config = with_kernel("m1_kernel", "auto", dtype)
        assert moe_kernel(config) == lightning_kernel(config)
        return lightning_kernel(config)

    assert chosen("float32") == chosen("bfloat16") == "xla"
    with lowering_for("gpu"):
        assert (chosen("float32"), chosen("bfloat16")) == ("xla", "mosaic_gpu")
    with lowering_for("tpu"):
        assert (chosen("float32"), chosen("bfloat16"), chosen("float64")) == ("mosaic_tpu", "mosaic_tpu", "xla")


def run_config(folder, **kernels):
    return build(RLConfig, runs.rl_values(folder, steps=1, evaluation__every=10) | {"kernels": kernels})


def test_a_run_keeps_its_choice_in_one_place(tmp_path):
    config = run_config(tmp_path, lightning="reference")
    assert config.model.kernels.lightning == "reference"
    written = to_dict(config)
    assert written["kernels"]["lightning"] == "reference" and "kernels" not in written["model"]
    assert build(RLConfig, written) == config


def test_a_named_kernel_that_cannot_run_is_one_line_before_the_run_begins(tmp_path):
    with pytest.raises(UserError, match=r"config.kernels.lightning: .*'mosaic_tpu' cannot run here: .*'auto'"):
        train(run_config(tmp_path, lightning="mosaic_tpu"), tmp_path)
    with pytest.raises(UserError, match=r"config.kernels.moe: .*'mosaic_gpu' cannot run here: .*'auto'"):
        train(run_config(tmp_path, moe="mosaic_gpu"), tmp_path)
    dense = runs.rl_values(tmp_path, model__num_experts=0, model__experts_per_token=0, kernels={"moe": "xla"})
    with pytest.raises(UserError, match="config.kernels.moe: 'xla', but the model has no mixture of experts; leave it"):
        train(build(RLConfig, dense), tmp_path)
    with pytest.raises(UserError, match=r"config.kernels.softmax: 'splash' cannot run here: it needs a TPU"):
        train(run_config(tmp_path, softmax="splash"), tmp_path)
    with pytest.raises(UserError, match=r"config.kernels.lightning: 'triton' must be one of"):
        run_config(tmp_path, lightning="triton")
    with pytest.raises(UserError, match=r"config.kernels.lightning: .*'mosaic_gpu' cannot run here"):
        fine_tune(build(SFTConfig, runs.sft_values(kernels={"lightning": "mosaic_gpu"})), tmp_path)
    values = runs.rl_values(tmp_path, model__kernels={"lightning": "xla"})
    with pytest.raises(UserError, match=r"config.model.kernels: unknown key"):
        build(RLConfig, values)


@pytest.mark.slow
def test_update_and_rollout_of_a_run_use_the_chosen_kernel(tmp_path, monkeypatch):
    """One generation batch by the TPU's kernels, interpreted: what was sampled has the trainer's probabilities."""
    traced = set()

    def counted(name, function, *args, **kwargs):
        traced.add(name)
        return function(*args, **kwargs)

    kernel = api.IMPLEMENTATIONS["mosaic_tpu"]
    watched = api.Implementation(*(partial(counted, f, getattr(kernel, f)) for f in kernel._fields))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_tpu", watched)
    quiet, params = {"log": lambda line: None}, runs.bigram()
    with interpreted():
        result = train(run_config(tmp_path, lightning="mosaic_tpu"), tmp_path / "tpu", params=params, **quiet)
    assert traced == {"lightning_attention", "decode"}
    assert result.metrics[-1]["mismatch/largest_logprob_gap"] < 1e-4
    plain = train(run_config(tmp_path, lightning="xla"), tmp_path / "xla", params=params, **quiet)
    assert (
        result.metrics[-1]["rollout/tokens"] == plain.metrics[-1]["rollout/tokens"]
    )  # the same noise, so the same ids
    for name in ("train/loss", "train/grad_norm", "rollout/entropy"):
        np.testing.assert_allclose(result.metrics[-1][name], plain.metrics[-1][name], rtol=1e-4, atol=1e-6)
