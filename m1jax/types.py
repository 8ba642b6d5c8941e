"""The words that every part of m1jax shares: dimension key, data that travels, protocols. No logic.

Dimension key (a name ends in its letters; docstrings use the same ones):

    B  rows in a batch            T  positions computed         D  model width
    P  prompts                    S  positions attended to      N  query heads
    R  responses per prompt       V  vocabulary                 K  key/value heads
    E  experts                    F  expert hidden width        H  head width
    A  active experts per token   C  lightning chunk            L  layers

Alignment rule (the only one): `logprobs_BT[b, t]` belongs to `tokens_BT[b, t]` given all earlier tokens of that
row. Entry 0 has no prefix and is always masked. The shift happens in one place, `m1jax.model.logprobs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

Array = Any
"""One array: NumPy on the host, `jax.Array` inside a jitted function. Dtype and shape stand where it is used."""

Params = Any
"""A tree of arrays: the parameters of the decoder, as `m1jax.model.transformer.init` makes them."""

Ending = Literal["stop", "length", "repetition"]
ENDINGS: tuple[Ending, ...] = ("stop", "length", "repetition")
"""How a response ended: it sampled a stop token, filled the window, or was cut because it repeated itself."""

AGGREGATIONS = ("group_tokens", "update_tokens", "sample_mean", "sample_and_token", "constant")
"""How the tokens of an update are averaged; `m1jax.rl.batch` says what each one is."""


@dataclass(frozen=True)
class Problem:
    """One thing to solve, as a task states it.

    Attributes:
        task: name of the task it belongs to.
        question: the text put before the model (before any chat template).
        answer: the reference answer as text, or None where the verifier checks a property only.
        row: what the task's verifier needs, plain JSON values.
    """

    task: str
    question: str
    answer: str | None
    row: Mapping[str, Any] = field(default_factory=dict)


HELDOUT_INDEX = 1 << 31
"""Held-out prompts are numbered from here, so that their sampling noise is never that of a training prompt."""


@dataclass(frozen=True)
class Prompt:
    """A problem made ready for the engine.

    Attributes:
        index: global prompt index of the run; with (seed, sample, position) it fixes the sampling noise.
        problem: what is asked.
        token_ids: the prompt as the model reads it, template and BOS included.
    """

    index: int
    problem: Problem
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """One response, exactly as it was sampled (token in, token out: ids are never re-tokenised).

    Attributes:
        prompt_index: `Prompt.index` of its prompt.
        sample: which of the R responses to that prompt.
        token_ids: int32 [T], generated ids, the stop token included.
        rollout_logprobs: float32 [T], log-probability of each id under the full softmax at the sampling
            temperature, computed by the engine (the behaviour policy).
        ending: how it ended.
        weight_version: version of the weights that sampled it; of several, the oldest.
        expert_ids: integers [prompt + T, L, A], the experts that served each token of prompt and response in each
            layer, -1 where the engine did not see the token (the stop token, which it samples and does not read). None
            where it kept no record.
        weight_versions: int32 [T], the version of each token, where weights changed while it was sampled; else None.
    """

    prompt_index: int
    sample: int
    token_ids: np.ndarray
    rollout_logprobs: np.ndarray
    ending: Ending
    weight_version: int
    expert_ids: np.ndarray | None = None
    weight_versions: np.ndarray | None = None


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        max_tokens: response window in tokens, the stop token included.
        temperature: above 0 divides the logits; 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 samples the full softmax.
        top_k: keep the k most probable tokens; 0 keeps all.
        repetition_run: end a response after this many consecutive tokens that each had a probability above
            `repetition_probability` (system part E3 of the paper: 3,000 and 0.99); 0 never does.
        repetition_probability: see above; the tested probability is exp(rollout_logprobs).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_run: int = 0
    repetition_probability: float = 0.99

    def __post_init__(self):
        for name, sound, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("repetition_run", self.repetition_run >= 0, "at least 0"),
            ("repetition_probability", 0 < self.repetition_probability < 1, "between 0 and 1"),
        ):
            if not sound:
                raise ValueError(f"{name}: {getattr(self, name)} must be {rule}")


@runtime_checkable
class Engine(Protocol):
    """What turns prompts into rollouts: in this process, or a server elsewhere."""

    def set_weights(self, params: Params, version: int) -> None:
        """Use these parameters from the next call on and stamp rollouts with `version`.

        The arrays live until the next update, which writes over their memory: copy what is to stay longer.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], responses: int, sampling: Sampling, seed: int) -> list[list[Rollout]]:
        """Return, for every prompt in order, its `responses` rollouts in order of `sample`."""
        ...


@runtime_checkable
class AsyncEngine(Engine, Protocol):
    """An engine that answers while something else goes on, an update of the trainer for example."""

    def submit(
        self, prompts: Sequence[Prompt], responses: int, sampling: Sampling, seed: int
    ) -> list[Future[list[Rollout]]]:
        """As `generate`, without waiting: one future for each prompt, which can be cancelled.

        `set_weights` does not wait for what is under way; which weights sampled what stands in the rollouts.
        """
        ...


@runtime_checkable
class MeasuredEngine(Engine, Protocol):
    """An engine that tells what it went through."""

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last call."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What a verifier said of one response.

    Attributes:
        score: the verifier's value in [0, 1]; 0 where it failed, NaN where it gave none.
        outcome: "scored", "error" (the verifier raised, or left [0, 1]), "timeout" (it was killed) or "unscored" (it
            returned None or NaN: it does not know).
    """

    score: float
    outcome: Literal["scored", "error", "timeout", "unscored"] = "scored"


@runtime_checkable
class Task(Protocol):
    """A family of problems with a verifier.

    `verifier` names a function `(answer: str, row: dict) -> float in [0, 1]` as "module:function", so that a worker
    process can load it; `row` is `Problem.row`.
    """

    @property
    def name(self) -> str:
        """Name in tables and metrics, unlike any other task's in the run."""
        ...

    @property
    def verifier(self) -> str:
        """The verifier's "module:function"."""
        ...

    def __len__(self) -> int:
        """Number of problems (a procedural task: as many as were asked for)."""
        ...

    def __getitem__(self, index: int) -> Problem:
        """Problem number `index`, the same at every call."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One generation batch, cut into updates and micro-batches; every leading axis is [updates, micro, rows].

    Attributes:
        tokens: int32 [U, M, B, T], packed rows of prompts and responses.
        segment_ids: int32 [U, M, B, T], 1, 2, ... by rollout, 0 on padding.
        weights: float32 [U, M, B, T], what the loss multiplies each token by: masks, groups and aggregation in
            one number; 0 where a token is not ours to learn from.
        advantages: float32 [U, M, B, T].
        rollout_logprobs: float32 [U, M, B, T], by the alignment rule; 0 where `weights` is 0.
        group_ids: int32 [U, M, B, T], 1, 2, ... by prompt on the tokens that have a weight, else 0.
        reference_logprobs: float32 [U, M, B, T] of the frozen reference, 0 where `weights` is 0; None without one.
        expert_ids: integers [U, M, B, T, L, A], the experts that served in the engine, -1 where there is no record;
            None without a replay of routers.
    """

    tokens: Array
    segment_ids: Array
    weights: Array
    advantages: Array
    rollout_logprobs: Array
    group_ids: Array
    reference_logprobs: Array | None = None
    expert_ids: Array | None = None
