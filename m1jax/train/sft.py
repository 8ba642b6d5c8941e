"""Next-token training on text of the tasks: fine-tuning on worked solutions, or pre-training. Settings, data and loop.

result = train(config, "runs/sft")
result.params

Rows are packed. With `loss_on="answers"` the loss is on the answers only (SFT); with "all" every token but BOS is
learnt, questions too, which makes a base model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import grain
import jax
import numpy as np

from m1jax.config import named_function, to_dict
from m1jax.data.chat import render
from m1jax.data.problems import TrainProblems, parse_mix, parse_tasks
from m1jax.data.settings import ProblemsConfig, TokenizerConfig
from m1jax.data.tokenizer import check_vocab_size, load_tokenizer
from m1jax.data.tokenizer_files import save_tokenizer
from m1jax.errors import UserError, require_finite
from m1jax.mesh import MeshConfig
from m1jax.model.config import KernelConfig, ModelConfig
from m1jax.model.kernels import check_kernels
from m1jax.model.transformer import parameter_specs
from m1jax.sharding import check_rows, check_tokens, deal, make_mesh, on_mesh, placed
from m1jax.train import hosts, report
from m1jax.train.checkpoint import Checkpoints, steps
from m1jax.train.clock import Clock
from m1jax.train.hosts import HostsConfig
from m1jax.train.interrupt import Interrupted, StopSignal
from m1jax.train.metrics import ConsoleSink, JsonlSink, Sinks, TensorBoardSink
from m1jax.train.next_token import TokenBatch, make_supervised_update
from m1jax.train.optimizer import OptimizerConfig, make_optimizer
from m1jax.train.pretrained import HUGGINGFACE, init_params
from m1jax.train.router import SupervisedRouterConfig, check_router, router_metrics
from m1jax.train.settings import CheckpointConfig
from m1jax.train.state import init_state

LOSS_ON = ("answers", "all")


@dataclass(frozen=True)
class RowsConfig:
    """The rows of one update.

    Attributes:
        per_update: packed rows of an update.
        tokens: length of a row.
        micro_batch_rows: rows per forward and backward pass; divides per_update. Lower it when memory runs out.
    """

    per_update: int
    tokens: int
    micro_batch_rows: int

    def __post_init__(self):
        for name in ("per_update", "tokens", "micro_batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.per_update % self.micro_batch_rows:
            raise ValueError(f"micro_batch_rows: {self.micro_batch_rows} does not divide per_update {self.per_update}")


@dataclass(frozen=True)
class SFTConfig:
    """A supervised run.

    Attributes:
        seed: of parameters, order of problems and slips of the solutions.
        steps: updates.
        tasks: comma-separated task specs.
        text: what follows a question: a function `(problem, rng, reflection) -> text` as "module:function". The default
            writes worked solutions and refuses a task that has none.
        loss_on: "answers", or "all" for the questions too.
        reflection: probability, for every step of a solution, of a slip that the solution then corrects.
        init_from: run or checkpoint folder to start from; "" starts from random parameters.
        kernels: who computes attention and the experts.
        mesh: how devices share the work; by default each has all parameters and its own rows.
        hosts: when a job of several processes gives up.
        router: what the experts' routers are trained on beside the text; a dense model has to set both weights to 0.
    """

    seed: int
    steps: int
    tasks: str
    model: ModelConfig
    tokenizer: TokenizerConfig
    problems: ProblemsConfig
    rows: RowsConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    text: str = "m1jax.data.worked_solutions:worked_solution"
    loss_on: str = "answers"
    reflection: float = 0.1
    init_from: str = ""
    kernels: KernelConfig = KernelConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    router: SupervisedRouterConfig = SupervisedRouterConfig()

    def __post_init__(self):
        object.__setattr__(self, "model", dataclasses.replace(self.model, kernels=self.kernels, mesh=self.mesh))
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps} must be at least 1")
        if self.loss_on not in LOSS_ON:
            raise ValueError(f"loss_on: {self.loss_on!r} must be one of {LOSS_ON}")
        named_function(self.text, "text")
        if not 0 <= self.reflection < 1:
            raise ValueError(f"reflection: {self.reflection} must be at least 0 and below 1")
        check_router(self.router, self.model)
        if self.mesh.context and self.rows.tokens % self.mesh.context:
            raise ValueError(
                f"mesh.context: {self.mesh.context} devices cannot share the {self.rows.tokens} tokens of a row "
                f"evenly; change rows.tokens"
            )
        if self.rows.tokens > self.model.max_positions > 0:
            raise ValueError(
                f"rows.tokens: {self.rows.tokens}, and the model was made for {self.model.max_positions} positions "
                f"(model.max_positions); choose at most {self.model.max_positions}"
            )


class Sequences:
    """Sequence number i of a run: prompt ids, and answer ids with the stop token. The same i gives the same ids."""

    def __init__(self, config: SFTConfig):
        self.config, c = config, config
        self._tokenizer = load_tokenizer(c.tokenizer.path, c.tokenizer.stop_tokens)
        check_vocab_size(c.model.vocab_size, self._tokenizer, c.tokenizer.path)
        tasks = parse_tasks(c.tasks)
        problems = TrainProblems(tasks, c.problems.heldout_share, c.problems.per_task, c.seed, parse_mix(c.tasks))
        self._text = named_function(c.text, "text")
        for task in tasks:
            self._text(task[0], Random(0), 0.0)  # a task without solutions is refused before anything runs
        self._order = grain.MapDataset.source(problems).seed(c.seed).shuffle().repeat()

    def __getitem__(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        c, tokenizer = self.config, self._tokenizer
        problem = self._order[index]
        assert problem is not None  # a filter could leave gaps; there is none
        prompt = render(
            problem.question, template=c.tokenizer.chat_template, system=c.tokenizer.system_prompt, tokenizer=tokenizer
        )
        if len(prompt) > c.problems.max_prompt_tokens:
            raise UserError(
                f"prompt {index} of task {problem.task} has {len(prompt)} tokens, the window "
                f"{c.problems.max_prompt_tokens}; raise config.problems.max_prompt_tokens"
            )
        text = self._text(problem, Random(f"{c.seed}/{index}"), c.reflection)
        return prompt, (*tokenizer.encode(text), tokenizer.stop_ids[0])


def pack_rows(sequences: Sequences, cursor: int, rows: RowsConfig, loss_on: str = "answers") -> tuple[TokenBatch, int]:
    """Fill the rows of one update with sequences cursor, cursor + 1, ... until the next one finds no place.

    Returns:
        The batch, every token that is learnt of equal weight (their sum is 1), and the cursor of the next update.
    """
    lead = (rows.per_update, rows.tokens)
    tokens, segments, weights = np.zeros(lead, np.int32), np.zeros(lead, np.int32), np.zeros(lead, np.float32)
    used, count = np.zeros(rows.per_update, int), np.zeros(rows.per_update, int)
    while True:
        prompt, answer = sequences[cursor]
        length = len(prompt) + len(answer)
        if length > rows.tokens:
            raise UserError(f"sequence {cursor} has {length} tokens, a row {rows.tokens}; raise config.rows.tokens")
        fits = np.flatnonzero(used + length <= rows.tokens)
        if not fits.size:
            break
        row, cursor = fits[0], cursor + 1
        count[row] += 1
        whole = slice(used[row], used[row] + length)
        tokens[row, whole] = prompt + answer
        segments[row, whole] = count[row]
        learnt = used[row] + (len(prompt) if loss_on == "answers" else 1)  # nothing comes before the first token
        weights[row, learnt : used[row] + length] = 1.0
        used[row] += length
    weights /= weights.sum()
    cut = lambda x: x.reshape(-1, rows.micro_batch_rows, rows.tokens)  # noqa: E731
    return TokenBatch(cut(tokens), cut(segments), cut(weights)), cursor


def train(config: SFTConfig, workdir: str | Path, log: Callable[[str], None] = print) -> report.RunResult:
    """Run, or resume, supervised fine-tuning in `workdir` and return what it left there.

    Raises:
        UserError, NonFinite, Interrupted: as `m1jax.rl.loop.train`.
    """
    folder = Path(workdir)
    hosts.preflight(folder, to_dict(config))
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        clock = Clock()
        stack.callback(clock.close)
        stack.enter_context(hosts.watched(folder, config.hosts, clock))
        mesh = make_mesh(config.mesh)
        model = on_mesh(config.model, mesh)
        check_tokens(config.rows.tokens, "config.rows.tokens", mesh)
        check_rows(config.rows.micro_batch_rows, "config.rows.micro_batch_rows", mesh)
        check_kernels(config.model)
        sequences = hosts.together(lambda: Sequences(config))
        optimizer = make_optimizer(config.optimizer)
        params = None
        if config.init_from and hosts.from_first(lambda: not steps(folder / "checkpoints")):
            place = placed(mesh, parameter_specs(model))
            params, _ = hosts.together(lambda: init_params(str(config.init_from), config.model, place, log))
        state = init_state(config.seed, config.model, optimizer, mesh, params)
        update = make_supervised_update(config.model, optimizer, mesh, router=config.router)
        # After everything that a user may have to mend in the config.
        hosts.from_first(lambda: report.claim_run_folder(folder, config, apart=("mesh", "hosts")))
        hosts.from_first(lambda: save_tokenizer(config.tokenizer, folder / HUGGINGFACE))
        step, cursor, seconds = 0, 0, {}
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", config.checkpoint.keep, log))
        if (restored := checkpoints.restore_latest(state)) is not None:
            step, state, meta = restored
            cursor, seconds = meta["cursor"], meta["seconds"]
            log(f"resumed {folder} after update {step} of {config.steps}")
        saved = step

        def save() -> None:
            nonlocal saved
            if saved != step:
                meta = {"step": step, "cursor": cursor, "seconds": seconds, "config": to_dict(config)}
                with clock.stage("save"):
                    checkpoints.save(step, state, meta)
                saved = step

        sinks = Sinks([
            JsonlSink(folder / report.METRICS, resume_step=step),
            TensorBoardSink(folder / "tensorboard", resume_step=step if restored else None),
            ConsoleSink(config.steps, step),
        ] if hosts.is_first() else [])  # fmt: skip
        stack.callback(sinks.close)
        while step < config.steps and not hosts.anywhere(stop.requested is not None):
            with clock.stage("batch"):
                batch, cursor = pack_rows(sequences, cursor, config.rows, config.loss_on)
            with clock.stage("update"):
                state, metrics = update(state, deal(batch, mesh))
                metrics = jax.device_get(metrics)
                routed = router_metrics(metrics.pop("router"))
                metrics = {f"train/{name}": float(value) for name, value in metrics.items()} | routed
            step += 1
            clock.step = step
            require_finite(step, "update", metrics)
            lap = clock.lap()
            seconds = {stage: seconds.get(stage, 0.0) + lap.get(stage, 0.0) for stage in seconds | lap}
            metrics["train/tokens"] = int((batch.segment_ids > 0).sum())
            metrics["time/tokens_per_second"] = metrics["train/tokens"] / max(lap["batch"] + lap["update"], 1e-9)
            sinks.write(step, metrics | {f"time/{stage}": value for stage, value in lap.items()})
            if step % config.checkpoint.every == 0:
                save()
        save()
        if step < config.steps:
            raise Interrupted(stop.exit_code or 75)  # where only another process was asked to stop
        checkpoints.wait()
        hosts.from_first(lambda: _write_outcome(folder, step, seconds))
    return report.load_run(folder)


def _write_outcome(folder: Path, step: int, seconds: dict[str, float]) -> None:
    rows = report.load_run(folder).metrics
    report.write_json(folder / report.SUMMARY, {"steps": step, "seconds": seconds, "final": rows[-1] if rows else {}})
    report.draw_curves(folder)
