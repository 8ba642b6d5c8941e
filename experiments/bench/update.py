"""Where the seconds of one update go: the experts, both kinds of attention, the optimizer, and the rest.

    python -m experiments.bench.update [--config=configs/rl_tiny_cpu.py] [--model=proxy_100m --rows=4 --tokens=512]
                                       [--rounds=7]

The update is that of the RL config on made-up responses; `--model` puts a model of configs/models.py in its place, and
`--rows`, `--tokens` choose its micro-batch, one to an update. A stage's share is what the update saves without it: its
core is left out, forward and backward, and what goes in comes out. All variants take turns, round after round; medians.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo, before JAX starts

import jax
import jax.numpy as jnp

from configs import models
from experiments import cli
from experiments.bench.core import interleaved_medians
from experiments.bench.metrics import made_up_batch, program
from m1jax.config import build
from m1jax.errors import UserError
from m1jax.model import attention, lightning, moe
from m1jax.rl import update
from m1jax.rl.settings import RLConfig
from m1jax.train.state import TrainState


def _no_lightning(q, k, v, slopes, *, initial_state_BNHH=None, **_):
    B, _, N, H = q.shape
    return v + 0 * (q + k), jnp.zeros((B, N, H, H), jnp.float32)  # 0 *: their projections still have gradients


def _no_softmax(q, k, v, **_):
    return q + 0 * jnp.repeat(k + v, q.shape[2] // k.shape[2], axis=2)


def _no_optimizer(state: TrainState, grads: Any, *_: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    # Parameters that depend on the gradient, so that it is computed.
    params = jax.tree.map(lambda p, g: p - 1e-9 * g.astype(p.dtype), state.params, grads)
    norms: dict[str, jax.Array] = {name: jnp.zeros(()) for name in ("grad_norm", "update_norm", "param_norm")}
    return TrainState(params, state.opt_state, state.updates + 1, state.key), norms


WITHOUT = {
    "experts (sort, products, sum)": {moe: {"expert_mlp": lambda x_MD, *_, **__: x_MD}},
    "lightning attention": {lightning: {"lightning_attention": _no_lightning}},
    "softmax attention": {attention: {"softmax_attention": _no_softmax}},
    "AdamW and norms": {update: {"apply_gradients": _no_optimizer}},
}
"""What stands in for the core of a stage: module, function and replacement."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/rl_tiny_cpu.py")
    parser.add_argument("--model", default="", metavar="NAME", help="of a function in configs/models.py")
    parser.add_argument(
        "--rows", type=int, default=0, help="of a micro-batch, one to an update; the config's by default"
    )
    parser.add_argument("--tokens", type=int, default=0, help="of a row; the config's by default")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    return cli.guard(lambda: bench(arguments), memory="--rows and --tokens to fewer")


def bench(arguments: argparse.Namespace) -> None:
    """Measure and print the table.

    Raises:
        UserError: there is no such model.
    """
    config = load(arguments)
    batch = made_up_batch(config)
    variants = {"one update": {}} | WITHOUT
    medians, _ = interleaved_medians(
        {name: program(config, batch, replaced) for name, replaced in variants.items()}, arguments.rounds
    )
    updates, micro_batches, rows, tokens = batch.tokens.shape
    whole, *without = (medians[name] / updates for name in variants)
    seconds = {name: whole - rest for name, rest in zip(WITHOUT, without, strict=True)}
    seconds["projections, head, norms, loss, metrics"] = whole - sum(seconds.values())
    full = int((batch.weights > 0).any(axis=(2, 3)).sum())  # micro-batches without a live token are skipped
    print(
        f"{arguments.model or arguments.config}: an update of {full / updates:g} micro-batches of {rows} x {tokens}, "
        f"{config.model.dtype}, {arguments.rounds} rounds, {jax.device_count()} {jax.default_backend()} device(s)"
    )
    for name, value in (seconds | {"one update": whole}).items():
        print(f"{name:<42}{value:8.3f} s{value / whole:8.1%}")


def load(arguments: argparse.Namespace) -> RLConfig:
    """The config, with another model and micro-batch where they are asked for."""
    values = cli.load_config(arguments.config)
    if arguments.model:
        found = getattr(models, arguments.model, None)
        if getattr(found, "__module__", "") != models.__name__:  # ConfigDict is there too
            raise UserError(f"--model: there is no {arguments.model!r} in configs/models.py")
        values["model"] = getattr(models, arguments.model)().to_dict()
    if arguments.tokens:
        values["sampling"]["max_tokens"] = arguments.tokens - values["problems"]["max_prompt_tokens"]
        values["update"]["row_tokens"] = arguments.tokens
    if arguments.rows:
        values["rollout"] |= {"prompts": 2, "responses": arguments.rows, "engine_rows": arguments.rows}
        values["update"] |= {"updates_per_batch": 2, "micro_batch_rows": arguments.rows}
    return build(RLConfig, values)


if __name__ == "__main__":
    raise SystemExit(main())
