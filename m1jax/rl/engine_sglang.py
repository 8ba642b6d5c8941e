"""The rollout engine that asks SGLang servers: prompts to sampled responses, over HTTP.

It speaks token ids in both directions. Every response is a coroutine, `_respond`, which asks, keeps what came, and asks
again from there until the response has ended: after a failure, after weights changed, after a segment. So a response is
neither lost nor doubled, and its tokens may come from several servers and weights; each token keeps its log-probability
and the version of the weights that sampled it.

    _respond ──▶ Pool.server (m1jax.rl.servers.pool)     which server, when, and whether it may be trusted
             ──▶ protocol.request, Server.events          what is asked (m1jax.rl.servers.protocol, server)
             ──▶ protocol.read_piece                      what is believed
             ──▶ Response.take                            stop, length, repetition

`rollout_logprobs` mean what they mean in the local engine: the full softmax at the sampling temperature. The noise is
the servers' own (one in deterministic mode gets a seed from seed, prompt and sample).

All of it runs in one event loop in a thread of its own, so that answers come in while the trainer updates.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m1jax.errors import EngineLost, ServerRefused, Stopped, UserError
from m1jax.model.config import ModelConfig
from m1jax.rl.servers.keys import Keys, keys_from_environment
from m1jax.rl.servers.pool import HEALTH_S, Pool
from m1jax.rl.servers.probes import Needs
from m1jax.rl.servers.protocol import Fault, Piece, new_id, read_experts, read_piece, request, with_processor
from m1jax.rl.servers.server import Server, open_session
from m1jax.rl.servers.settings import ServersConfig
from m1jax.rl.servers.weights import Published, new_label, prune, publish
from m1jax.types import HELDOUT_INDEX, Ending, Params, Prompt, Rollout, Sampling
from m1jax.weights.hf_config import to_hf
from m1jax.weights.hf_names import HFTensor

LEAVE_S = 5.0
"""Seconds for the last event of an answer that was aborted."""
FAULT_KINDS = (
    "unreachable", "timeout", "cut", "error", "busy", "refused", "aborted", "logprobs", "lengths", "vocabulary", "ids",
    "identity", "duplicate", "version",
)  # fmt: skip


class Response:
    """One response while it grows.

    Attributes:
        token_ids, logprobs, versions: of every token so far.
        ending: None while it goes on.
        experts: integers [prompt + tokens, L, A] as far as they are known, -1 elsewhere; None without a record.
        run: tokens above the threshold of repetition that it ends with.
    """

    def __init__(self, sampling: Sampling, stop_ids: frozenset[int]):
        self.sampling, self.stop_ids = sampling, stop_ids
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.ending: Ending | None = None
        self.experts: np.ndarray | None = None
        self.run = 0

    def take(self, token_ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int]) -> None:
        """Append tokens up to the one that ends the response; what comes after that one is dropped.

        The rules are those of `m1jax.rl.engine_local.sample`, in its arithmetic (float32).
        """
        sampling, run = self.sampling, self.run
        threshold = np.float32(sampling.repetition_probability)
        likely = np.exp(np.asarray(logprobs, np.float32)) > threshold
        for token, logprob, above, version in zip(token_ids, logprobs, likely, versions, strict=True):
            if self.ending is not None:
                return
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self.versions.append(version)
            run = run + 1 if above else 0
            if token in self.stop_ids:
                self.ending = "stop"
            elif 0 < sampling.repetition_run <= run:
                self.ending = "repetition"
            elif len(self.token_ids) == sampling.max_tokens:
                self.ending = "length"
        self.run = run

    def cut(self, length: int) -> None:
        """Take back what came after the first `length` tokens."""
        kept = self.token_ids[:length], self.logprobs[:length], self.versions[:length]
        self.token_ids, self.logprobs, self.versions, self.ending, self.run = [], [], [], None, 0
        self.take(*kept)

    def rollout(self, prompt: Prompt, sample: int) -> Rollout:
        """The finished response."""
        assert self.ending is not None
        versions = np.array(self.versions, np.int32)
        return Rollout(
            prompt_index=prompt.index,
            sample=sample,
            token_ids=np.array(self.token_ids, np.int32),
            rollout_logprobs=np.array(self.logprobs, np.float32),
            ending=self.ending,
            weight_version=int(versions.min()),
            expert_ids=self.experts,
            weight_versions=versions if versions.min() < versions.max() else None,
        )


class SGLangEngine:
    """An `AsyncEngine` over servers.

    Args:
        config: where they are and how they are treated.
        model: the decoder that trains, which the servers have to serve.
        stop_ids: ids that end a response; the one that was sampled is part of it.
        temperature: that responses are sampled at whose log-probabilities count.
        positions: longest prompt and response together.
        weights: folder that versions of the weights are put in.
        files: folder of tokenizer files that go with them.
        record_experts: keep the experts that served, `Rollout.expert_ids`; those of held-out prompts are not kept.
        log: takes the lines meant for a person.
        keys: of the servers; None takes them from the environment.
    """

    def __init__(
        self,
        config: ServersConfig,
        model: ModelConfig,
        *,
        stop_ids: Sequence[int],
        temperature: float,
        positions: int,
        weights: Path,
        files: Path | None = None,
        record_experts: bool = False,
        log: Callable[[str], None] = print,
        keys: Keys | None = None,
    ):
        self.config, self.model, self.stop_ids = config, model, frozenset(stop_ids)
        self.weights, self.files, self.record_experts, self.log = weights, files, record_experts, log
        self.stopped: Callable[[], bool] = lambda: False  # asked while answers are waited for
        self.read: Callable[[Params, HFTensor], np.ndarray] | None = None  # of `publish`
        self.counts: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        self._versions: dict[str, int] = {}
        self._sync: dict[str, float] = {}
        self._speeds: deque[float] = deque(maxlen=256)
        self._doubt = 1.0  # that the next answers are as quick: those that are not streamed get 1 / doubt of the time
        self._tasks: set[asyncio.Task[Any]] = set()
        self._aborts: set[asyncio.Task[None]] = set()
        self._update: asyncio.Task[Any] | None = None  # the last one of the weights
        self._limits: set[asyncio.Timeout] = set()  # of the streams under way
        self._cpu = 0.0
        self._progress, self._longest = time.monotonic(), 1
        needs = Needs(
            to_hf(model)["model_type"], model.vocab_size, tuple(sorted(self.stop_ids)), temperature, positions,
            config.repetition_stop, config.update_mode, record_experts,
        )  # fmt: skip
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout servers", daemon=True)
        self._thread.start()
        self.pool: Pool = self._run(self._open(needs, keys or keys_from_environment())).result()

    def set_weights(self, params: Params, version: int) -> None:
        """Write the weights, and return when the servers use them.

        Raises:
            Stopped: the run was asked to stop; servers may have the old weights or the new ones.
            EngineLost: no server does, nor came to do so within `patience_s`.
            ServerRefused: a server is set up in a way that would bias the importance ratio, or refuses our key.
        """
        start = time.perf_counter()
        label = new_label(version)
        self.weights.mkdir(parents=True, exist_ok=True)
        published = publish(
            self.weights, params, self.model, version, label, self.config.weights_dtype, self.files, self.read
        )
        self._versions[label] = version
        self._wait([self._run(self._take_up(published))], self.stopped)
        prune(self.weights, reading=self.pool.reading)
        self._sync = {
            "sync/bytes": published.bytes,
            "sync/write_seconds": published.seconds,
            "sync/seconds": time.perf_counter() - start,
        }

    def generate(self, prompts: Sequence[Prompt], responses: int, sampling: Sampling, seed: int) -> list[list[Rollout]]:
        return self._wait(self.submit(prompts, responses, sampling, seed), self.stopped)

    def submit(
        self, prompts: Sequence[Prompt], responses: int, sampling: Sampling, seed: int
    ) -> list[concurrent.futures.Future[list[Rollout]]]:
        """Begin to answer; what comes of it while weights change is what `update_mode` says."""
        for prompt in prompts:  # an id beyond the vocabulary ends a whole server
            if odd := [i for i in prompt.token_ids if not 0 <= i < self.model.vocab_size]:
                raise UserError(
                    f"prompt {prompt.index} of task {prompt.problem.task} has the id {odd[0]}, the model has "
                    f"{self.model.vocab_size}; config.tokenizer.path is of another model"
                )
        return [self._run(self._group(prompt, responses, sampling, seed)) for prompt in prompts]

    def take_metrics(self) -> dict[str, float]:
        """What happened since the last call, and the last update of weights."""
        since = Counter(self.counts)
        since.subtract(self._taken)
        self._taken = Counter(self.counts)
        cpu = self._run(_cpu_seconds()).result()
        metrics: dict[str, float] = {
            "engine/requests": since["requests"],
            "engine/faults": sum(since[kind] for kind in FAULT_KINDS),
            "engine/continued": since["continued"],
            "engine/servers": len(self.pool.serving),
            "engine/servers_out": since["servers_out"],
            "engine/servers_back": since["servers_back"],
            "engine/restarts": since["restarts"],
            "engine/updates_failed": since["updates_failed"],
            "engine/retractions": since["retractions"],
            "engine/bytes": since["bytes"],
            "engine/cached_share": since["cached_tokens"] / max(since["prompt_tokens"], 1),
            "engine/client_cpu": cpu - self._cpu,
        }
        metrics |= {f"engine/fault_{kind}": since[kind] for kind in FAULT_KINDS if since[kind]}
        metrics |= self._sync
        self._cpu, self._sync = cpu, {}
        return metrics

    def close(self) -> None:
        """Leave the servers, which go on serving what they have."""
        if self._loop.is_closed():
            return
        self._run(self._close()).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()

    async def _group(self, prompt: Prompt, responses: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """All responses to one prompt."""
        task = asyncio.current_task()
        assert task is not None
        if not self._tasks:
            self._progress = time.monotonic()
        self._tasks.add(task)
        answers = [asyncio.create_task(self._respond(prompt, i, sampling, seed)) for i in range(responses)]
        try:
            return list(await asyncio.gather(*answers))
        except asyncio.CancelledError:
            if self.pool.broken is not None:
                raise self.pool.broken from None
            raise
        finally:
            for answer in answers:
                answer.cancel()
            self.pool.forget(prompt.index)
            self._tasks.discard(task)

    async def _respond(self, prompt: Prompt, sample: int, sampling: Sampling, seed: int) -> Rollout:
        """One response, asked for until it has ended."""
        response, failures, waits = Response(sampling, self.stop_ids), 0, 0
        noise = zlib.crc32(f"{seed} {prompt.index} {sample}".encode()) >> 1
        while response.ending is None:
            before, fault = len(response.token_ids), None
            async with self.pool.server(prompt.index) as server:
                self.counts["requests"] += 1
                finish = None
                try:
                    finish = await self._continue(server, prompt, response, noise)
                except Fault as error:
                    fault = error
                    self.pool.note(server, fault)
            if len(response.token_ids) > before:
                failures = waits = 0
                self.counts["continued"] += response.ending is None and finish != "length"  # which is a segment's end
                continue
            # A queue that is full says nothing of the request; that nothing moves at all is watched elsewhere.
            failures += fault is None or fault.kind != "busy"
            detail = fault.detail if fault else f"{server.url}: aborted before the first token"
            if failures >= self.config.attempts:
                told = f"prompt {prompt.index}: {failures} failures in a row, the last: {detail}"
                raise ServerRefused(told) if fault and fault.kind == "refused" else EngineLost(told)
            waits += 1
            await asyncio.sleep(random.uniform(0, min(0.05 * 2**waits, 5.0)))
        if self._records(prompt):
            response.experts = self._experts_so_far(prompt, response)
        return response.rollout(prompt, sample)

    async def _continue(self, server: Server, prompt: Prompt, response: Response, noise: int) -> str | None:
        """One request: take what comes of it, the tokens before a failure too. Why it ended, as the server says.

        Raises:
            Fault: it failed. What was taken is sound.
        """
        current, first = self.pool.current, len(response.token_ids)
        assert current is not None
        stream = self.config.repetition_stop == "stream"
        left = response.sampling.max_tokens - first
        if self.config.repetition_stop == "segments" and response.sampling.repetition_run:
            left = min(left, max(self.config.segment_tokens, first // 4))
        self._longest = max(self._longest, left)
        body = request(
            new_id(), [*prompt.token_ids, *response.token_ids], left, response.sampling, sorted(self.stop_ids),
            stream=stream, stream_interval=self.config.stream_interval, extra_key=current.label,
            seed=noise if server.deterministic else None, experts=self._records(prompt),
        )  # fmt: skip
        if self.config.repetition_stop == "processor" and response.sampling.repetition_run:
            body = with_processor(body, response.sampling, response.run)
        headers = {"X-SMG-Routing-Key": str(prompt.index)} if self.config.gateway else None
        if stream:
            return await self._stream(server, body, headers, left, prompt, response, current)
        start = self._clock()
        answer = await self._in_time(server, body, headers, left)
        piece = read_piece(answer, body["rid"], 0, left, self.model.vocab_size)
        if piece.finish is None:
            raise Fault("cut", f"{server.url}: an answer without a finish_reason")
        self._take(piece, response, first, current.version)
        self._finish(piece, prompt, response, first, current.version)
        self._note_speed(len(piece.token_ids), left, start)
        return piece.finish

    async def _stream(
        self,
        server: Server,
        body: dict[str, Any],
        headers: dict[str, str] | None,
        left: int,
        prompt: Prompt,
        response: Response,
        current: Published,
    ) -> str | None:
        """Take an answer event by event that was asked for when the servers had `current`.

        An event that is the first to name other weights may hold tokens of the ones before too; only the last event
        tells them apart. Where there is none, that event and what came after it are taken back.

        Raises:
            Fault: it failed. What was taken and not taken back is sound.
        """
        first, seen, label, doubtful = len(response.token_ids), 0, current.label, -1
        start, stall_s = self._clock(), self.config.stall_s
        events = server.events(body, headers)
        try:
            async with asyncio.timeout(stall_s) as limit:
                self._limits.add(limit)
                async for event in events:
                    if response.ending is None:
                        self._allow(limit, stall_s)
                    piece = read_piece(event, body["rid"], seen, left, self.model.vocab_size)
                    goes_on, before = response.ending is None, len(response.token_ids)
                    self._take(piece, response, first, current.version)
                    seen += len(piece.token_ids)
                    if piece.finish is not None:
                        doubtful = doubtful if not piece.spans else -1
                        self._finish(piece, prompt, response, first, current.version)
                        self._note_speed(seen, left, start)
                        return piece.finish
                    if piece.version != label and doubtful < 0:
                        doubtful = before
                    label = piece.version
                    if self._clock() - start > self._deadline(left):
                        raise Fault("timeout", f"{server.url}: {seen} of {left} tokens in {self._deadline(left):.0f} s")
                    if goes_on and response.ending is not None:
                        await server.abort(body["rid"])  # the last event still tells versions and experts
                        self._allow(limit, LEAVE_S)
            raise Fault("cut", f"{server.url}: a stream that ends without a finish_reason")
        except TimeoutError as error:
            if response.ending is None:
                raise Fault("timeout", f"{server.url}: nothing for {stall_s:.0f} s") from error
        finally:
            self._limits.discard(limit)
            await events.aclose()
            if doubtful >= 0:
                response.cut(doubtful)

    async def _in_time(self, server: Server, body: dict[str, Any], headers: dict[str, str] | None, tokens: int) -> Any:
        """The answer to a request for so many tokens; its deadline comes nearer as the servers show how quick they are.

        Nothing is seen of it before it is whole, so that a server that is silent for `stall_s` has to be healthy.

        Raises:
            Fault: it did not come in time, or its server was found to be sick meanwhile.
        """
        task, start = asyncio.create_task(server.whole(body, headers)), self._clock()
        look, doubt = start + self.config.stall_s, self._doubt
        try:
            while not (await asyncio.wait({task}, timeout=0.5))[0]:
                allowed = self._deadline(tokens) / doubt
                if self._clock() - start > allowed:
                    # Servers may have become slower than any answer told. Of many that are late at once, one says so.
                    self._doubt = min(self._doubt, max(0.75 * doubt, 0.1))
                    raise Fault("timeout", f"{server.url}: no answer in {allowed:.0f} s")
                if self._clock() > look and not self.pool.updating:
                    look = self._clock() + self.config.stall_s
                    await self._see_that_it_lives(server, task)
            self._doubt = max(self._doubt, min(doubt / 0.75, 1.0))
            return task.result()
        finally:
            if not task.done():  # a server does not notice that somebody left who was not reading a stream
                task.cancel()
                self._aborts.add(abort := asyncio.create_task(server.abort(body["rid"])))
                abort.add_done_callback(self._aborts.discard)

    async def _see_that_it_lives(self, server: Server, answer: asyncio.Task[Any]) -> None:
        """Look at a server that has been silent for long.

        Raises:
            Fault: it is not healthy, and has still not answered.
        """
        try:
            await server.call("/health", timeout_s=HEALTH_S)
        except Fault as fault:
            if not answer.done() and not self.pool.updating:
                told = f"{server.url}: silent for {self.config.stall_s:.0f} s, and /health says {fault.detail}"
                raise Fault("timeout", told) from fault

    def _clock(self) -> float:
        """Seconds that stand still while weights change: nothing is generated then, and nobody is late."""
        return self.pool.clock()

    def _allow(self, limit: asyncio.Timeout, seconds: float) -> None:
        """So many seconds from now; while weights change, any time."""
        if not limit.expired():  # one that is being raised cannot be taken back
            limit.reschedule(None if self.pool.updating else self._loop.time() + seconds)

    def _take(self, piece: Piece, response: Response, first: int, floor: int) -> None:
        """Append the tokens of a piece, each under the weights that it is of.

        An event names the weights of the moment. The last one tells of all tokens of the request, which began when the
        response had `first`; those from the first that is of other weights than it should be on are taken back.
        """
        versions: list[int] = []
        for label, start, end in piece.spans or ((piece.version, 0, len(piece.token_ids)),):
            try:
                versions += [self._version(label, floor)] * (end - start) if end > start else []
            except Fault:
                if piece.spans:
                    response.cut(first + start)
                raise
        told = len(versions) - len(piece.token_ids)  # tokens of earlier events, of which some are past the end
        there = min(told, len(response.versions) - first)
        response.versions[first : first + there] = versions[:there]
        if piece.token_ids:
            response.take(piece.token_ids, piece.logprobs, versions[told:])
            self._progress = time.monotonic()

    def _finish(self, piece: Piece, prompt: Prompt, response: Response, first: int, floor: int) -> None:
        """What else the end of a request tells: experts, counts."""
        self.counts["prompt_tokens"] += piece.prompt_tokens
        self.counts["cached_tokens"] += piece.cached_tokens
        self.counts["retractions"] += piece.retractions
        if piece.finish == "abort" and not piece.token_ids and self.pool.current_version == floor:
            self.counts["aborted"] += 1  # and not by an update of ours
        if piece.finish == "stop" and response.ending is None:  # at an id that `take` did not stop at
            raise ServerRefused(
                f"a server ended an answer at id {piece.matched}, which is no stop token of this run; add it to "
                f"config.tokenizer.stop_tokens, or take it out of eos_token_id in the model folder that is served"
            )
        if self._records(prompt) and response.versions:
            self._record_experts(piece, prompt, response, first)

    def _record_experts(self, piece: Piece, prompt: Prompt, response: Response, first: int) -> None:
        """The experts of all tokens whose successor was sampled with the weights that the request ended with.

        After an update a server computes a prefix anew: the experts that it tells of older tokens are not those that
        served when these were sampled.
        """
        if piece.routed is None:
            if not piece.token_ids and piece.finish == "abort":
                return
            raise ServerRefused("a server sent no routed_experts; start it with --enable-return-routed-experts")
        model, before = self.model, len(prompt.token_ids)
        generated = piece.spans[-1][2] if piece.spans else len(piece.token_ids)
        read = before + first + max(generated - 1, 0)
        routed_TLA = read_experts(piece.routed, read, model.num_layers, model.experts_per_token, model.num_experts)
        experts = self._experts_so_far(prompt, response)
        versions = np.array(response.versions, np.int32)
        successor = np.clip(np.arange(read) + 1 - before, 0, len(versions) - 1)
        known = (versions[successor] == versions[-1])[: len(experts) - 1]
        experts[: len(known)][known] = routed_TLA[: len(known)][known]
        response.experts = experts

    def _experts_so_far(self, prompt: Prompt, response: Response) -> np.ndarray:
        """[prompt + tokens, L, A], -1 where nothing is on record."""
        model, total = self.model, len(prompt.token_ids) + len(response.token_ids)
        experts = np.full(
            (total, model.num_layers, model.experts_per_token), -1, np.min_scalar_type(-model.num_experts)
        )
        if response.experts is not None:
            experts[: len(response.experts)] = response.experts
        return experts

    def _records(self, prompt: Prompt) -> bool:
        """Whether experts are asked for; not for held-out prompts."""
        return self.record_experts and prompt.index < HELDOUT_INDEX

    def _version(self, label: str, floor: int) -> int:
        """The version that a label stands for.

        Raises:
            Fault: it is none of this run, or older than what the server had when it was asked.
        """
        version = self._versions.get(label)
        if version is None or version < floor:
            raise Fault("version", f"an answer of weights {label!r}, version {floor} or newer was expected")
        return version

    def _note_speed(self, tokens: int, asked: int, start: float) -> None:
        """Remember how quick a request was; one of a few tokens says more of the queue than of the speed."""
        if tokens >= min(32, asked / 4):
            self._speeds.append(tokens / max(self._clock() - start, 1e-6))

    def _deadline(self, tokens: int) -> float:
        """Seconds that a request for so many tokens may take: four times what it takes at the slowest speed seen."""
        return self.config.stall_s + 4 * tokens / self._slowest()

    def _slowest(self) -> float:
        """Tokens a second of the slowest of the last requests."""
        return min(self._speeds, default=self.config.slowest_tokens_per_s)

    async def _open(self, needs: Needs, keys: Keys) -> Pool:
        self._session = open_session()
        pool = Pool(self.config, self._session, keys, needs, self.log, self.counts)
        self._watchers = [asyncio.create_task(pool.watch()), asyncio.create_task(self._watch(pool))]
        return pool

    async def _take_up(self, published: Published) -> None:
        self._update = asyncio.current_task()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(None)
        try:
            await self.pool.publish(published)
        finally:
            for limit in self._limits:
                self._allow(limit, self.config.stall_s)
            self._progress = time.monotonic()

    async def _watch(self, pool: Pool) -> None:
        """End all waiting when no server has given a token for too long, and say why."""
        while True:
            await asyncio.sleep(0.2)
            allowed = self.config.patience_s
            if self.config.repetition_stop != "stream":
                allowed += self._deadline(self._longest) / self._doubt  # nothing is seen of a request before its end
            if pool.loading:
                self._progress = time.monotonic()
            if self._tasks and time.monotonic() - self._progress > allowed and pool.broken is None:
                pool.broken = EngineLost(f"no token from any rollout server for {allowed:.0f} s: {pool.causes()}")
            if pool.broken is not None:
                for task in list(self._tasks):
                    task.cancel()

    async def _close(self) -> None:
        update = {self._update} if self._update is not None else set()
        for task in (*self._watchers, *self._tasks, *update):
            if not task.cancelling():  # a second time would end what it does at its end
                task.cancel()
        self.pool.close()
        # An update that is left ends the pause of its server first.
        if rest := {*self._watchers, *self._tasks, *self._aborts, *self.pool.lookers, *update}:
            await asyncio.wait(rest, timeout=5.0)  # a server that hangs does not hold us up
        await self._session.close()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(
        self, futures: Sequence[concurrent.futures.Future[Any]], stopped: Callable[[], bool] = lambda: False
    ) -> list[Any]:
        """Their results; the first failure, or being stopped, ends them all."""
        try:
            pending = set(futures)
            while pending:  # in short waits, for a signal is seen between two of them
                done, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_EXCEPTION)
                if stopped():
                    raise Stopped
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


async def _cpu_seconds() -> float:
    """CPU time of the thread that this runs in."""
    return time.thread_time()
