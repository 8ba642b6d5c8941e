"""The RL loop. Each stage is a file of this folder, in the order of the lines of `train`.

result = train(config, "runs/mine")            # in a notebook as from the command line
result.summary["heldout"], result.metrics, result.params
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from m1jax.errors import EngineLost, ServerRefused, Stopped, require_finite
from m1jax.rl import evaluate as evaluation
from m1jax.rl.advantage import group_advantages
from m1jax.rl.batch import make_batch
from m1jax.rl.collect import collect
from m1jax.rl.monitors import rollout_metrics, update_metrics
from m1jax.rl.run import Run, open_run
from m1jax.rl.settings import RLConfig
from m1jax.sharding import deal
from m1jax.train.hosts import anywhere
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
        Interrupted: SIGTERM, Ctrl-C, or no engine answers any more; after saving.
    """
    with StopSignal() as stop, open_run(config, workdir, params, engine, log) as run, saved_at_least(run, stop):
        run.give_up_when(lambda: stop.requested is not None)
        run.engine.set_weights(run.state.params, run.step)
        if run.step == 0 and run.evaluation_due:
            evaluate(run)
        if run.unrecorded is not None:
            finish_step(run, run.unrecorded)
        while run.step < config.steps and not anywhere(stop.requested is not None):
            generation = collect(run)  # prompts, rollouts, rewards; more prompts with dynamic sampling
            if anywhere(stop.requested is not None):
                break  # what was asked is asked again: an update and the rest of the step may take too long
            run.prompts.done(generation.again)
            run.prompts.ask_ahead(run.step, config.steps)  # with a staleness above 0, to be answered meanwhile
            with run.clock.stage("batch"):
                loss, used = config.loss, generation.used
                advantages_PR, live_PR = group_advantages(generation.rewards_PR, loss.advantage_scale, loss.std, used)
                batch = make_batch(
                    generation.prompts, generation.rollouts, advantages_PR, live_PR, config.batch_shape,
                    loss.aggregation, config.sampling.max_tokens, generation.reference,
                    router_replay=config.rollout.router_replay != "off",
                )  # fmt: skip
            with run.clock.stage("update"):
                run.state, device_metrics = run.update(run.state, deal(batch, run.mesh, 2))
                trained = update_metrics(jax.device_get(device_metrics))
            run.step += 1
            require_finite(run.step, "update", trained)
            rollout = rollout_metrics(
                generation.prompts, generation.rollouts, generation.rewards_PR, generation.correct_PR
            )
            run.unrecorded = rollout | generation.metrics | trained | run.prompts.take_metrics()
            with run.clock.stage("sync"):
                run.engine.set_weights(run.state.params, run.step)
            finish_step(run, run.unrecorded)
        run.save()
        if run.step < config.steps:
            raise Interrupted(stop.exit_code or 75)  # where only another process was asked to stop
        run.finish()
    return load_run(workdir)


def finish_step(run: Run, metrics: dict[str, float]) -> None:
    """What comes after the updates: evaluation, record and checkpoint, each where it is due."""
    if run.evaluation_due:
        evaluate(run)
    run.record(metrics)
    run.unrecorded = None
    if run.step % run.config.checkpoint.every == 0:
        run.save()


@contextmanager
def saved_at_least(run: Run, stop: StopSignal) -> Iterator[None]:
    """Where the run is to stop while an engine works, or the servers are gone or of no use, save up to the last update.

    Raises:
        Interrupted: it was asked to; or they are gone, with exit code 75 and the cause.
        EngineLost: they are, and there is nothing yet to go on from.
        ServerRefused: one has to be set up in another way.
    """
    try:
        yield
    except (EngineLost, ServerRefused, Stopped) as error:
        if run.saved < 0 and isinstance(error, EngineLost):
            raise  # at a start, where there is nothing to save
        run.note_engine()  # what the servers went through belongs to this step, not to the process that goes on with it
        if run.step:
            run.save()
        if isinstance(error, ServerRefused):
            raise
        if isinstance(error, Stopped):
            raise Interrupted(stop.exit_code or 75) from error
        raise Interrupted(75, str(error)) from error


def evaluate(run: Run) -> None:
    """Held-out accuracy of the current weights; the first and the last one make the before/after table."""
    with run.clock.stage("evaluate"):
        answers = evaluation.evaluate(
            run.engine, run.heldout, run.config.evaluation.sampling, run.noise_seed, run.score_heldout
        )
    run.record_heldout(answers, evaluation.accuracy_by_task(answers))
