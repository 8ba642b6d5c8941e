"""Which prompts are asked when: one batch at a time, or up to `staleness` batches before they are trained on.

With a bound of k, the weights that a token was sampled with are at most k generation batches older than those that are
updated with it; 0 is on policy. The next batches are asked before an update begins, so that they are generated while it
runs:

    k = 0      generate 0 | update 0 | generate 1 | update 1 | ...
    k = 1      generate 0 | update 0 | update 1   | update 2 | ...
                            generate 1 generate 2   generate 3

What is not finished when weights change goes on with the new ones where the engine can do that (a server can); each
token keeps its version. When a batch is due there are two ways to deal with groups that are still being answered.
"wait" takes prompts in their order. "next_batch" takes the groups that are there and leaves the others for the next
batch, which needs more of them under way than a batch takes: half a batch for every k above 1 (by Little's law a group
then stays (k + 1) / 2 batches in the mean). Groups that would be older than the bound are given up, counted and asked
anew.

Short answers finish first. "wait" gives every prompt its turn; under "next_batch" long answers come later, or, where
they take longer than the bound allows, never: `rollout/dropped_stale` tells.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from m1jax.errors import Stopped, UserError
from m1jax.rl.prompts import PromptSource
from m1jax.types import AsyncEngine, Engine, Prompt, Rollout, Sampling


@dataclass(frozen=True)
class _Group:
    """A prompt that was asked: the step whose weights were current then, and its answers to come."""

    prompt: Prompt
    asked: int
    answers: concurrent.futures.Future[list[Rollout]]


class Ahead:
    """The prompts of a run, asked in order.

    Args:
        engine, source, sampling, seed: who is asked what, and how.
        prompts, responses: of a generation batch.
        staleness, unfinished: see above.
        cursor: the first prompt that was never asked.
        carried: prompts before it that were asked and not trained on.

    Raises:
        UserError: a bound above 0, and the engine can only be waited for.
    """

    def __init__(
        self,
        engine: Engine,
        source: PromptSource,
        sampling: Sampling,
        seed: int,
        prompts: int,
        responses: int,
        staleness: int = 0,
        unfinished: str = "wait",
        cursor: int = 0,
        carried: Iterable[int] = (),
    ):
        if staleness and not isinstance(engine, AsyncEngine):
            raise UserError(
                f"config.rollout.staleness: {staleness}, and this engine ({type(engine).__name__}) has no `submit` "
                f"that answers while the trainer updates; choose 0"
            )
        self.engine, self.source, self.sampling, self.seed = engine, source, sampling, seed
        self.prompts, self.responses = prompts, responses
        self.staleness, self.unfinished = staleness, unfinished
        self._cursor, self._carried = cursor, sorted(carried)
        self._groups: dict[int, _Group] = {}  # under way, or finished and not taken
        self._taken: dict[int, _Group | None] = {}  # by the batch that is being collected
        self._dropped = 0
        self._ages: dict[int, np.ndarray] = {}  # of the tokens of each prompt that was taken

    @property
    def position(self) -> tuple[int, list[int]]:
        """(cursor, carried): what a run that is resumed asks first."""
        cursor, carried = self._cursor, sorted({*self._carried, *self._groups, *self._taken})
        while carried and carried[-1] == cursor - 1:
            cursor = carried.pop()
        return cursor, carried

    def take(self, count: int, step: int) -> tuple[list[Prompt], list[list[Rollout]]]:
        """The next `count` groups for the batch that updates the weights of `step`."""
        if not self.staleness:
            prompts = [self.source[index] for index in self._next(count)]
            self._taken |= dict.fromkeys(p.index for p in prompts)
            rollouts = self.engine.generate(prompts, self.responses, self.sampling, self.seed)
        else:
            self._ask(count - len(self._groups), step)
            chosen = self._in_order(count, step) if self.unfinished == "wait" else self._finished(count)
            self._taken |= {group.prompt.index: self._groups.pop(group.prompt.index) for group in chosen}
            prompts, rollouts = [g.prompt for g in chosen], [g.answers.result() for g in chosen]
            for prompt, group in zip(prompts, rollouts, strict=True):
                versions = [r.weight_version if r.weight_versions is None else r.weight_versions for r in group]
                ages = [step - np.broadcast_to(v, len(r.token_ids)) for v, r in zip(versions, group, strict=True)]
                self._ages[prompt.index] = np.concatenate(ages)
        return prompts, rollouts

    def done(self, again: Sequence[int]) -> None:
        """The batch is collected; of what was taken for it these prompts are to be asked again, or taken later."""
        for index in again:
            self._ages.pop(index, None)
            group = self._taken[index]
            if group is None:
                self._carried = sorted({*self._carried, index})
            else:
                self._groups[index] = group
        self._taken = {}

    def ask_ahead(self, step: int, steps: int) -> None:
        """Before the weights of `step` are updated: ask what the next batches, of `steps` in all, will be made of."""
        left = steps - step - 1
        if not self.staleness or left < 1:
            return
        for index, group in list(self._groups.items()):
            if group.asked < step + 1 - self.staleness:
                self._again(index, step)
        batches = self.staleness if self.unfinished == "wait" else (self.staleness + 1) / 2
        self._ask(int(min(batches, left) * self.prompts) - len(self._groups), step)

    def take_metrics(self) -> dict[str, float]:
        """How old the tokens of the last batch were, in generation batches, and what became too old."""
        if not self.staleness:
            return {}
        ages, self._ages = np.concatenate([*self._ages.values()] or [np.zeros(1)]), {}
        dropped, self._dropped = self._dropped, 0
        return {
            "rollout/staleness_mean": float(ages.mean()),
            "rollout/staleness_largest": int(ages.max()),
            "rollout/dropped_stale": dropped,
            "rollout/groups_under_way": len(self._groups),
        }

    def close(self) -> None:
        """Give up what is under way."""
        for group in self._groups.values():
            group.answers.cancel()

    def _next(self, count: int) -> list[int]:
        """The next `count` indices to ask: those that were left over, then new ones."""
        again, self._carried = self._carried[:count], self._carried[count:]
        new = range(self._cursor, self._cursor + count - len(again))
        self._cursor = new.stop
        return [*again, *new]

    def _ask(self, count: int, step: int) -> None:
        if count > 0:
            self._submit([self.source[index] for index in self._next(count)], step)

    def _submit(self, prompts: list[Prompt], step: int) -> None:
        assert isinstance(self.engine, AsyncEngine)
        answers = self.engine.submit(prompts, self.responses, self.sampling, self.seed)
        for prompt, future in zip(prompts, answers, strict=True):
            self._groups[prompt.index] = _Group(prompt, step, future)

    def _again(self, index: int, step: int) -> None:
        """Give a group up for its age, and ask its prompt anew."""
        group = self._groups.pop(index)
        group.answers.cancel()
        self._dropped += self.responses
        self._submit([group.prompt], step)

    def _in_order(self, count: int, step: int) -> list[_Group]:
        """The first `count` groups by their prompts, once they are finished."""
        indices = sorted(self._groups)[:count]
        for index in indices:
            self._wait(self._groups[index])
            while min(r.weight_version for r in self._groups[index].answers.result()) < step - self.staleness:
                self._again(index, step)
                self._wait(self._groups[index])
        return [self._groups[index] for index in indices]

    def _finished(self, count: int) -> list[_Group]:
        """`count` groups that are finished, once there are so many: the oldest first."""
        while True:
            groups = sorted(self._groups.values(), key=lambda g: (g.asked, g.prompt.index))
            finished = [g for g in groups if g.answers.done()]
            if failed := next((g for g in finished if g.answers.exception()), None):
                failed.answers.result()
            if len(finished) >= count:
                return finished[:count]
            pending = [g.answers for g in groups if not g.answers.done()]
            concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_COMPLETED)
            self._give_up_if_stopped()

    def _give_up_if_stopped(self) -> None:
        if getattr(self.engine, "stopped", lambda: False)():
            raise Stopped

    def _wait(self, group: _Group) -> None:
        """Wait in steps, between which a signal is seen."""
        while not group.answers.done():
            concurrent.futures.wait([group.answers], 0.5)
            self._give_up_if_stopped()
        group.answers.result()
