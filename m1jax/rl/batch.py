"""Rollouts to the arrays of one generation batch. Host side, NumPy; it knows neither the model nor an engine.

All of masks, groups and aggregation becomes *one weight per token* here, so that the loss is a plain sum. The live
groups are dealt out evenly to the updates, whole groups only, and the rollouts of an update are packed into rows:

    update u   row 0   [prompt a | response a0][prompt a | response a1][prompt b | resp..] pad pad
               row 1   [prompt b | response b1] ...
    weights            0 on prompts and padding; on every response token (the stop token too: it is an action)
                         group_tokens      1 / (tokens of its group) / (groups)     CISPO, equation 4; ScaleRL
                         update_tokens     1 / (tokens)                             DAPO
                         sample_mean       1 / (tokens of its response) / (responses)   GRPO
                         sample_and_token  the mean of sample_mean and update_tokens
                         constant          1 / (longest response allowed) / (responses)  Dr. GRPO

Groups, responses and tokens are those of the *update*: the total of the generation batch would be wrong by the number
of updates. `sample_and_token` is our reading of the combined sample-level loss and token-level normalisation by which
MiniMax-M1 keeps long negative responses from drowning the short ones; the paper gives no formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    live_PR: np.ndarray,
    shape: BatchShape,
    aggregation: str,
    longest: int,
    reference: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    router_replay: bool = False,
) -> Batch:
    """Deal out the live groups to updates and pack their live rollouts into rows.

    Args:
        prompts: P prompts.
        rollouts: their responses, R each.
        advantages_PR: one advantage per response.
        live_PR: responses that take part; the others leave the batch and its counts, and so does a group without any.
        shape: static shape of the result.
        aggregation: one of `AGGREGATIONS`, see above.
        longest: tokens that a response may have.
        reference: log-probabilities of the frozen reference, one array for each response; None without one.
        router_replay: pack the experts that served; every rollout has them then.

    Raises:
        ValueError: prompts and rollouts do not belong together, or rollouts lack their experts.
    """
    lead = (shape.updates, shape.micro_batches * shape.rows, shape.tokens)
    tokens, segment_ids, group_ids = (np.zeros(lead, np.int32) for _ in range(3))
    weights, advantages, logprobs = (np.zeros(lead, np.float32) for _ in range(3))
    reference_logprobs = None if reference is None else np.zeros(lead, np.float32)

    expert_ids = None
    if router_replay:
        if (first := rollouts[0][0].expert_ids) is None:
            raise ValueError("router_replay: the rollouts are without their experts")
        expert_ids = np.full((*lead, *first.shape[1:]), -1, first.dtype)

    for place in _places(prompts, rollouts, live_PR, shape, aggregation, longest):
        p, i, row, response = place.prompt, place.response, place.row, place.where
        prompt, rollout = prompts[p], rollouts[p][i]
        whole = slice(response.start - len(prompt.token_ids), response.stop)
        tokens[row][whole] = np.concatenate([prompt.token_ids, rollout.token_ids])
        segment_ids[row][whole] = place.segment
        group_ids[row][response] = p + 1
        weights[row][response] = place.weight
        advantages[row][response] = advantages_PR[p, i]
        logprobs[row][response] = rollout.rollout_logprobs
        if reference is not None and reference_logprobs is not None:
            reference_logprobs[row][response] = reference[p][i]
        if expert_ids is not None:
            expert_ids[row][whole] = rollout.expert_ids

    cut = lambda x: x.reshape(shape.updates, shape.micro_batches, shape.rows, *x.shape[2:])  # noqa: E731
    tokens, segment_ids, weights, advantages = map(cut, (tokens, segment_ids, weights, advantages))
    reference_logprobs = None if reference_logprobs is None else cut(reference_logprobs)
    expert_ids = None if expert_ids is None else cut(expert_ids)
    return Batch(
        tokens, segment_ids, weights, advantages, cut(logprobs), cut(group_ids), reference_logprobs, expert_ids
    )


def of_responses(
    values_UMBT: np.ndarray, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]], shape: BatchShape
) -> list[list[np.ndarray]]:
    """Values of a batch in which every response is live, as one array [its tokens] for each response."""
    live_PR = np.ones((len(prompts), len(rollouts[0])), bool)
    values = values_UMBT.reshape(shape.updates, shape.micro_batches * shape.rows, shape.tokens)
    result = [[np.zeros(0, np.float32)] * len(group) for group in rollouts]
    for place in _places(prompts, rollouts, live_PR, shape, "constant", 1):
        result[place.prompt][place.response] = values[place.row][place.where]
    return result


@dataclass(frozen=True)
class _Place:
    """Where response number `response` of prompt number `prompt` lies: [update, row], the slice of its tokens."""

    prompt: int
    response: int
    row: tuple[int, int]
    where: slice
    segment: int
    weight: float


def _places(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Sequence[Rollout]],
    live_PR: np.ndarray,
    shape: BatchShape,
    aggregation: str,
    longest: int,
) -> Iterator[_Place]:
    """Deal out the live groups to the updates and pack each update's responses; see the top of the file."""
    for update, groups in enumerate(np.array_split(np.flatnonzero(live_PR.any(axis=1)), shape.updates)):
        items = [(int(p), int(i)) for p in groups for i in np.flatnonzero(live_PR[p])]
        lengths = [len(rollouts[p][i].token_ids) for p, i in items]
        sizes = [len(prompts[p].token_ids) + n for (p, _), n in zip(items, lengths, strict=True)]
        token_weights = aggregate(np.array(lengths), np.array([p for p, _ in items]), aggregation, longest)
        for n, ((p, i), (row, start, segment)) in enumerate(zip(items, pack(sizes, shape.tokens), strict=True)):
            if rollouts[p][i].prompt_index != prompts[p].index:
                raise ValueError(
                    f"rollout of prompt {rollouts[p][i].prompt_index} stands under prompt {prompts[p].index}"
                )
            if row >= shape.micro_batches * shape.rows:
                raise ValueError(
                    f"update {update} needs more than its {shape.micro_batches * shape.rows} rows of {shape.tokens} "
                    f"tokens"
                )
            where = slice(start + len(prompts[p].token_ids), start + sizes[n])
            yield _Place(p, i, (update, row), where, segment, token_weights[n])


def aggregate(lengths_N: np.ndarray, group_N: np.ndarray, aggregation: str, longest: int) -> np.ndarray:
    """float64 [N]: the weight of every token of each of an update's N responses.

    Args:
        lengths_N: their tokens.
        group_N: the number of each one's group.
        aggregation: one of `AGGREGATIONS`.
        longest: tokens that a response may have.
    """
    responses, total = max(len(lengths_N), 1), max(lengths_N.sum(), 1)
    if aggregation == "group_tokens":
        _, index_N = np.unique(group_N, return_inverse=True)
        tokens_G = np.bincount(index_N, lengths_N)
        return 1 / tokens_G[index_N] / max(len(tokens_G), 1)
    return {
        "update_tokens": np.full(len(lengths_N), 1 / total),
        "sample_mean": 1 / lengths_N / responses,
        "sample_and_token": (1 / lengths_N / responses + 1 / total) / 2,
        "constant": np.full(len(lengths_N), 1 / longest / responses),
    }[aggregation]
