"""All updates of a generation batch: split invariance, anchors, skipped updates, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.model.logprobs import token_logprobs
from m1jax.rl.engine_local import LocalEngine
from m1jax.rl.loss import LossConfig, LossInput, cispo
from m1jax.rl.update import make_update
from m1jax.sharding import data_mesh
from m1jax.train.optimizer import OptimizerConfig, make_optimizer
from m1jax.train.state import TrainState, init_state
from m1jax.types import Sampling
from tests.rl import small

MESH = data_mesh()
ADAMW = OptimizerConfig(learning_rate=1e-2)


LOSSES = {
    "cispo": LossConfig(weight_cap=5.0),
    "reinforce": LossConfig(kind="reinforce"),
    "unified": LossConfig(kind="unified", mask="ppo", clip_low=0.2, clip_high=0.28, weight_cap=2.0),
    "dapo": LossConfig(kind="ppo_clip", clip_low=0.2, clip_high=0.28, aggregation="update_tokens"),
    "grpo": LossConfig(kind="ppo_clip", clip_low=0.2, clip_high=0.2, aggregation="sample_mean", dual_clip=3.0),
    "grpo_kl": LossConfig(
        kind="ppo_clip",
        clip_low=0.2,
        clip_high=0.2,
        aggregation="sample_mean",
        kl_coefficient=0.04,
        kl_in="loss",
        kl_estimator="k3",
    ),  # fmt: skip
    "dr_grpo": LossConfig(kind="ppo_clip", clip_low=0.2, clip_high=0.2, aggregation="constant", advantage_scale="none"),
    "mismatch": LossConfig(weight_cap=5.0, ratio_anchor="trainer", mismatch_cap=2.0, aggregation="sample_and_token"),
}


def gradient_by_update(model, params, batch, loss=LOSSES["cispo"]) -> dict:
    """The gradient as the update itself sums it: SGD with rate 1 turns it into a difference of parameters."""
    sgd = optax.sgd(1.0)
    update = make_update(model, loss, sgd, MESH, temperature=1.0, passes=1)
    state = TrainState(jax.tree.map(jnp.copy, params), sgd.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))
    after, _ = update(state, batch)
    return jax.tree.map(lambda old, new: old - new, params, after.params)


def relative(a, b) -> float:
    """Largest difference of a tensor in units of its norm, over all tensors."""
    errors = jax.tree.map(lambda x, y: float(jnp.linalg.norm(x - y) / jnp.maximum(jnp.linalg.norm(y), 1e-30)), a, b)
    return max(jax.tree.leaves(errors))


SPLITS = ((8, 0), (4, 0), (2, 0), (16, 30), (3, 24))
"""Rows of a micro-batch, tokens of a row: 2, 4 and 8 micro-batches; packed rows; packed rows with rows of padding."""


def test_no_split_of_the_batch_changes_the_gradient():
    """1, 2, 4 and 8 micro-batches, packed rows and padding rows, ragged lengths: one gradient."""
    with jax.enable_x64(True):
        check_splits(small.config("float64"), LOSSES["cispo"], SPLITS, 1e-10)


def test_in_float32_too_the_gradient_of_splits_is_one():
    check_splits(small.config(), LOSSES["cispo"], ((2, 0), (3, 24)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"cispo"}))
def test_no_split_changes_the_gradient_of_any_loss(name):
    """What the losses differ in is what they sum over: one layer will do, and of the splits two."""
    with jax.enable_x64(True):
        check_splits(small.one_layer("float64"), LOSSES[name], ((4, 0), (3, 24)), 1e-10)


@pytest.mark.heavy
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_every_loss_with_every_split_in_every_precision(name, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        check_splits(small.config(dtype), LOSSES[name], SPLITS, tolerance)


def check_splits(model, loss, splits, tolerance):
    params, prompts = small.params(model), small.prompts()
    rollouts = small.rollouts(prompts)
    whole = gradient_by_update(model, params, small.batch(prompts, rollouts, micro_rows=16, loss=loss), loss)
    assert relative(whole, jax.tree.map(jnp.zeros_like, whole)) > 1
    for micro_rows, row_tokens in splits:
        batch = small.batch(prompts, rollouts, micro_rows=micro_rows, row_tokens=row_tokens, loss=loss)
        split = gradient_by_update(model, params, batch, loss)
        assert relative(split, whole) < tolerance, (micro_rows, row_tokens)


def test_mismatch_weight_multiplies_every_token_up_to_its_cap():
    """An engine that says exp(-0.25) of the trainer's probability for every token: weight e^0.25; e^1: the cap, 2."""
    model = small.config()
    params, prompts = small.params(model), small.prompts()
    batch = small.batch(prompts, small.rollouts(prompts))
    flat = lambda x: jnp.asarray(x).reshape(-1, x.shape[-1])  # noqa: E731
    trainer_BT, _, _ = small.logprobs(params, model, flat(batch.tokens), flat(batch.segment_ids))
    plain = LossConfig(weight_cap=5.0, ratio_anchor="trainer")
    without = gradient_by_update(model, params, batch, plain)
    for gap, weight in ((0.25, np.exp(0.25)), (1.0, 2.0)):
        engine = np.asarray(trainer_BT - gap).reshape(batch.tokens.shape)
        shifted = dataclasses.replace(batch, rollout_logprobs=engine)
        found = gradient_by_update(model, params, shifted, dataclasses.replace(plain, mismatch_cap=2.0))
        assert relative(found, jax.tree.map(lambda g, w=weight: w * g, without)) < 1e-5


def test_gradient_is_that_of_equation_4_written_out():
    """Against a loop over groups and responses that knows no batch: 1/groups * 1/tokens * sum w A logp."""
    with jax.enable_x64(True):
        model = small.config("float64")
        params, prompts = small.params(model), small.prompts(2)
        rollouts = small.rollouts(prompts, responses=3)
        rewards = np.array([[1.0, 0, 0], [0, 1.0, 1.0]])
        advantages = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)

        def objective(params):
            total = 0.0
            for p, prompt in enumerate(prompts):
                tokens, start = sum(len(r.token_ids) for r in rollouts[p]), len(prompt.token_ids)
                for r, rollout in enumerate(rollouts[p]):
                    row = jnp.asarray([*prompt.token_ids, *rollout.token_ids])[None]
                    logprobs = token_logprobs(params, model, row, jnp.ones_like(row))[0][0, start:]
                    ratio = jnp.exp(logprobs - rollout.rollout_logprobs.astype(np.float64))
                    weight = jax.lax.stop_gradient(jnp.minimum(ratio, 5.0))
                    total = total + jnp.sum(weight * advantages[p, r] * logprobs) / tokens / len(prompts)
            return -total

        ours = gradient_by_update(model, params, small.batch(prompts, rollouts, rewards=rewards))
        # 1e-6, not 1e-10: weights and advantages travel as float32.
        assert relative(ours, jax.jit(jax.grad(objective))(params)) < 1e-6


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_engine_and_trainer_agree_on_every_logprob(temperature):
    """Sampled by the engine, recomputed by the trainer from packed rows: within 1e-4 at every temperature."""
    model = small.config()
    params, prompts = small.params(model), small.prompts()
    engine = LocalEngine(model, prompt_tokens=4, rows=16, stop_ids=(1,), mesh=MESH)
    engine.set_weights(params, 0)
    rollouts = engine.generate(prompts, 4, Sampling(max_tokens=8, temperature=temperature), seed=0)
    batch = small.batch(prompts, rollouts, row_tokens=30)
    flat = lambda x: jnp.asarray(x).reshape(-1, x.shape[-1])  # noqa: E731
    policy_BT, _, _ = small.logprobs(params, model, flat(batch.tokens), flat(batch.segment_ids), temperature)
    live = flat(batch.weights) > 0
    gap = jnp.abs(policy_BT - flat(batch.rollout_logprobs))[live]
    assert live.sum() > 40 and gap.max() < 1e-4
    if temperature != 1.0:
        wrong_BT, _, _ = small.logprobs(params, model, flat(batch.tokens), flat(batch.segment_ids), 1.0)
        assert jnp.abs(wrong_BT - flat(batch.rollout_logprobs))[live].max() > 1e-2


@pytest.mark.parametrize(
    ("anchor", "bound", "temperature"), [("rollout", 1e-4, 1.0), ("rollout", 1e-4, 0.6), ("trainer", 1e-5, 0.6)]
)
def test_ratio_starts_at_one_and_moves(anchor, bound, temperature):
    """Before update 1 |log r| is rounding; from update 2 on its mean is above 0. The anchor stays frozen."""
    model = small.config()
    params, prompts = small.params(model), small.prompts(8)
    engine = LocalEngine(model, prompt_tokens=4, rows=32, stop_ids=(1,), mesh=MESH)
    engine.set_weights(params, 0)
    rollouts = engine.generate(prompts, 4, Sampling(max_tokens=8, temperature=temperature), seed=0)
    if anchor == "trainer":  # an engine that is off by 0.5 must not matter
        rollouts = [[dataclasses.replace(r, rollout_logprobs=r.rollout_logprobs - 0.5) for r in g] for g in rollouts]
    optimizer = make_optimizer(ADAMW)
    loss = LossConfig(weight_cap=5.0, ratio_anchor=anchor)
    update = make_update(model, loss, optimizer, MESH, temperature=temperature, passes=2)
    state = init_state(0, model, optimizer, MESH, params)
    _, metrics = update(state, small.batch(prompts, rollouts, updates=4, micro_rows=4))
    assert metrics["largest_abs_log_ratio"].shape == (8,)
    assert metrics["largest_abs_log_ratio"][0] <= bound
    assert (metrics["abs_log_ratio"][1:] > 1e-3).all()


def test_update_without_a_live_token_touches_nothing():
    model = small.config()
    prompts = small.prompts(2)
    optimizer = make_optimizer(ADAMW)
    update = make_update(model, LossConfig(weight_cap=5.0), optimizer, MESH, temperature=1.0, passes=1)
    state = init_state(0, model, optimizer, MESH)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.updates))
    batch = small.batch(prompts, small.rollouts(prompts), rewards=np.ones((2, 4)))
    assert not (batch.weights > 0).any()
    after, metrics = update(state, batch)
    jax.tree.map(np.testing.assert_array_equal, before, (after.params, after.opt_state, after.updates))
    assert metrics["tokens"].tolist() == [0] and np.isfinite(metrics["loss"]).all()


def test_schedule_counts_applied_updates():
    """Four updates of which the last two have no group left: the count is 2."""
    model = small.config()
    prompts = small.prompts(4)
    rewards = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    optimizer = make_optimizer(ADAMW)
    update = make_update(model, LossConfig(weight_cap=5.0), optimizer, MESH, temperature=1.0, passes=1)
    batch = small.batch(prompts, small.rollouts(prompts), updates=4, rewards=rewards)
    after, metrics = update(init_state(0, model, optimizer, MESH), batch)
    assert int(after.updates) == 2
    assert (metrics["tokens"] > 0).tolist() == [True, True, False, False]


def test_capped_share_is_split_by_the_sign_of_the_advantage():
    """Engine log-probs of -20 put every ratio above the cap."""
    model = small.config()
    prompts = small.prompts(2)
    rollouts = [
        [dataclasses.replace(r, rollout_logprobs=np.full_like(r.rollout_logprobs, -20)) for r in g]
        for g in small.rollouts(prompts)
    ]
    optimizer = make_optimizer(ADAMW)
    update = make_update(model, LossConfig(weight_cap=2.0), optimizer, MESH, temperature=1.0, passes=1)
    batch = small.batch(prompts, rollouts)
    _, metrics = update(init_state(0, model, optimizer, MESH), batch)
    live = batch.weights > 0
    np.testing.assert_allclose(
        metrics["capped_share_positive"][0], ((batch.advantages > 0) & live).sum() / live.sum(), rtol=1e-6
    )
    np.testing.assert_allclose(metrics["capped_share_positive"] + metrics["capped_share_negative"], 1.0, rtol=1e-6)
    assert metrics["ratio_capped_mean"][0] == 2.0 and metrics["ratio_mean"][0] > 100


def test_correlation_is_pearsons():
    model = small.config()
    params, prompts = small.params(model), small.prompts(2)
    rollouts = small.rollouts(prompts)
    optimizer = make_optimizer(ADAMW)
    update = make_update(model, LossConfig(weight_cap=5.0), optimizer, MESH, temperature=1.0, passes=1)
    batch = small.batch(prompts, rollouts)
    flat = lambda x: np.asarray(x).reshape(-1, x.shape[-1])  # noqa: E731
    policy_BT, entropy_BT, _ = small.logprobs(params, model, flat(batch.tokens), flat(batch.segment_ids))
    live = flat(batch.weights) > 0
    expected = np.corrcoef(np.exp(policy_BT[live]), np.exp(flat(batch.rollout_logprobs)[live]))[0, 1]
    _, metrics = update(init_state(0, model, optimizer, MESH, params), batch)
    np.testing.assert_allclose(metrics["probability_correlation"][0], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"][0], np.asarray(entropy_BT)[live].mean(), rtol=1e-5)


def test_the_loss_of_the_update_is_the_loss_function():
    model = small.config()
    params, prompts = small.params(model), small.prompts(2)
    batch = small.batch(prompts, small.rollouts(prompts))
    optimizer = make_optimizer(ADAMW)
    update = make_update(model, LossConfig(weight_cap=5.0), optimizer, MESH, temperature=1.0, passes=1)
    flat = lambda x: jnp.asarray(x).reshape(-1, x.shape[-1])  # noqa: E731
    policy_BT, _, _ = small.logprobs(params, model, flat(batch.tokens), flat(batch.segment_ids))
    arrays = (batch.rollout_logprobs, batch.advantages, batch.weights, batch.group_ids)
    expected = cispo(LossInput(policy_BT, *map(flat, arrays)), weight_cap=5.0)
    _, metrics = update(init_state(0, model, optimizer, MESH, params), batch)
    np.testing.assert_allclose(metrics["loss"][0], expected, rtol=1e-4)
