"""What the metrics of an update cost: the same update with and without them, interleaved.

    python -m experiments.bench.metrics [--config=configs/zero_rl_tiny_cpu.py] [--rounds=7]

Made-up responses of the config's shapes that fill half of the window. Without metrics XLA leaves out what only they
need; the losses, gradients and optimizer are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import numpy as np

from experiments import cli
from experiments.bench.core import interleaved_medians
from m1jax.config import build
from m1jax.rl import update as module
from m1jax.rl.batch import make_batch
from m1jax.rl.settings import RLConfig
from m1jax.sharding import data_mesh
from m1jax.train.optimizer import make_optimizer
from m1jax.train.state import init_state
from m1jax.types import Batch, Problem, Prompt, Rollout

NOTHING = {
    "token_metrics": lambda *_: {},
    "gradient_magnitudes": lambda *_: {},
    "eps_dominated_share": lambda *_: 0.0,
    "cosine": lambda *_: 0.0,
}
"""In place of the functions of `m1jax.rl.update` that make metrics and nothing else."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/zero_rl_tiny_cpu.py")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    return cli.guard(lambda: bench(arguments.config, arguments.rounds))


def bench(path: str, rounds: int) -> None:
    """Print the medians and their ratio."""
    config = build(RLConfig, cli.load_config(path))
    batch = made_up_batch(config)
    medians, _ = interleaved_medians(
        {"with": program(config, batch), "without": program(config, batch, {module: NOTHING})}, rounds
    )
    more = medians["with"] / medians["without"] - 1
    print(f"{path}: {batch.tokens.shape} tokens in a generation batch, {rounds} rounds, {jax.default_backend()}")
    print(f"update with metrics {medians['with']:.3f} s, without {medians['without']:.3f} s: {more:+.1%}")


def program(
    config: RLConfig, batch: Batch, replaced: Mapping[ModuleType, Mapping[str, Callable[..., Any]]] | None = None
) -> Callable[[], Any]:
    """All updates of the batch, again and again on one state, with some functions of some modules replaced."""
    mesh, optimizer = data_mesh(), make_optimizer(config.optimizer)
    state = [init_state(0, config.model, optimizer, mesh)]
    update = module.make_update(
        config.model, config.loss, optimizer, mesh,
        temperature=config.sampling.temperature, passes=config.update.passes, adam=config.optimizer,
    )  # fmt: skip

    def run() -> None:
        with ExitStack() as stack:  # acts when the first call traces the update
            for where, names in (replaced or {}).items():
                for name, stand_in in names.items():
                    stack.enter_context(mock.patch.object(where, name, stand_in))
            state[0], told = update(state[0], batch)
        jax.block_until_ready((state[0], told))

    return run


def made_up_batch(config: RLConfig) -> Batch:
    """Random ids; every group live."""
    rng, window = np.random.default_rng(0), config.sampling.max_tokens
    prompt_ids = lambda: tuple(rng.integers(8, config.model.vocab_size, config.problems.max_prompt_tokens).tolist())  # noqa: E731
    prompts = [Prompt(i, Problem("", "", None), prompt_ids()) for i in range(config.rollout.prompts)]

    def response(prompt: int, sample: int) -> Rollout:
        length = rng.integers(1, window + 1)
        ids = rng.integers(8, config.model.vocab_size, length).astype(np.int32)
        return Rollout(prompt, sample, ids, np.full(length, -3.0, np.float32), "stop", 0)

    rollouts = [[response(p.index, r) for r in range(config.rollout.responses)] for p in prompts]
    shape = (config.rollout.prompts, config.rollout.responses)
    return make_batch(
        prompts,
        rollouts,
        rng.normal(size=shape),
        np.ones(shape, bool),
        config.batch_shape,
        config.loss.aggregation,
        window,
    )


if __name__ == "__main__":
    raise SystemExit(main())
