"""Everything an RL run can be told, as one frozen record: the sections of a config file in the order of the loop."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from m1jax.data.settings import ProblemsConfig, TokenizerConfig
from m1jax.mesh import MeshConfig
from m1jax.model.config import KernelConfig, ModelConfig
from m1jax.rl.batch import BatchShape, UpdateConfig
from m1jax.rl.loss import LossConfig
from m1jax.rl.servers.settings import ServersConfig
from m1jax.rl.shaping import ENDING_POLICIES
from m1jax.train.hosts import HostsConfig
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.router import NO_AUXILIARY_LOSS, RouterConfig, check_router
from m1jax.train.settings import CheckpointConfig
from m1jax.types import Sampling

ROUTER_REPLAY = ("off", "compare", "use")
UNFINISHED = ("wait", "next_batch")


@dataclass(frozen=True)
class RolloutConfig:
    """One generation batch.

    Attributes:
        prompts: prompts of a generation batch, P.
        responses: responses to each prompt, R (the group).
        engine_rows: responses that the local engine samples at the same time; a multiple of `responses`.
        dynamic_sampling: ask further prompts in place of groups without variance, until `prompts` groups have some
            (DAPO, arXiv 2503.14476). Without it such groups leave the batch, which shrinks (ScaleRL).
        max_prompts: with dynamic sampling, prompts asked for a generation batch at most. Reached, the updates are made
            of the groups that there are, and the run says so.
        overfit_one_batch: ask the first `prompts` prompts in every step: the reward has to go to its maximum.
        save: keep all training rollouts in the run folder, `rollouts/`.
        replay: run folder whose saved rollouts stand in for an engine; "" for none. Nothing is evaluated then.
        staleness: generation batches by which the weights that sampled a token may be older than those that are updated
            with it. 0 is on policy; above it the next batches are generated while the updates run (`m1jax.rl.ahead`).
        unfinished: with a staleness above 0, what a batch does about answers that are not finished when it is due:
            "wait" for them, or leave their groups to the "next_batch".
        router_replay: what becomes of the experts that served in the engine. "off": no record. "compare": they are
            recorded, saved with the rollouts, and compared with the trainer's own choice. "use": besides, they serve in
            the trainer too, weighted by its own logits (R3, arXiv 2510.11370), the trainer's anchor included; the
            frozen reference chooses its own.
    """

    prompts: int
    responses: int
    engine_rows: int
    dynamic_sampling: bool = False
    max_prompts: int = 0
    overfit_one_batch: bool = False
    save: bool = False
    replay: str = ""
    staleness: int = 0
    unfinished: str = "wait"
    router_replay: str = "off"

    def __post_init__(self):
        if self.prompts < 1:
            raise ValueError(f"prompts: {self.prompts} must be at least 1")
        if self.responses < 2:
            raise ValueError(f"responses: {self.responses} leaves no group to compare with; choose at least 2")
        if self.engine_rows % self.responses or self.engine_rows < 1:
            raise ValueError(f"engine_rows: {self.engine_rows} is not a multiple of the {self.responses} responses")
        if self.dynamic_sampling and self.max_prompts <= self.prompts:
            raise ValueError(
                f"max_prompts: {self.max_prompts} leaves dynamic sampling no prompt beyond the first {self.prompts}; "
                f"choose a multiple of them, {3 * self.prompts} for example"
            )
        if self.max_prompts and not self.dynamic_sampling:
            raise ValueError(f"max_prompts: {self.max_prompts} is read by dynamic sampling only; leave it out")
        if self.overfit_one_batch and self.dynamic_sampling:
            raise ValueError("overfit_one_batch: dynamic sampling would ask other prompts; choose one of the two")
        if self.router_replay not in ROUTER_REPLAY:
            raise ValueError(f"router_replay: {self.router_replay!r} must be one of {ROUTER_REPLAY}")
        if self.staleness < 0:
            raise ValueError(f"staleness: {self.staleness} must be at least 0")
        if self.staleness and self.replay:
            raise ValueError(f"staleness: {self.staleness}, and a replay generates nothing; leave one of the two out")
        if self.unfinished not in UNFINISHED:
            raise ValueError(f"unfinished: {self.unfinished!r} must be one of {UNFINISHED}")
        if self.unfinished == "next_batch" and self.staleness < 2:
            raise ValueError(
                f"unfinished: 'next_batch' with staleness {self.staleness} leaves no group to the next batch that "
                f"would not be too old for it; raise staleness to 2 or more, or choose 'wait'"
            )
        if self.save and self.replay:
            raise ValueError(
                "save: these rollouts are saved already, in the run that replay names; leave one of them out"
            )


@dataclass(frozen=True)
class RewardConfig:
    """reward = correctness + format_weight * format, both 0 or 1; `m1jax.rl.shaping` says what comes after.

    Attributes:
        format_weight: what keeping to `<think>..</think><answer>..</answer>` is worth.
        on_length, on_repetition: what becomes of a response that filled the window, or was cut for repeating itself:
            "keep" (the verifier's reward), "wrong" (reward 0, whatever the verifier says) or "filter" (it leaves the
            batch; DAPO's overlong filtering).
            One that stopped by itself is always kept.
        overlong_buffer: tokens before the end of the window over which a penalty grows; 0 for none.
        overlong_penalty: what a response that fills the window loses.
        max_unscored_share: more than this share of the answers without a score (the verifier's None or NaN) stop the
            run.
        workers: processes that run verifiers.
        cpu_seconds: CPU time after which one verdict is given up (the response scores 0 and is counted).
    """

    format_weight: float = 0.1
    on_length: str = "keep"
    on_repetition: str = "keep"
    overlong_buffer: int = 0
    overlong_penalty: float = 0.0
    max_unscored_share: float = 0.1
    workers: int = 2
    cpu_seconds: float = 5.0

    def __post_init__(self):
        for name in ("on_length", "on_repetition"):
            if getattr(self, name) not in ENDING_POLICIES:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be one of {ENDING_POLICIES}")
        if self.overlong_buffer < 0 or not 0 <= self.overlong_penalty < math.inf:
            raise ValueError(
                f"overlong_buffer: {self.overlong_buffer} and overlong_penalty {self.overlong_penalty} must be at "
                f"least 0 and finite"
            )
        if bool(self.overlong_buffer) != bool(self.overlong_penalty):
            raise ValueError(
                f"overlong_buffer: {self.overlong_buffer} tokens and overlong_penalty {self.overlong_penalty:g} act "
                f"together; set both (DAPO: a fifth of the window, and half of what a right answer earns) or neither"
            )
        if not 0 <= self.max_unscored_share <= 1:
            raise ValueError(f"max_unscored_share: {self.max_unscored_share} must be from 0 to 1")
        if self.workers < 1:
            raise ValueError(f"workers: {self.workers} must be at least 1")
        if self.cpu_seconds <= 0:
            raise ValueError(f"cpu_seconds: {self.cpu_seconds} must be above 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation with the run's own engine and verifiers.

    Attributes:
        every: generation batches between evaluations; there is always one before the first and one after the last.
        problems: held-out problems of each task, each answered once.
        tasks: task specs to evaluate on instead, a benchmark file for example: the first `problems` distinct ones of
            each. That nothing of them is trained on is then yours to see to; "" takes the held-out share of the
            training tasks.
        sampling: its own, since it may truncate where training may not.
    """

    every: int
    problems: int
    sampling: Sampling
    tasks: str = ""

    def __post_init__(self):
        for name in ("every", "problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class RLConfig:
    """An RL run.

    Attributes:
        seed: of parameters, order of prompts and sampling noise.
        steps: generation batches.
        tasks: comma-separated task specs (`m1jax.data.problems.parse_tasks`).
        init_from: run folder or checkpoint folder whose parameters the run starts from; "" starts from random ones.
        kernels: who computes attention and the experts, in the update and in the local engine alike.
        router: what the experts' routers are trained on beside the objective; nothing by default.
        servers: SGLang servers that sample in place of the local engine; None samples in this process.
        mesh: how devices share the work; by default each has all parameters and its own rows.
        hosts: when a job of several processes gives up.
    """

    seed: int
    steps: int
    tasks: str
    model: ModelConfig
    tokenizer: TokenizerConfig
    problems: ProblemsConfig
    rollout: RolloutConfig
    sampling: Sampling
    reward: RewardConfig
    loss: LossConfig
    update: UpdateConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    init_from: str = ""
    kernels: KernelConfig = KernelConfig()
    router: RouterConfig = NO_AUXILIARY_LOSS
    servers: ServersConfig | None = None
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()

    def __post_init__(self):
        object.__setattr__(self, "model", dataclasses.replace(self.model, kernels=self.kernels, mesh=self.mesh))
        if self.steps < 0:
            raise ValueError(f"steps: {self.steps} must be at least 0 (0 evaluates only)")
        if self.sampling.top_p < 1 or self.sampling.top_k > 0:
            raise ValueError(
                f"sampling: top_p {self.sampling.top_p:g} and top_k {self.sampling.top_k} truncate the softmax on the "
                f"engine's side only, which biases every importance ratio; train with top_p=1 and top_k=0 "
                f"(evaluation.sampling may truncate)"
            )
        if self.sampling.temperature <= 0:
            raise ValueError(f"sampling.temperature: {self.sampling.temperature} explores nothing; choose above 0")
        if self.reward.overlong_buffer > self.sampling.max_tokens:
            raise ValueError(
                f"reward.overlong_buffer: {self.reward.overlong_buffer} is longer than the window, sampling.max_tokens "
                f"{self.sampling.max_tokens}"
            )
        if self.reward.on_repetition != "keep" and not self.sampling.repetition_run:
            raise ValueError(
                f"reward.on_repetition: {self.reward.on_repetition!r}, and no response is ever cut for repeating "
                f"itself; set sampling.repetition_run"
            )
        if self.servers is not None and self.rollout.replay:
            raise ValueError(
                f"servers: {self.servers.urls} would not be asked: rollout.replay is {self.rollout.replay!r}; leave "
                f"one of the two out"
            )
        check_router(self.router, self.model)
        if self.rollout.router_replay != "off" and not self.model.num_experts:
            raise ValueError(
                f"rollout.router_replay: {self.rollout.router_replay!r}, but a dense model has no router; choose 'off'"
            )
        if self.mesh.context and self.batch_shape.tokens % self.mesh.context:
            raise ValueError(
                f"mesh.context: {self.mesh.context} devices cannot share the {self.batch_shape.tokens} tokens of a row "
                f"evenly; set update.row_tokens to a multiple"
            )
        for name, sampling in (("sampling", self.sampling), ("evaluation.sampling", self.evaluation.sampling)):
            window, bound = self.problems.max_prompt_tokens + sampling.max_tokens, self.model.max_positions
            if window > bound > 0:
                raise ValueError(
                    f"{name}.max_tokens: {sampling.max_tokens} after a prompt of {self.problems.max_prompt_tokens} "
                    f"tokens make {window}, and the model was made for {bound} positions (model.max_positions); "
                    f"lower it or problems.max_prompt_tokens"
                )

    def warnings(self) -> list[str]:
        """What is allowed and yet seldom meant, one line each, told at the start of a run."""
        found, loss = [], self.loss
        if loss.ratio_anchor == "trainer" and self.update.updates_per_batch * self.update.passes == 1:
            found.append(
                "config.loss.ratio_anchor: 'trainer' with one update makes every ratio 1, so that caps and clips never "
                "act; raise update.updates_per_batch or update.passes, or anchor at the rollout"
            )
        if self.rollout.staleness and loss.ratio_anchor == "trainer" and not loss.mismatch_cap:
            found.append(
                f"config.loss.ratio_anchor: 'trainer' with rollout.staleness {self.rollout.staleness}: nothing weighs "
                f"that older weights sampled; anchor at the rollout, or set loss.mismatch_cap"
            )
        if loss.clip_low is not None and loss.clip_high is not None and loss.clip_high < loss.clip_low:
            found.append(
                f"config.loss.clip_high: {loss.clip_high:g} is below clip_low, {loss.clip_low:g}: rare tokens are held "
                f"back more than they are let go, the opposite of DAPO's 0.2 and 0.28"
            )
        return found

    @property
    def batch_shape(self) -> BatchShape:
        window = self.problems.max_prompt_tokens + self.sampling.max_tokens
        return BatchShape.of(self.update, self.rollout.prompts, self.rollout.responses, window)
