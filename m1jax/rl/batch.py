"""Rollouts to the arrays of one generation batch. Host side, NumPy; it knows neither the model nor an engine.

All of masks, groups and aggregation becomes *one weight per token* here, so that the loss is a plain sum. The live
groups are dealt out evenly to the updates, whole groups only, and the rollouts of an update are packed into rows:

    update u   row 0   [prompt a | response a0][prompt a | response a1][prompt b | resp..] pad pad
               row 1   [prompt b | response b1] ...
    weights            0 on prompts and padding; on every response token (the stop token too: it is an action)
                         group_tokens    1 / (tokens of its group)  / (groups in the update)
                         update_tokens   1 / (tokens of the update)

Each update is normalised by its *own* tokens: the total of the generation batch would be wrong by their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m1jax.data.packing import pack
from m1jax.types import Batch, Prompt, Rollout


@dataclass(frozen=True)
class UpdateConfig:
    """How a generation batch becomes updates.

    Attributes:
        updates_per_batch: optimizer updates for each pass over a generation batch (the paper: 16).
        passes: passes over the generation batch.
        micro_batch_rows: packed rows per forward and backward pass; lower it when memory runs out. It changes no
            result.
        row_tokens: length of a packed row; 0 means one prompt and response at their longest.
    """

    updates_per_batch: int = 16
    passes: int = 1
    micro_batch_rows: int = 32
    row_tokens: int = 0

    def __post_init__(self):
        for name in ("updates_per_batch", "passes", "micro_batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class BatchShape:
    """The static shape of every generation batch of a run, large enough for its worst case.

    Attributes:
        updates, micro_batches, rows, tokens: leading axes U, M, B and T of `Batch`.
    """

    updates: int
    micro_batches: int
    rows: int
    tokens: int

    @staticmethod
    def of(config: UpdateConfig, prompts: int, responses: int, window: int) -> BatchShape:
        """Shape for P prompts, R responses each and at most `window` tokens of prompt and response together."""
        tokens = config.row_tokens or window
        if tokens < window:
            raise ValueError(
                f"update.row_tokens: {tokens} is shorter than the longest prompt and response, {window} tokens"
            )
        if prompts % config.updates_per_batch:
            raise ValueError(
                f"update.updates_per_batch: {config.updates_per_batch} does not divide the {prompts} prompts of a "
                f"generation batch; updates are made of whole groups"
            )
        rollouts = prompts // config.updates_per_batch * responses
        rows = -(-rollouts // (tokens // window))
        return BatchShape(
            config.updates_per_batch, -(-rows // config.micro_batch_rows), config.micro_batch_rows, tokens
        )


def make_batch(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Sequence[Rollout]],
    advantages_PR: np.ndarray,
    live_P: np.ndarray,
    shape: BatchShape,
    aggregation: str,
) -> Batch:
    """Deal out the live groups to updates and pack their rollouts into rows.

    Args:
        prompts: P prompts.
        rollouts: their responses, R each.
        advantages_PR: one advantage per response.
        live_P: groups that take part; the others (zero variance) leave the batch and its counts.
        shape: static shape of the result.
        aggregation: "group_tokens" or "update_tokens", see above.

    Raises:
        ValueError: prompts and rollouts do not belong together.
    """
    lead = (shape.updates, shape.micro_batches * shape.rows, shape.tokens)
    tokens, segment_ids = np.zeros(lead, np.int32), np.zeros(lead, np.int32)
    weights, advantages, logprobs = (np.zeros(lead, np.float32) for _ in range(3))

    for update, groups in enumerate(np.array_split(np.flatnonzero(live_P), shape.updates)):
        lengths = {int(p): sum(len(r.token_ids) for r in rollouts[p]) for p in groups}
        items = [(int(p), i) for p in groups for i in range(len(rollouts[p]))]
        sizes = [len(prompts[p].token_ids) + len(rollouts[p][i].token_ids) for p, i in items]
        for (p, i), (row, start, segment) in zip(items, pack(sizes, shape.tokens), strict=True):
            prompt, rollout = prompts[p], rollouts[p][i]
            if rollout.prompt_index != prompt.index:
                raise ValueError(f"rollout of prompt {rollout.prompt_index} stands under prompt {prompt.index}")
            if row >= lead[1]:
                raise ValueError(f"update {update} needs more than its {lead[1]} rows of {shape.tokens} tokens")
            middle = start + len(prompt.token_ids)
            whole, response = (
                slice(start, middle + len(rollout.token_ids)),
                slice(middle, middle + len(rollout.token_ids)),
            )
            tokens[update, row, whole] = np.concatenate([prompt.token_ids, rollout.token_ids])
            segment_ids[update, row, whole] = segment
            if aggregation == "group_tokens":
                weights[update, row, response] = 1.0 / lengths[p] / len(groups)
            else:
                weights[update, row, response] = 1.0 / sum(lengths.values())
            advantages[update, row, response] = advantages_PR[p, i]
            logprobs[update, row, response] = rollout.rollout_logprobs

    split = lambda x: x.reshape(shape.updates, shape.micro_batches, shape.rows, shape.tokens)  # noqa: E731
    return Batch(split(tokens), split(segment_ids), split(weights), split(advantages), split(logprobs))
