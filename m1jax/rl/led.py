"""Rollout servers in a job of several processes: the first one asks, and the others are told.

Which prompts a batch is made of, and what was answered, hangs on when servers answer; were two processes to ask, they
would train on different batches. The event loop of the first is idle most of the time with hundreds of answers under
way, so that one is enough. Weights are gathered tensor by tensor, so that none but the largest has to fit into a host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from m1jax.model.config import ModelConfig
from m1jax.rl.ahead import Ahead
from m1jax.rl.engine_sglang import SGLangEngine
from m1jax.sharding import to_host
from m1jax.train.hosts import from_first
from m1jax.types import Engine, Params, Prompt, Rollout, Sampling
from m1jax.weights.hf_names import HFTensor, hf_tensors


class LedEngine:
    """An `Engine` that is the first process's.

    Args:
        engine: in the first process; None in the others.
        model: whose parameters are set.
    """

    def __init__(self, engine: SGLangEngine | None, model: ModelConfig):
        self.engine, self._tensors = engine, {tensor.name: tensor for tensor in hf_tensors(model)}
        if engine is not None:
            engine.read = lambda params, tensor: _whole(params, self._tensors[from_first(lambda: tensor.name)])

    def set_weights(self, params: Params, version: int) -> None:
        error: Exception | None = None
        if self.engine is not None:
            try:
                self.engine.set_weights(params, version)
            except Exception as raised:
                error = raised
            from_first(lambda: "")  # no further tensor
        else:
            while name := from_first(lambda: ""):
                _whole(params, self._tensors[name])

        def outcome() -> None:
            if error is not None:
                raise error

        from_first(outcome)

    def generate(self, prompts: Sequence[Prompt], responses: int, sampling: Sampling, seed: int) -> list[list[Rollout]]:
        def ask() -> list[list[Rollout]]:
            assert self.engine is not None
            return self.engine.generate(prompts, responses, sampling, seed)

        return from_first(ask)

    def take_metrics(self) -> dict[str, float]:
        return {} if self.engine is None else self.engine.take_metrics()


class LedPrompts:
    """What a run asks of `Ahead`, which is the first process's."""

    def __init__(self, ahead: Ahead | None):
        self.ahead = ahead

    @property
    def position(self) -> tuple[int, list[int]]:
        return (0, []) if self.ahead is None else self.ahead.position  # the first saves

    def take(self, count: int, step: int) -> tuple[list[Prompt], list[list[Rollout]]]:
        def take() -> tuple[list[Prompt], list[list[Rollout]]]:
            assert self.ahead is not None
            return self.ahead.take(count, step)

        return from_first(take)

    def done(self, again: Sequence[int]) -> None:
        if self.ahead is not None:
            self.ahead.done(again)

    def ask_ahead(self, step: int, steps: int) -> None:
        if self.ahead is not None:
            self.ahead.ask_ahead(step, steps)

    def take_metrics(self) -> dict[str, float]:
        return {} if self.ahead is None else self.ahead.take_metrics()


def led(
    servers: SGLangEngine | None, model: ModelConfig, ahead: Callable[[Engine], Ahead]
) -> tuple[Engine, Ahead | LedPrompts]:
    """Engine and prompts of a run on servers, which are the first process's; alone it has them for itself."""
    prompts = None if servers is None else ahead(servers)
    if servers is not None and prompts is not None and jax.process_count() == 1:
        return servers, prompts
    return LedEngine(servers, model), LedPrompts(prompts)


def _whole(params: Params, tensor: HFTensor) -> np.ndarray:
    """The values of one tensor, as our leaf has them, in every process."""
    leaf = params
    for name in tensor.leaf:
        leaf = leaf[name]
    return to_host(_at(leaf, tensor.index))


@jax.jit
def _at(leaf: jax.Array, index: tuple[int, ...]) -> jax.Array:
    return leaf[index]
