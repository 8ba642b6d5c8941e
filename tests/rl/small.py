"""A decoder of two layers and a generation batch, small enough for exact tests."""

import dataclasses

import jax
import numpy as np

from m1jax.model import transformer
from m1jax.model.config import ModelConfig
from m1jax.model.logprobs import token_logprobs
from m1jax.rl.advantage import group_advantages
from m1jax.rl.batch import BatchShape, UpdateConfig, make_batch
from m1jax.rl.loss import LossConfig
from m1jax.types import Batch, Problem, Prompt, Rollout


def config(dtype: str = "float32") -> ModelConfig:
    return ModelConfig(
        vocab_size=23, num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=4,
        num_experts=3, experts_per_token=2, expert_dim=12, lightning_alpha=1.4, softmax_alpha=1.4, mlp_alpha=1.4,
        layer_pattern=("lightning", "softmax"), init_std=0.3, dtype=dtype, param_dtype=dtype,
        lightning_chunk=8, attention_block=8,
    )  # fmt: skip


def one_layer(dtype: str = "float32") -> ModelConfig:
    """The least that has log-probabilities: softmax attention and one MLP for all tokens."""
    return dataclasses.replace(
        config(dtype), num_layers=1, layer_pattern=("softmax",), num_experts=0, experts_per_token=0
    )


_init = jax.jit(transformer.init, static_argnums=1)
logprobs = jax.jit(token_logprobs, static_argnums=(1, 4))


def params(model: ModelConfig, seed: int = 0):
    return _init(jax.random.key(seed), model)


def prompts(count: int = 4) -> list[Prompt]:
    rng = np.random.default_rng(5)
    return [Prompt(i, Problem("t", f"q{i}", "a"), tuple(rng.integers(2, 23, 2 + i % 3).tolist())) for i in range(count)]


def rollouts(prompts_: list[Prompt], responses: int = 4, seed: int = 1) -> list[list[Rollout]]:
    """Ragged responses of 1 to 8 tokens with made-up engine log-probabilities."""
    rng = np.random.default_rng(seed)
    return [
        [
            Rollout(
                p.index, r, rng.integers(1, 23, n).astype(np.int32), -rng.exponential(2, n).astype(np.float32),
                "stop", 0,
            )
            for r, n in enumerate(rng.integers(1, 9, responses))
        ]
        for p in prompts_
    ]  # fmt: skip


def routed(prompts_: list[Prompt], rollouts_: list[list[Rollout]], model: ModelConfig) -> list[list[Rollout]]:
    """The same with made-up experts of every token but the last."""
    rng = np.random.default_rng(2)

    def experts(tokens: int) -> np.ndarray:
        order = rng.permuted(
            np.tile(np.arange(model.num_experts, dtype=np.int8), (tokens, model.num_layers, 1)), axis=2
        )
        order[-1] = -1
        return order[:, :, : model.experts_per_token]

    return [
        [dataclasses.replace(r, expert_ids=experts(len(p.token_ids) + len(r.token_ids))) for r in group]
        for p, group in zip(prompts_, rollouts_, strict=True)
    ]


CISPO = LossConfig(weight_cap=5.0)


def batch(
    prompts_, rollouts_, *, updates=1, micro_rows=16, row_tokens=0, loss=CISPO, rewards=None, router_replay=False
) -> Batch:
    responses = len(rollouts_[0])
    if rewards is None:
        rewards = np.random.default_rng(7).integers(0, 2, (len(prompts_), responses)) + 0.1 * np.arange(responses)
    advantages, live = group_advantages(rewards, loss.advantage_scale, loss.std)
    update = UpdateConfig(updates_per_batch=updates, micro_batch_rows=micro_rows, row_tokens=row_tokens)
    shape = BatchShape.of(update, len(prompts_), responses, window=12)
    reference = None
    if loss.kl_coefficient:
        rng = np.random.default_rng(3)
        reference = [[-rng.exponential(2, len(r.token_ids)) for r in group] for group in rollouts_]
    return make_batch(
        prompts_, rollouts_, advantages, live, shape, loss.aggregation, 8, reference, router_replay=router_replay
    )
