"""The rollout engine that lives in this process: prompts to sampled responses in one jitted call.

It knows token ids, not text, tasks or rewards. Every prompt is prefilled once and its cache repeated for the R
responses; a while-loop then samples one token per row and step until all rows have ended. Shapes are static (prompts
padded to one bucket, rows to one count), so that a run compiles each sampling setting once.

The noise of a token depends on (seed, prompt index, sample, position) alone: a prompt gets the same responses in any
batch. `rollout_logprobs` are always of the full softmax at the sampling temperature, whatever top-p or top-k cut away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from m1jax.errors import Stopped, UserError
from m1jax.mesh import GATHERED, TOKENS, MeshConfig, flat
from m1jax.model import cache as cache_lib
from m1jax.model.collectives import whole
from m1jax.model.config import ModelConfig
from m1jax.model.transformer import by_layer, head, hidden_states, parameter_specs
from m1jax.sharding import deal, on_mesh, placed, to_host
from m1jax.types import ENDINGS, HELDOUT_INDEX, Params, Prompt, Rollout, Sampling

ROWS = TOKENS
"""Here rows are dealt out along `context` too: a token that is decoded has no other tokens to be dealt out."""


class LocalEngine:
    """An `Engine` over the devices of a mesh.

    Experts, heads and vocabulary lie as in training; what training gathers layer by layer is gathered once, when
    weights are set: to do it at every token would take longer than the token.

    Args:
        config: the decoder.
        prompt_tokens: bucket that prompts are padded to; a longer prompt is refused.
        rows: responses sampled at the same time; a multiple of the responses per prompt.
        stop_ids: ids that end a response; the one that was sampled is part of it.
        record_experts: keep the experts that served, `Rollout.expert_ids`; those of held-out prompts are not kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        prompt_tokens: int,
        rows: int,
        stop_ids: Sequence[int],
        mesh: Mesh,
        record_experts: bool = False,
    ):
        sizes = on_mesh(config, mesh).mesh
        sizes = dataclasses.replace(sizes, data=1, fsdp=1, context=1)  # between these nothing is said
        self.config, self.mesh = dataclasses.replace(config, mesh=sizes), mesh
        self.specs = _specs(config)
        self.prompt_tokens, self.rows = prompt_tokens, rows
        self.record_experts = record_experts
        self.params: Params = None
        self.version = -1
        self.stopped: Callable[[], bool] = lambda: False  # asked between calls of the devices
        self._kept: Params = None  # the parameters again, which no update writes over
        self._behind: ThreadPoolExecutor | None = None
        self._sample = make_sampler(self.config, tuple(stop_ids), mesh)
        self._gather = jax.jit(partial(computed_with, dtype=config.dtype), out_shardings=placed(mesh, self.specs))

    def set_weights(self, params: Params, version: int) -> None:
        self.params = self._kept = None  # before others of their size come to be
        whole = all(self.mesh.shape[axis] == 1 for axis in GATHERED)
        self.params, self.version = params if whole else self._gather(params), version

    def generate(self, prompts: Sequence[Prompt], responses: int, sampling: Sampling, seed: int) -> list[list[Rollout]]:
        return self._generate(self.params, self.version, prompts, responses, sampling, seed, self.stopped)

    def submit(
        self, prompts: Sequence[Prompt], responses: int, sampling: Sampling, seed: int
    ) -> list[Future[list[Rollout]]]:
        """As `generate`, in a thread, with the weights of now to the end.

        On the devices that the trainer updates on, both take turns: what this buys is old samples to study, and time
        only where the two leave each other room.
        """
        if self._kept is None:
            self._kept = jax.tree.map(jnp.copy, self.params)
        if self._behind is None:
            self._behind = ThreadPoolExecutor(1, thread_name_prefix="local engine")
        futures: list[Future[list[Rollout]]] = [Future() for _ in prompts]
        per_call = max(self.rows // responses, 1)
        for start in range(0, len(prompts), per_call):
            part = slice(start, start + per_call)
            asked = self._kept, self.version, prompts[part], responses, sampling, seed
            self._behind.submit(self._answer, futures[part], *asked)
        return futures

    def close(self) -> None:
        """End the thread of `submit`, where there is one."""
        if self._behind is not None:
            self._behind.shutdown(cancel_futures=True)

    def _answer(self, futures: list[Future[list[Rollout]]], *asked: Any) -> None:
        wanted = [future.set_running_or_notify_cancel() for future in futures]
        if not any(wanted):
            return
        try:
            groups = self._generate(*asked)
        except BaseException as error:
            for future, waits in zip(futures, wanted, strict=True):
                if waits:
                    future.set_exception(error)
            return
        for future, waits, group in zip(futures, wanted, groups, strict=True):
            if waits:
                future.set_result(group)

    def _generate(
        self,
        params: Params,
        version: int,
        prompts: Sequence[Prompt],
        responses: int,
        sampling: Sampling,
        seed: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[list[Rollout]]:
        per_call = max(self.rows // responses, 1)
        record = self.record_experts and all(p.index < HELDOUT_INDEX for p in prompts)
        rollouts: list[list[Rollout]] = []
        for start in range(0, len(prompts), per_call):
            if stopped():
                raise Stopped
            chunk = prompts[start : start + per_call]
            arrays = deal(self._pad(chunk, per_call), self.mesh, 0, ROWS)
            found = self._sample(params, *arrays, seed, sampling=sampling, responses=responses, record=record)
            sampled, experts = to_host(found)
            ids, logprobs, lengths, endings = (x.reshape(per_call, responses, *x.shape[1:]) for x in sampled)
            served = _by_rollout(experts, chunk, lengths)
            for p, prompt in enumerate(chunk):
                rollouts.append(
                    [
                        Rollout(
                            prompt_index=prompt.index,
                            sample=i,
                            token_ids=ids[p, i, : lengths[p, i]].copy(),
                            rollout_logprobs=logprobs[p, i, : lengths[p, i]].copy(),
                            ending=ENDINGS[endings[p, i]],
                            weight_version=version,
                            expert_ids=served[p][i],
                        )
                        for i in range(responses)
                    ]
                )
        return rollouts

    def _pad(self, prompts: Sequence[Prompt], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens_PT = np.zeros((count, self.prompt_tokens), np.int32)
        segment_ids_PT = np.zeros((count, self.prompt_tokens), np.int32)
        index_P = np.zeros((count,), np.uint32)
        for p, prompt in enumerate(prompts):
            length = len(prompt.token_ids)
            if length > self.prompt_tokens:
                raise UserError(
                    f"prompt {prompt.index} of task {prompt.problem.task} has {length} tokens, more than the "
                    f"prompt window of {self.prompt_tokens}"
                )
            tokens_PT[p, :length] = prompt.token_ids
            segment_ids_PT[p, :length] = 1
            index_P[p] = prompt.index
        return tokens_PT, segment_ids_PT, index_P


def make_sampler(config: ModelConfig, stop_ids: tuple[int, ...], mesh: Mesh) -> Callable[..., Any]:
    """`sample`, jitted, with the prompts dealt out to the devices, each of which decodes its own rows to their end."""
    rows = P(ROWS)

    @partial(jax.jit, static_argnames=("sampling", "responses", "record"))
    def sample_shards(params, tokens_PT, segment_ids_PT, prompt_index_P, seed, *, sampling, responses, record):
        local = partial(sample, config=config, sampling=sampling, responses=responses, stop_ids=stop_ids, record=record)
        specs = _specs(config), rows, rows, rows, P()
        shard = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return shard(params, tokens_PT, segment_ids_PT, prompt_index_P, seed)

    return sample_shards


def sample(
    params: Params,
    tokens_PT: jax.Array,
    segment_ids_PT: jax.Array,
    prompt_index_P: jax.Array,
    seed: int,
    config: ModelConfig,
    sampling: Sampling,
    responses: int,
    stop_ids: tuple[int, ...],
    record: bool = False,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
    """Sample `responses` continuations of every prompt; rows are prompt-major, B = P * responses.

    Args:
        tokens_PT, segment_ids_PT: right-padded prompts; a row of zeros is a dummy and yields nothing.
        prompt_index_P: uint32, names the prompt in the noise.
        record: keep the experts that serve.

    Returns:
        (ids_BS int32, logprobs_BS float32, lengths_B int32, endings_B int32): S = sampling.max_tokens, zeros after the
        end, endings as an index into `m1jax.types.ENDINGS`.
        (expert_ids_PTLA, expert_ids_BSLA) of prompts and responses in the smallest signed dtype, -1 where no live token
        was read; None without `record`.
    """
    P, T = tokens_PT.shape
    B, S = P * responses, sampling.max_tokens

    params = by_layer(params, config)  # here, not in every step
    cache = cache_lib.empty(config, P, T + S)
    hidden_MD, cache, routed = hidden_states(params, config, tokens_PT, segment_ids_PT, cache)
    experts_PTLA = _experts(routed, config, segment_ids_PT) if record else None
    last_P = jnp.maximum(segment_ids_PT.sum(axis=1) - 1, 0)
    hidden_PD = hidden_MD.reshape(P, T, -1)[jnp.arange(P), last_P]
    logits_BV = jnp.repeat(logits(params, hidden_PD, config), responses, axis=0)
    cache = cache_lib.repeat_rows(cache, responses)

    key_P = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), prompt_index_P)
    key_BS = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(responses)))(key_P)
    key_B = key_BS.reshape(B)

    def step(carry):
        t, cache, logits_BV, ids_BS, logprobs_BS, experts_BSLA, lengths_B, endings_B, run_B, live_B, _ = carry
        token_B, logprob_B = sample_token(key_B, t, logits_BV, sampling)
        ids_BS = ids_BS.at[:, t].set(jnp.where(live_B, token_B, 0))
        logprobs_BS = logprobs_BS.at[:, t].set(jnp.where(live_B, logprob_B, 0.0))
        lengths_B = lengths_B + live_B

        run_B = jnp.where(jnp.exp(logprob_B) > sampling.repetition_probability, run_B + 1, 0)
        stopped_B = jnp.isin(token_B, jnp.array(stop_ids, jnp.int32)) if stop_ids else jnp.zeros_like(live_B)
        repeated_B = (run_B >= sampling.repetition_run) & (sampling.repetition_run > 0) & ~stopped_B
        ended_B = live_B & (stopped_B | repeated_B)
        endings_B = jnp.where(
            ended_B, jnp.where(stopped_B, ENDINGS.index("stop"), ENDINGS.index("repetition")), endings_B
        )
        live_B = live_B & ~ended_B

        segment_B1 = live_B[:, None].astype(jnp.int32)
        hidden_BD, cache, routed = hidden_states(params, config, token_B[:, None], segment_B1, cache)
        if experts_BSLA is not None:
            experts_BSLA = jax.lax.dynamic_update_slice_in_dim(experts_BSLA, _experts(routed, config, segment_B1), t, 1)
        logits_BV = logits(params, hidden_BD, config)
        said = ids_BS, logprobs_BS, experts_BSLA, lengths_B, endings_B
        return t + 1, cache, logits_BV, *said, run_B, live_B, _any(live_B, config.mesh)

    zeros_B = jnp.zeros((B,), jnp.int32)
    experts_BSLA = None if experts_PTLA is None else jnp.full((B, S, *experts_PTLA.shape[2:]), -1, experts_PTLA.dtype)
    live_B = jnp.repeat(segment_ids_PT.any(axis=1), responses)
    carry = (
        jnp.zeros((), jnp.int32), cache, logits_BV, jnp.zeros((B, S), jnp.int32), jnp.zeros((B, S), jnp.float32),
        experts_BSLA, zeros_B, jnp.full((B,), ENDINGS.index("length"), jnp.int32), zeros_B, live_B,
        _any(live_B, config.mesh),
    )  # fmt: skip
    carry = jax.lax.while_loop(lambda carry: (carry[0] < S) & carry[-1], step, carry)
    _, _, _, ids_BS, logprobs_BS, experts_BSLA, lengths_B, endings_B, *_ = carry
    sampled = ids_BS, logprobs_BS, lengths_B, endings_B
    return sampled, None if experts_PTLA is None or experts_BSLA is None else (experts_PTLA, experts_BSLA)


def logits(params: Params, hidden_BD: jax.Array, config: ModelConfig) -> jax.Array:
    """logits_BV over the whole vocabulary, of which a device may have a part."""
    return whole(head(params, hidden_BD), "tensor", config.mesh, 1)


def _any(live_B: jax.Array, mesh: MeshConfig) -> jax.Array:
    """Whether a row is live here, or on a device that shares its experts and has to go on for our sake."""
    return live_B.any() if mesh.expert == 1 else jax.lax.pmax(live_B.any(), "expert")


def computed_with(params: Params, dtype: str) -> Params:
    """Weights in the dtype that they are computed in; routers, scales and the head, which is read wide, keep theirs.

    The same numbers come of it: layers cast their weights in any case.
    """
    head = "head" if "head" in params else "embedding"

    def narrowed(path: Any, x: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        return x if names[0] == head or names[-1] in ("router", "scale") else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(narrowed, params)


def _specs(config: ModelConfig) -> Any:
    """Where the engine's parameters lie."""
    return jax.tree.map(_gathered, parameter_specs(config))


def _gathered(spec: P) -> P:
    """Where a parameter lies once it is gathered."""
    return P(*(None if flat(entry) == GATHERED else entry for entry in spec))


def _by_rollout(experts: Any, prompts: Sequence[Prompt], lengths_PR: np.ndarray) -> list[list[np.ndarray | None]]:
    """What `sample` recorded as one array [prompt + response, L, A] for each rollout, or as many None."""
    if experts is None:
        return [[None] * lengths_PR.shape[1] for _ in prompts]
    of_prompts, of_responses = experts
    of_responses = of_responses.reshape(*lengths_PR.shape, *of_responses.shape[1:])

    def joined(p: int, i: int) -> np.ndarray:
        return np.concatenate([of_prompts[p, : len(prompts[p].token_ids)], of_responses[p, i, : lengths_PR[p, i]]])

    return [[joined(p, i) for i in range(lengths_PR.shape[1])] for p in range(len(prompts))]


def _experts(routed: dict[str, jax.Array], config: ModelConfig, segment_ids_BT: jax.Array) -> jax.Array:
    """[B, T, L, A] of what the routers tell, in the smallest signed dtype that holds them; -1 on padding."""
    ids_MLA = jnp.moveaxis(routed["expert_ids"], 0, 1).astype(np.min_scalar_type(-config.num_experts))
    ids_BTLA = ids_MLA.reshape(*segment_ids_BT.shape, *ids_MLA.shape[1:])
    return jnp.where(segment_ids_BT[:, :, None, None] > 0, ids_BTLA, -1)


def sample_token(
    key_B: jax.Array, t: jax.Array | int, logits_BV: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """One token per row by the Gumbel-max rule, and its log-probability under the full tempered softmax.

    Args:
        key_B: typed keys, of (seed, prompt index, sample).
        t: int32 [], number of the token in its response; with the key it is all that the noise depends on.
        logits_BV: float32.

    Returns:
        token_B int32 and logprob_B float32.
    """
    if sampling.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        logits_BV = logits_BV / sampling.temperature
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, t), logits_BV.shape[1:]))(key_B)
        token_B = jnp.argmax(truncate(logits_BV, sampling.top_p, sampling.top_k) + noise_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), (chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)).astype(jnp.float32)


def truncate(logits_BV: jax.Array, top_p: float, top_k: int) -> jax.Array:
    """-inf on all but the top-k ids and the smallest set of most probable ids with mass at least top-p."""
    if top_k > 0:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        descending_BV = -jnp.sort(-logits_BV, axis=-1)
        mass_before_BV = jnp.cumsum(jax.nn.softmax(descending_BV, axis=-1), axis=-1) - jax.nn.softmax(
            descending_BV, axis=-1
        )
        # An id stays while the mass of the more probable ones has not reached top-p; the first one always stays.
        cutoff_B1 = jnp.min(jnp.where(mass_before_BV < top_p, descending_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < cutoff_B1, -jnp.inf, logits_BV)
    return logits_BV
