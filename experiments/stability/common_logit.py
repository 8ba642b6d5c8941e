"""A model with large logits that computes the same function: a proxy of what a tiny model does not have.

MiniMax-M1 (section 3.2) found large activations in the LM head of a 456B model. Here all columns of the head get one
vector u more: every logit of a token rises by the same h . u, which softmax takes no notice of.

    p = softmax(h W) = softmax(h (W + u 1^T))

So in exact arithmetic nothing changes, neither a probability nor the gradient of any weight. In bfloat16, with its 8
bits, a logit between 128 and 256 is a whole number.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stability.bfloat16_head import bfloat16_head
from m1jax.config import to_dict
from m1jax.model.logprobs import token_logprobs
from m1jax.model.observe import observe
from m1jax.rl.run import local_engine, open_questions
from m1jax.rl.settings import RLConfig
from m1jax.sharding import data_mesh
from m1jax.train.checkpoint import Checkpoints
from m1jax.types import Params, Prompt, Rollout

RESPONSES = 4
"""Responses to each prompt of a sweep."""


def add_common_logit(params: Params, direction_D: np.ndarray, size: float) -> Params:
    """The same function with logits larger by `size`, on the mean of the tokens.

    Args:
        params: with a head of their own.
        direction_D: mean of the head's inputs h; u is parallel to it, so that h . u is `size` on the mean.
        size: what is added.
    """
    u_D = size * direction_D / (direction_D @ direction_D)
    return {**params, "head": jnp.asarray(params["head"]) + jnp.asarray(u_D, jnp.float32)[:, None]}


def save(params: Params, config: RLConfig, folder: Path) -> None:
    """A checkpoint that a run can start from."""
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(0, {"params": params}, {"config": {"model": to_dict(config.model)}}, wait=True)


def mean_head_input(params: Params, config: RLConfig) -> np.ndarray:
    """float32 [D]: mean input of the head over responses to the config's held-out prompts."""
    prompts, generate = _sampler(params, config)
    tokens_BT, segment_ids_BT, _ = as_rows(prompts, generate(params), _window(config))
    seen = observe(params, config.model, tokens_BT, segment_ids_BT, "chunked")
    return np.asarray(seen.final_BTD, np.float32)[segment_ids_BT > 0].mean(axis=0)


def sweep(params: Params, direction_D: np.ndarray, config: RLConfig, sizes: Sequence[float], head: str) -> list[dict]:
    """Trainer against engine before any training, by size of the common logit.

    Returns:
        By size: Pearson's correlation of their token probabilities, mean and largest |gap| of log-probabilities,
        and the entropy of what was sampled.
    """
    rows = []
    with bfloat16_head() if head == "bfloat16" else nullcontext():
        prompts, generate = _sampler(params, config)
        trainer = jax.jit(lambda params, tokens, segments: token_logprobs(params, config.model, tokens, segments)[0])
        for size in sizes:
            changed = add_common_logit(params, direction_D, size)
            tokens_BT, segment_ids_BT, rollout_BT = as_rows(prompts, generate(changed), _window(config))
            policy_BT, live_BT = np.asarray(trainer(changed, tokens_BT, segment_ids_BT)), ~np.isnan(rollout_BT)
            policy, rollout = policy_BT[live_BT].astype(np.float64), rollout_BT[live_BT].astype(np.float64)
            gap = np.abs(policy - rollout)
            correlation = float(np.corrcoef(np.exp(policy), np.exp(rollout))[0, 1])
            rows.append(
                {
                    "head": head, "size": size, "tokens": len(policy), "correlation": correlation,
                    "mean_gap": float(gap.mean()), "largest_gap": float(gap.max()), "entropy": float(-rollout.mean()),
                }
            )  # fmt: skip
    return rows


def as_rows(
    prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]], window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens_BT and segment_ids_BT, one response a row behind its prompt; and rollout_logprobs_BT, NaN elsewhere."""
    pairs = [(prompt, rollout) for prompt, group in zip(prompts, rollouts, strict=True) for rollout in group]
    tokens_BT, segment_ids_BT = (np.zeros((len(pairs), window), np.int32) for _ in range(2))
    rollout_BT = np.full((len(pairs), window), np.nan, np.float32)
    for row, (prompt, rollout) in enumerate(pairs):
        middle = len(prompt.token_ids)
        end = middle + len(rollout.token_ids)
        tokens_BT[row, :end] = [*prompt.token_ids, *rollout.token_ids]
        segment_ids_BT[row, :end] = 1
        rollout_BT[row, middle:end] = rollout.rollout_logprobs
    return tokens_BT, segment_ids_BT, rollout_BT


def _sampler(params: Params, config: RLConfig):
    """Held-out prompts, and what samples responses to them with given parameters."""
    mesh, questions = data_mesh(), open_questions(config)
    engine = local_engine(config, questions, mesh)

    def generate(params: Params):
        engine.set_weights(params, 0)
        return engine.generate(questions.heldout, RESPONSES, config.sampling, config.seed)

    return questions.heldout, generate


def _window(config: RLConfig) -> int:
    return config.problems.max_prompt_tokens + config.sampling.max_tokens
