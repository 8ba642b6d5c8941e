"""The RL loop. Each stage is a file of this folder, in the order of the lines of `train`.

result = train(config, "runs/mine")            # in a notebook as from the command line
result.summary["heldout"], result.metrics, result.params
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from m1jax.errors import require_finite
from m1jax.rl import evaluate as evaluation
from m1jax.rl.advantage import group_advantages
from m1jax.rl.batch import make_batch
from m1jax.rl.collect import collect
from m1jax.rl.monitors import rollout_metrics, update_metrics
from m1jax.rl.run import Run, open_run
from m1jax.rl.settings import RLConfig
from m1jax.train.interrupt import Interrupted, StopSignal
from m1jax.train.report import RunResult, load_run
from m1jax.types import Engine, Params


def train(
    config: RLConfig,
    workdir: str | Path,
    params: Params | None = None,
    engine: Engine | None = None,
    log: Callable[[str], None] = print,
) -> RunResult:
    """Run, or resume, an RL run in `workdir` and return what it left there.

    Args:
        config: the whole run.
        workdir: its folder; one that holds the same config is resumed at its last checkpoint.
        params: start from these instead of `config.init_from`.
        engine: samples in place of the local engine, a server for example.
        log: takes the lines meant for a person.

    Raises:
        UserError: something in the config, the data or the folder is the user's to mend.
        NonFinite: the loss or a gradient is NaN or infinite; the last good checkpoint stays.
        Interrupted: SIGTERM or Ctrl-C, after saving.
    """
    with StopSignal() as stop, open_run(config, workdir, params, engine, log) as run:
        if run.saved < 0:
            evaluate(run)
        while run.step < config.steps and not stop.requested:
            generation = collect(run)  # prompts, rollouts, rewards; more prompts with dynamic sampling
            with run.clock.stage("batch"):
                loss, used = config.loss, generation.used
                advantages_PR, live_PR = group_advantages(generation.rewards_PR, loss.advantage_scale, loss.std, used)
                batch = make_batch(
                    generation.prompts, generation.rollouts, advantages_PR, live_PR, config.batch_shape,
                    loss.aggregation, config.sampling.max_tokens, generation.reference,
                    router_replay=config.rollout.router_replay != "off",
                )  # fmt: skip
            with run.clock.stage("update"):
                run.state, device_metrics = run.update(run.state, batch)
                trained = update_metrics(jax.device_get(device_metrics))
            run.step, run.cursor = run.step + 1, run.cursor + generation.consumed
            require_finite(run.step, "update", trained)
            with run.clock.stage("sync"):
                run.engine.set_weights(run.state.params, run.step)
            if run.step % config.evaluation.every == 0 or run.step == config.steps:
                evaluate(run)
            rollout = rollout_metrics(
                generation.prompts, generation.rollouts, generation.rewards_PR, generation.correct_PR
            )
            run.record(rollout | generation.metrics | trained)
            if run.step % config.checkpoint.every == 0:
                run.save()
        run.save()
        if run.step < config.steps:
            raise Interrupted(stop.exit_code)
        run.finish()
    return load_run(workdir)


def evaluate(run: Run) -> None:
    """Held-out accuracy of the current weights; the first and the last one make the before/after table."""
    with run.clock.stage("evaluate"):
        answers = evaluation.evaluate(
            run.engine, run.heldout, run.config.evaluation.sampling, run.noise_seed, run.score_heldout
        )
    run.record_heldout(answers, evaluation.accuracy_by_task(answers))
