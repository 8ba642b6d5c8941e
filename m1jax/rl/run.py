"""What a run is made of, set up from its config: data, verifiers, engine, state, checkpoints, sinks, folder.

The loop (`m1jax.rl.loop`) is the algorithm; this is everything around it that has to be opened, restored, written
down and closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from m1jax.config import to_dict
from m1jax.data.chat import render
from m1jax.data.problems import TrainProblems, heldout, majority_share, parse_mix, parse_tasks
from m1jax.data.tokenizer import check_vocab_size, load_tokenizer
from m1jax.data.tokenizer_files import save_tokenizer
from m1jax.errors import NonFinite, UserError
from m1jax.model.kernels import check_kernels
from m1jax.model.transformer import parameter_specs
from m1jax.rewards.grader import Grader
from m1jax.rewards.score import interleaved, score_responses
from m1jax.rl import engine_local
from m1jax.rl.ahead import Ahead
from m1jax.rl.batch import make_batch, of_responses
from m1jax.rl.engine_local import LocalEngine
from m1jax.rl.engine_sglang import SGLangEngine
from m1jax.rl.evaluate import Answered
from m1jax.rl.led import LedEngine, LedPrompts, led
from m1jax.rl.prompts import PromptSource, Tokenize, heldout_prompts
from m1jax.rl.recorded import ROLLOUTS, ReplayEngine, file_name, save_rollouts
from m1jax.rl.settings import RewardConfig, RLConfig
from m1jax.rl.shaping import by_ending, kl_sums, overlong
from m1jax.rl.update import make_frozen_logprobs, make_update
from m1jax.sharding import check_rows, check_tokens, deal, make_mesh, on_mesh, placed, to_host
from m1jax.train import hosts, report
from m1jax.train.checkpoint import Checkpoints, steps
from m1jax.train.clock import Clock
from m1jax.train.metrics import ConsoleSink, JsonlSink, Sinks, TensorBoardSink
from m1jax.train.optimizer import make_optimizer
from m1jax.train.pretrained import HUGGINGFACE, init_params
from m1jax.train.state import TrainState, init_state
from m1jax.types import Engine, MeasuredEngine, Params, Prompt, Rollout, Task

REFERENCE, WEIGHTS = "reference", "weights"
SAMPLES = 10
"""Held-out answers that samples.md shows before and after."""


@dataclass(frozen=True)
class Questions:
    """What is asked, and how it is read: all that a config says of text.

    Attributes:
        tokenizer: of prompts and responses.
        tokenize: question to prompt ids, by the config's template.
        tasks: what is trained on, in the order of the config.
        evaluated: what is evaluated on: the same tasks, or those of `evaluation.tasks`.
        heldout: held-out prompts, task by task.
    """

    tokenizer: Any
    tokenize: Tokenize
    tasks: list[Task]
    evaluated: list[Task]
    heldout: list[Prompt]


@dataclass(frozen=True)
class Scores:
    """What the reward stage says of P prompts with R responses each; a NaN is a response without a reward.

    `verified_PR` comes before the penalties of length and KL: whether a group can teach is a matter of its answers.
    """

    rewards_PR: np.ndarray
    verified_PR: np.ndarray
    correct_PR: np.ndarray
    metrics: dict[str, float]


@dataclass(frozen=True)
class Sampled:
    """One round of prompts with their responses; `reference` holds log-probabilities where there is a reference."""

    prompts: list[Prompt]
    rollouts: list[list[Rollout]]
    scores: Scores
    reference: list[list[np.ndarray]] | None


@dataclass(frozen=True)
class Scorer:
    """The reward stage: responses, judged on their text by the tasks' verifiers."""

    tokenizer: Any
    tasks: Mapping[str, Task]
    grader: Grader
    reward: RewardConfig
    window: int

    def score(self, step: int, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]]) -> Scores:
        """Rewards of all responses of a step, shaped by ending and length.

        Raises:
            UserError: the verifiers gave too many responses no score.
            NonFinite: a response has a log-probability that is none; with such weights no group need have variance,
                so that no update would show it.
        """
        if not all(np.isfinite(r.rollout_logprobs).all() for group in rollouts for r in group):
            raise NonFinite(step, "rollout", "a log-probability")
        problems = [p.problem for p, group in zip(prompts, rollouts, strict=True) for _ in group]
        reward, texts = self.reward, self._texts(rollouts)
        # Each process judges a share, and all go on with everybody's verdicts: a verifier need not say the same twice.
        share = slice(jax.process_index(), None, jax.process_count())
        scored = score_responses(self.grader, self.tasks, problems[share], texts[share], reward.format_weight)
        scored = interleaved(hosts.exchange(scored))
        metrics = scored.metrics()
        unscored = metrics["reward/unscored"] / max(1 - metrics["reward/no_answer"], 1e-9)
        if unscored > reward.max_unscored_share:
            raise UserError(
                f"step {step}: the verifiers gave {unscored:.0%} of the answers no score (None or NaN), "
                f"config.reward.max_unscored_share allows {reward.max_unscored_share:.0%}; mend the verifier"
            )
        flat = [r for group in rollouts for r in group]
        policies = {"length": reward.on_length, "repetition": reward.on_repetition}
        verified = by_ending(scored.rewards, [r.ending for r in flat], policies)
        rewards = verified
        if reward.overlong_buffer:
            lengths = np.array([len(r.token_ids) for r in flat])
            penalties = reward.overlong_penalty * overlong(lengths, self.window, reward.overlong_buffer)
            rewards = verified - penalties
            metrics["reward/overlong_penalty"] = float(penalties[~np.isnan(rewards)].sum()) / len(flat)
        if "filter" in policies.values():
            metrics["reward/filtered"] = sum(policies.get(r.ending) == "filter" for r in flat) / len(flat)
        shape = (len(prompts), -1)
        return Scores(rewards.reshape(shape), verified.reshape(shape), scored.correct.reshape(shape), metrics)

    def score_heldout(
        self, step: int, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]]
    ) -> tuple[list[str], np.ndarray]:
        """(texts, correctness) of one response to each prompt."""
        return self._texts(rollouts), self.score(step, prompts, rollouts).correct_PR[:, 0]

    def _texts(self, rollouts: Sequence[Sequence[Rollout]]) -> list[str]:
        stop_ids = set(self.tokenizer.stop_ids)
        return [
            self.tokenizer.decode([i for i in map(int, r.token_ids) if i not in stop_ids])
            for group in rollouts
            for r in group
        ]


@dataclass
class Run:
    """One RL run while it is open. `state`, `step` and `prompts` change as it goes; all three are saved together.

    Attributes:
        step: generation batches done.
        prompts: what is asked of the engine, and when.
        unrecorded: metrics of the last step, where something ended the run between its updates and its record.
        state: parameters, optimizer, PRNG key.
        reference: the frozen reference, rollouts to log-probabilities; None without one.
        saved: step of the newest checkpoint, -1 before the first.
        watchdog: of the other processes; None where there are none.
        cpu: CPU seconds of this process when the last step was recorded.
        outcome: held-out tables and answers of the first and of the last evaluation, and seconds by stage so far.
    """

    config: RLConfig
    folder: Path
    mesh: Mesh
    prompts: Ahead | LedPrompts
    heldout: list[Prompt]
    scorer: Scorer
    engine: Engine
    update: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    checkpoints: Checkpoints
    sinks: Sinks
    clock: Clock
    log: Callable[[str], None]
    state: TrainState
    reference: Callable[[list[Prompt], list[list[Rollout]]], list[list[np.ndarray]]] | None = None
    step: int = 0
    saved: int = -1
    unrecorded: dict[str, float] | None = None
    watchdog: hosts.Watchdog | None = None
    cpu: float = 0.0
    outcome: dict[str, Any] = field(
        default_factory=lambda: {"evaluated": -1, "heldout": {}, "samples": {}, "seconds": {}}
    )
    pending: dict[str, float] = field(default_factory=dict)

    @property
    def noise_seed(self) -> int:
        """Seed of the sampling noise, drawn from the run's own key (which is saved) and the same in every step."""
        return noise_seed(self.state.key)

    @property
    def evaluation_due(self) -> bool:
        """Whether the held-out problems are to be answered with the weights of now, and were not yet."""
        due = self.step % self.config.evaluation.every == 0 or self.step == self.config.steps
        return due and self.outcome.get("evaluated") != self.step

    def sample(self, count: int) -> Sampled:
        """Ask the next `count` prompts, and judge their responses."""
        config = self.config
        with self.clock.stage("rollout"):
            prompts, rollouts = self.prompts.take(count, self.step)
        if config.rollout.save and hosts.is_first():
            path = file_name(self.folder / ROLLOUTS, self.step, prompts[0].index)
            save_rollouts(path, prompts, rollouts, config.sampling.temperature)
        if config.rollout.router_replay != "off":
            check_expert_ids(config, prompts, rollouts)
        reference = None
        if self.reference is not None:
            with self.clock.stage("reference"):
                reference = self.reference(prompts, rollouts)
        with self.clock.stage("reward"):
            scores = self.scorer.score(self.step + 1, prompts, rollouts)
            if reference is not None and config.loss.kl_in == "reward":
                penalties = config.loss.kl_coefficient * kl_sums(rollouts, reference, config.loss.kl_estimator or "")
                metrics = scores.metrics | {"reward/kl_penalty": float(penalties.mean())}
                scores = replace(scores, rewards_PR=scores.rewards_PR - penalties, metrics=metrics)
        return Sampled(prompts, rollouts, scores, reference)

    def score_heldout(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]]
    ) -> tuple[list[str], np.ndarray]:
        """(texts, correctness) of one response to each prompt."""
        return self.scorer.score_heldout(self.step, prompts, rollouts)

    def record_heldout(self, answers: Sequence[Answered], table: dict[str, tuple[int, int]]) -> None:
        """Note an evaluation: in the metrics of this step, and as `before` or `after` of the outcome."""
        when = "before" if self.step == 0 else "after"
        self.outcome["evaluated"] = self.step
        shown = [a for task in table for a in [a for a in answers if a.prompt.problem.task == task][:SAMPLES]]
        self.outcome["samples"][when] = [
            {"index": a.prompt.index, "text": a.text, "correct": bool(a.correct)} for a in shown
        ]
        for task, (right, n) in table.items():
            accuracy = report.accuracy(right, n)
            self.outcome["heldout"].setdefault(task, {})[when] = accuracy
            self.pending |= {f"heldout/{task}/{key}": accuracy[key] for key in ("mean", "low", "high")}
            self.log(f"held-out {task}: {accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] of {n}")
        if self.step == 0:
            self.record({})
            self.save()

    def record(self, metrics: dict[str, float]) -> None:
        """Send the metrics of this step to the sinks, with the seconds of each stage and the step's throughput."""
        lap, cpu = self.clock.lap(), time.process_time()
        total = self.outcome["seconds"]
        for stage, seconds in lap.items():
            total[stage] = total.get(stage, 0.0) + seconds
        metrics = metrics | self.pending
        if isinstance(self.engine, MeasuredEngine):
            metrics = self.engine.take_metrics() | metrics
        metrics = metrics | {f"time/{stage}": seconds for stage, seconds in lap.items()}
        if (tokens := metrics.get("rollout/tokens")) and "rollout" in lap:
            metrics["time/tokens_per_second"] = tokens / max(sum(lap.values()) - lap.get("compile", 0.0), 1e-9)
        metrics["time/cpu"], self.cpu = cpu - self.cpu, cpu
        metrics["time/compiles"] = self.clock.compiles
        self.pending, self.clock.step = {}, self.step
        self.sinks.write(self.step, metrics)

    def give_up_when(self, stopped: Callable[[], bool]) -> None:
        """Let our engines give up what they are at when the run is asked to stop: it may take longer than there is."""
        if isinstance(self.engine, LocalEngine):  # all processes compute together, and have to stop together
            self.engine.stopped = lambda: hosts.anywhere(stopped())
        asked, watchdog = stopped, self.watchdog
        if watchdog is not None:  # while servers answer the first alone, the others cannot say it by a message
            watchdog.stopped, asked = stopped, lambda: watchdog.asked
        servers = self.engine.engine if isinstance(self.engine, LedEngine) else self.engine
        if isinstance(servers, SGLangEngine):
            servers.stopped = asked

    def note_engine(self) -> None:
        """Put what the engine tells of a step to the metrics that are not recorded yet, where there are any."""
        if self.unrecorded is not None and isinstance(self.engine, MeasuredEngine):
            self.unrecorded |= self.engine.take_metrics()

    def save(self) -> None:
        """Save everything that the next step depends on, where this step is not saved yet."""
        if self.saved == self.step:
            return
        with self.clock.stage("save"):
            cursor, carried = self.prompts.position
            meta = {
                "step": self.step, "cursor": cursor, "carried": carried, "outcome": self.outcome,
                "unrecorded": self.unrecorded, "config": to_dict(self.config),
            }  # fmt: skip
            self.checkpoints.save(self.step, self.state, meta)
        self.saved = self.step

    def finish(self) -> None:
        """Write summary.json, samples.md and curves.png from what was recorded."""
        self.checkpoints.wait()
        hosts.from_first(self._write_outcome)

    def _write_outcome(self) -> None:
        by_index = {p.index: p.problem for p in self.heldout}
        majority = {
            task: majority_share([p for p in by_index.values() if p.task == task]) for task in self.outcome["heldout"]
        }
        rows = report.load_run(self.folder).metrics
        final = {k: v for k, v in rows[-1].items() if k not in ("step", "time")} if rows else {}
        report.write_json(
            self.folder / report.SUMMARY,
            {
                "heldout": {t: {"majority": majority[t], **v} for t, v in self.outcome["heldout"].items()},
                "seconds": self.outcome["seconds"],
                "steps": self.step,
                "updates": int(self.state.updates),
                "final": final,
            },
        )
        report.write_samples(self.folder / report.SAMPLES, self._samples(by_index))
        report.draw_curves(self.folder)

    def _samples(self, by_index) -> list[report.Sample]:
        after = {s["index"]: s for s in self.outcome["samples"].get("after", [])}
        per_task = max(SAMPLES // max(len(self.outcome["heldout"]), 1), 1)
        samples, shown = [], dict.fromkeys(self.outcome["heldout"], 0)
        for before in self.outcome["samples"].get("before", []):
            problem = by_index[before["index"]]
            if before["index"] in after and shown[problem.task] < per_task:
                shown[problem.task] += 1
                then = after[before["index"]]
                samples.append(
                    report.Sample(
                        problem.task, problem.question, problem.answer,
                        before["text"], float(before["correct"]), then["text"], float(then["correct"]),
                    )
                )  # fmt: skip
        return samples


def check_heldout(config: RLConfig, meta: Mapping[str, Any]) -> None:
    """Raise UserError where the run would be evaluated on questions that the checkpoint was trained on."""
    share = config.problems.heldout_share
    # A checkpoint of another making has no config, or one without problems: nothing is known of its questions.
    before = meta.get("config", {}).get("problems", {}).get("heldout_share", share)
    if share > before and not config.evaluation.tasks:
        raise UserError(
            f"config.problems.heldout_share: {share:g} holds out questions that {config.init_from} was trained on "
            f"(it held out {before:g}); choose at most {before:g}"
        )


def check_expert_ids(config: RLConfig, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]]) -> None:
    """Raise UserError where rollouts lack the experts that `rollout.router_replay` is about."""
    model, asked = config.model, f"config.rollout.router_replay: {config.rollout.router_replay!r}"
    source, mend = "this engine", "it has to fill Rollout.expert_ids; or choose 'off'"
    if config.rollout.replay:
        source, mend = config.rollout.replay, "a run with 'compare' or 'use' saves them; or choose 'off'"
    for prompt, group in zip(prompts, rollouts, strict=True):
        for r in group:
            tokens = len(prompt.token_ids) + len(r.token_ids)
            if r.expert_ids is None:
                raise UserError(f"{asked}, and the rollouts of {source} are without their experts; {mend}")
            expected = (tokens, model.num_layers, model.experts_per_token)
            if r.expert_ids.shape != expected or r.expert_ids.max() >= model.num_experts:
                raise UserError(f"{asked}, and the rollouts of {source} have experts of another model; {mend}")


def open_questions(config: RLConfig) -> Questions:
    """Tokenizer, tasks and held-out prompts of a run.

    Raises:
        UserError: something in the config or the data is the user's to mend.
    """
    check_kernels(config.model)
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.stop_tokens)
    check_vocab_size(config.model.vocab_size, tokenizer, config.tokenizer.path)
    tokenize = partial(
        render, template=config.tokenizer.chat_template, system=config.tokenizer.system_prompt, tokenizer=tokenizer
    )
    tasks = parse_tasks(config.tasks)
    asked, share = tasks, config.problems.heldout_share
    if config.evaluation.tasks:
        asked, share = parse_tasks(config.evaluation.tasks), 1.0
        if both := {task.name for task in tasks} & {task.name for task in asked}:
            raise UserError(
                f"config.evaluation.tasks: {min(both)} is trained on, by config.tasks; give it another name, or leave "
                f"it out for the held-out share of that task"
            )
    unseen = [p for t in asked for p in heldout(t, config.evaluation.problems, share)]
    prompts = heldout_prompts(unseen, tokenize, config.problems.max_prompt_tokens)
    return Questions(tokenizer, tokenize, tasks, asked, prompts)


@contextmanager
def open_scorer(config: RLConfig, questions: Questions) -> Iterator[Scorer]:
    """The reward stage of a run; its worker processes start now and end with the context."""
    with Grader(config.reward.workers, config.reward.cpu_seconds) as grader:
        tasks = {task.name: task for task in (*questions.tasks, *questions.evaluated)}
        grader.warm_up(sorted({task.verifier for task in tasks.values()}))
        yield Scorer(questions.tokenizer, tasks, grader, config.reward, config.sampling.max_tokens)


def local_engine(config: RLConfig, questions: Questions, mesh: Mesh) -> LocalEngine:
    """The engine in this process, as a run uses it."""
    return LocalEngine(
        config.model,
        prompt_tokens=config.problems.max_prompt_tokens,
        rows=config.rollout.engine_rows,
        stop_ids=questions.tokenizer.stop_ids,
        mesh=mesh,
        record_experts=config.rollout.router_replay != "off",
    )


def server_engine(config: RLConfig, questions: Questions, folder: Path, log: Callable[[str], None]) -> SGLangEngine:
    """The engine that asks the servers of `config.servers`, as a run uses it."""
    assert config.servers is not None
    sampling = config.sampling, config.evaluation.sampling
    shared = config.servers.weights_folder  # other runs may use it too
    return SGLangEngine(
        config.servers,
        config.model,
        stop_ids=questions.tokenizer.stop_ids,
        temperature=config.sampling.temperature,
        positions=config.problems.max_prompt_tokens + max(s.max_tokens for s in sampling),
        weights=Path(shared) / folder.absolute().name if shared else folder / WEIGHTS,
        files=folder / HUGGINGFACE,
        record_experts=config.rollout.router_replay != "off",
        log=log,
    )


def open_reference(
    config: RLConfig, folder: Path, params: Params, fresh: bool, mesh: Mesh, log: Callable[[str], None]
) -> Callable[[list[Prompt], list[list[Rollout]]], list[list[np.ndarray]]]:
    """The parameters that a run starts from, as a function of rollouts; kept in `reference/` for when it is resumed."""
    with Checkpoints(folder / REFERENCE, 1, log) as store:
        if fresh:
            store.save(0, {"params": params}, {})
            frozen = jax.tree.map(jnp.copy, params)  # the update writes over the originals
        else:
            restored = store.restore_latest({"params": params})
            if restored is None:
                raise UserError(f"{folder / REFERENCE}: gone, and with it what the run is held near; start it anew")
            frozen = restored[1]["params"]
    logprobs = make_frozen_logprobs(config.model, mesh, temperature=config.sampling.temperature)
    shape, longest = config.batch_shape, config.sampling.max_tokens

    def reference(prompts: list[Prompt], rollouts: list[list[Rollout]]) -> list[list[np.ndarray]]:
        everything = np.ones((len(prompts), len(rollouts[0])), bool)
        batch = make_batch(prompts, rollouts, everything, everything, shape, "constant", longest)
        return of_responses(to_host(logprobs(frozen, deal(batch, mesh, 2))), prompts, rollouts, shape)

    return reference


def noise_seed(key: jax.Array) -> int:
    """Seed of the sampling noise of a run whose PRNG key (`TrainState.key`) this is."""
    return int(jax.random.bits(key)) >> 1


def check_sizes(config: RLConfig, mesh: Mesh, engine: Engine | None) -> None:
    """Raise UserError where rows cannot be dealt out to the devices, or two things stand in for the engine."""
    check_tokens(config.batch_shape.tokens, "config.update.row_tokens", mesh)
    check_rows(config.update.micro_batch_rows, "config.update.micro_batch_rows", mesh)
    if engine is not None and config.rollout.replay:
        raise UserError("config.rollout.replay: stands in for an engine, and one was given; leave one of the two out")
    if engine is not None and config.servers is not None:
        raise UserError("config.servers: stands in for an engine, and one was given; leave one of the two out")
    if engine is None and not config.rollout.replay and config.servers is None:
        if config.rollout.staleness and jax.process_count() > 1:
            raise UserError(
                f"config.rollout.staleness: {config.rollout.staleness}, and the engine of {jax.process_count()} "
                f"processes is busy with one thing at a time; choose 0, or rollout servers"
            )
        check_rows(config.rollout.engine_rows, "config.rollout.engine_rows", mesh, engine_local.ROWS)
        prompts = config.rollout.engine_rows // config.rollout.responses
        check_rows(prompts, "config.rollout.engine_rows / responses", mesh, engine_local.ROWS)


@contextmanager
def open_run(
    config: RLConfig, workdir: str | Path, params: Params | None, engine: Engine | None, log: Callable[[str], None]
) -> Iterator[Run]:
    """Set a run up, restored from its last checkpoint where it has one, and close it whatever happens."""
    folder = Path(workdir)
    hosts.preflight(folder, to_dict(config))
    with ExitStack() as stack:
        clock = Clock()
        stack.callback(clock.close)
        watchdog = stack.enter_context(hosts.watched(folder, config.hosts, clock))
        mesh = make_mesh(config.mesh)
        model = on_mesh(config.model, mesh)
        check_sizes(config, mesh, engine)
        questions = hosts.together(lambda: open_questions(config))
        problems = TrainProblems(
            questions.tasks, config.problems.heldout_share, config.problems.per_task, config.seed,
            parse_mix(config.tasks),
        )  # fmt: skip
        distinct = config.rollout.prompts if config.rollout.overfit_one_batch else 0
        source = PromptSource(problems, questions.tokenize, config.problems.max_prompt_tokens, config.seed, distinct)

        fresh = hosts.from_first(lambda: not steps(folder / "checkpoints"))
        if params is None and config.init_from and fresh:
            place = placed(mesh, parameter_specs(model))
            params, meta = hosts.together(lambda: init_params(str(config.init_from), config.model, place, log))
            check_heldout(config, meta)
        heldout = questions.heldout
        if config.rollout.replay:
            engine, heldout = ReplayEngine(config.rollout.replay, config.steps), []  # what others sampled tests nothing
        optimizer = make_optimizer(config.optimizer)
        state = init_state(config.seed, config.model, optimizer, mesh, params)
        # After everything that a user may have to mend in the config.
        hosts.from_first(lambda: report.claim_run_folder(folder, config, apart=("servers", "mesh", "hosts")))
        hosts.from_first(lambda: save_tokenizer(config.tokenizer, folder / HUGGINGFACE))
        reference = None
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", config.checkpoint.keep, log))
        if config.loss.kl_coefficient:
            reference = open_reference(config, folder, state.params, fresh, mesh, log)
        restored = checkpoints.restore_latest(state)
        step, meta = 0, {}
        if restored is not None:
            step, state, meta = restored
            log(f"resumed {folder} after step {step} of {config.steps}")
        first = step if restored is not None else -1
        recorded = first - (meta.get("unrecorded") is not None)
        sinks = Sinks(
            [
                JsonlSink(folder / report.METRICS, resume_step=recorded),
                TensorBoardSink(folder / "tensorboard", resume_step=recorded if restored is not None else None),
                ConsoleSink(config.steps, step),
            ]
            if hosts.is_first()
            else []
        )
        stack.callback(sinks.close)
        scorer = stack.enter_context(open_scorer(config, questions))
        rollout, position = config.rollout, (meta.get("cursor", 0), meta.get("carried", ()))
        seed = noise_seed(state.key)  # here, where all processes compute it

        def ahead(engine: Engine) -> Ahead:
            prompts = Ahead(
                engine, source, config.sampling, seed, rollout.prompts, rollout.responses,
                rollout.staleness, rollout.unfinished, *position,
            )  # fmt: skip
            stack.callback(prompts.close)
            return prompts

        if engine is None and config.servers is not None:
            ask = partial(server_engine, config, questions, folder, log)
            servers = hosts.together(lambda: ask() if hosts.is_first() else None)
            if servers is not None:
                stack.callback(servers.close)
            engine, prompts = led(servers, config.model, ahead)
        else:
            if engine is None:
                engine = local_engine(config, questions, mesh)
                stack.callback(engine.close)
            prompts = ahead(engine)
        update = make_update(
            config.model, config.loss, optimizer, mesh,
            temperature=config.sampling.temperature, passes=config.update.passes, adam=config.optimizer,
            router=config.router, replay=config.rollout.router_replay == "use",
        )  # fmt: skip
        log(config.loss.describe())
        for line in config.warnings():
            log(f"warning: {line}")
        run = Run(
            config=config, folder=folder, mesh=mesh, prompts=prompts, heldout=heldout, scorer=scorer, engine=engine,
            update=update, checkpoints=checkpoints, sinks=sinks, clock=clock, log=log, state=state, step=step,
            saved=first, reference=reference, unrecorded=meta.get("unrecorded"), watchdog=watchdog,
        )  # fmt: skip
        if "outcome" in meta:
            run.outcome = {"evaluated": step} | meta["outcome"]
        yield run
