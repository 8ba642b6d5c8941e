"""Router losses and metrics: by hand, and in the supervised update."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.config import build
from m1jax.errors import UserError
from m1jax.model.logprobs import token_logprobs
from m1jax.sharding import data_mesh
from m1jax.train.next_token import TokenBatch, make_supervised_update
from m1jax.train.router import RouterConfig, SupervisedRouterConfig, auxiliary_loss, router_metrics
from m1jax.train.sft import SFTConfig
from m1jax.train.state import TrainState
from tests import runs
from tests.rl import small


def test_metrics_by_hand():
    """Two layers, four experts, A = 2, 10 tokens: loads 10, 6, 4, 0 and 5, 5, 5, 5."""
    metrics = router_metrics(
        {
            "tokens": np.array([10, 10]),
            "expert_tokens": np.array([[10, 6, 4, 0], [5, 5, 5, 5]]),
            "entropy": np.array([5.0, 10.0]),
            "small_margins": np.array([1, 0]),
            "balance_loss": np.array([30.0, 20.0]),
            "z_loss": np.array([1.0, 4.0]),
        }
    )
    assert metrics == pytest.approx(
        {
            "router/load_largest_over_mean": 1.5,
            "router/load_largest_over_mean_worst_layer": 2.0,
            "router/load_smallest_over_mean_worst_layer": 0.0,
            "router/entropy": 0.75,
            "router/small_margin_share": 0.05,
            "router/balance_loss": 2.5,
            "router/z_loss": 0.25,
            "router/share_expert_0": 0.375,
            "router/share_expert_1": 0.275,
            "router/share_expert_2": 0.225,
            "router/share_expert_3": 0.125,
        }
    )
    assert router_metrics({}) == {}


def test_a_coefficient_of_zero_leaves_no_trace():
    sums = {"balance_loss": jnp.ones(2), "z_loss": jnp.ones(2)}
    assert type(auxiliary_loss(sums, RouterConfig(0.0, 0.0), jnp.int32(3))) is int
    assert type(auxiliary_loss({}, RouterConfig(0.0, 0.0), jnp.int32(3))) is int


def test_refusals():
    for values in (dict(balance_coefficient=-0.1), dict(balance_coefficient=0.0, z_coefficient=math.inf)):
        with pytest.raises(UserError, match="must be at least 0 and finite"):
            build(RouterConfig, values)
    assert build(SFTConfig, runs.sft_values()).router == SupervisedRouterConfig(1e-3, 0.0)
    part = build(SFTConfig, runs.sft_values(router=dict(z_coefficient=0.1))).router
    assert part == SupervisedRouterConfig(1e-3, 0.1)  # the balance loss stays on
    dense = dict(model__num_experts=0, model__experts_per_token=0)
    with pytest.raises(UserError, match="config.router.balance_coefficient: 0.001, but a dense model has no router"):
        build(SFTConfig, runs.sft_values(**dense))
    with pytest.raises(UserError, match="config.router.z_coefficient: 0.5, but a dense model has no router"):
        build(SFTConfig, runs.sft_values(router=dict(balance_coefficient=0.0, z_coefficient=0.5), **dense))
    assert build(SFTConfig, runs.sft_values(router=dict(balance_coefficient=0.0), **dense)).model.num_experts == 0


def test_supervised_gradient_has_the_z_loss_of_the_whole_batch():
    """In four micro-batches of unequal live tokens, against cross entropy and z-loss of all rows at once."""
    with jax.enable_x64(True):
        model = small.config("float64")
        params, prompts = small.params(model), small.prompts()
        packed = small.batch(prompts, small.rollouts(prompts), micro_rows=4)
        batch = TokenBatch(packed.tokens[0], packed.segment_ids[0], packed.weights[0].astype(np.float64))
        assert len(set((batch.segment_ids > 0).sum(axis=(1, 2)).tolist())) > 1

        def loss(params):
            tokens, segments, weights = (x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(batch))
            logprobs, _, routed = token_logprobs(params, model, tokens, segments)
            z_loss = (routed["z_loss"] / routed["tokens"]).mean()
            return -jnp.sum(jnp.where(weights > 0, weights * logprobs, 0)) + 0.2 * z_loss

        expected = jax.jit(jax.grad(loss))(params)
        sgd = optax.sgd(1.0)
        update = make_supervised_update(model, sgd, data_mesh(), router=RouterConfig(0.0, 0.2))
        copy = jax.tree.map(jnp.copy, params)
        after, metrics = update(TrainState(copy, sgd.init(params), jnp.int32(0), jax.random.key(0)), batch)
        for old, new, other in zip(*map(jax.tree.leaves, (params, after.params, expected)), strict=True):
            assert np.linalg.norm(old - new - other) <= 1e-10 * np.linalg.norm(other)
        assert metrics["router"]["tokens"].tolist() == [(batch.segment_ids > 0).sum()] * 2
