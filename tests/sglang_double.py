"""An SGLang server of this process, for tests: the HTTP protocol of 0.5.23 as measured, a toy model, faults on demand.

`tests/sglang_contract.py` holds it to the real server. What it deliberately does not know: text (it is a server
started with --skip-tokenizer-init), several ranks, and the real one's time: a health check takes it no second, a
client's leaving is seen at once (the real one looks every four seconds unless it streams).
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from aiohttp import web

from tests import sglang_faults, sglang_requests
from tests.sglang_faults import KINDS as ALL
from tests.sglang_model import Job, Scheduler, digest, encode_experts, logprobs, routed_experts
from tests.sglang_requests import Json, Refused, bad, invalid

__all__ = ["ALL", "Double", "Received", "digest", "logprobs", "routed_experts"]

OPEN = ("/health", "/ready", "/metrics")  # never need a key
ORDINARY = ("/generate", "/model_info", "/get_model_info", "/server_info", "/get_server_info")
CONTROL = {"/abort_request", "/pause_generation", "/continue_generation", "/update_weights_from_disk", "/flush_cache",
           "/weights_checker", "/begin_weight_update", "/end_weight_update"}  # fmt: skip
NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running or queued. "
    "Retract or finish them, then call /flush_cache."
)


class Received(NamedTuple):
    path: str
    body: Any  # the JSON, or None
    headers: dict[str, str]


class Double:
    """The server; `with Double(...) as double` starts and ends it. All methods may be called from any thread."""

    def __init__(self, *, vocab_size: int = 64, eos_ids: Sequence[int] = (), weights: int = 0,
                 weight_version: str = "default", api_key: str = "", admin_key: str = "", incremental: bool = True,
                 weight_versions: bool = True, checker: bool = True, original_logprobs: bool = False,
                 max_queued: int | None = None, max_running: int = 64, seconds_per_token: float = 0.0,
                 stream_interval: int = 1, context_length: int = 32768, deterministic: bool = False,
                 experts: tuple[int, int, int] | None = None, version: str = "0.5.23", model_path: str = "/models/toy",
                 script: Callable[[list[int]], list[tuple[int, float]] | None] | None = None, port: int = 0,
                 health_timeout: float = 0.05, slow_seconds: float = 0.2, seed: int = 0,
                 noise: float = 0.0):  # fmt: skip
        self.vocab_size, self.eos_ids, self.start_weights = vocab_size, tuple(eos_ids), weights
        self.start_version, self.start_path, self.api_key, self.admin_key = (
            weight_version,
            model_path,
            api_key,
            admin_key,
        )
        self.incremental, self.weight_versions, self.checker = incremental, weight_versions, checker
        self.original_logprobs, self.max_queued, self.max_running = original_logprobs, max_queued, max_running
        self.seconds_per_token, self.stream_interval = seconds_per_token, stream_interval
        self.context_length, self.deterministic, self.experts = context_length, deterministic, experts
        self.version, self.script, self.port, self.seed = version, script, port, seed
        self.health_timeout, self.slow_seconds = health_timeout, slow_seconds
        self.noise = noise  # of low precision: decoding's log-probabilities are not quite those of a prefill
        self.received: list[Received] = []
        self.injected: Counter[str] = Counter()
        self.flush_failures = 0  # so many of the next updates fail to flush, unless the server is paused by retract
        self._forced: deque[str] = deque()
        self._share, self._kinds, self._dice = 0.0, tuple(ALL), random.Random(0)
        self._runner: web.AppRunner | None = None

    # From outside: life and faults.

    def __enter__(self) -> Double:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-double", daemon=True)
        self._thread.start()
        try:
            self._wait(self._start())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._die())
        self._wait(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def weights(self) -> int:
        """The digest of the weights that it answers with now."""
        return self._scheduler.weights

    def kill(self) -> None:
        """As SIGKILL: open connections are reset, the port refuses."""
        self._wait(self._die())

    def restart(self) -> None:
        """On the same port with its start-up weights and version and an empty cache; kills it first if it lives."""
        self._wait(self._die())
        self._wait(self._start())

    def fault(self, kind: str, times: int = 1) -> None:
        """The next `times` calls of /generate suffer it; one that cannot (no log-probs to spoil) is answered well."""
        if kind not in ALL:
            raise ValueError(f"fault {kind!r} is none of {', '.join(ALL)}; for refused: kill() and restart()")
        self._forced.extend([kind] * times)

    def faults(self, share: float, kinds: Sequence[str] = ALL, seed: int = 0) -> None:
        """From now on each call of /generate suffers one of `kinds` with probability `share`."""
        self._share, self._kinds, self._dice = share, tuple(kinds), random.Random(seed)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    # Life, inside the loop.

    async def _start(self) -> None:
        self._scheduler = Scheduler(
            self.vocab_size, self.eos_ids, self.start_weights, self.start_version, self.max_running, self.max_queued,
            self.seconds_per_token, self.original_logprobs, self.deterministic, self.seed, self.noise,
        )  # fmt: skip
        self._mode = ""  # of the pause
        self._info = {"path": self.start_path, "version": self.start_version}
        self._active: dict[str, Job | None] = {}  # requests of clients who wait; None before they reach the scheduler
        self._readers, self._unpaused, self._open, self._idle = 0, asyncio.Event(), asyncio.Event(), asyncio.Event()
        for event in (self._unpaused, self._open, self._idle):
            event.set()
        app = web.Application(middlewares=[self._middleware], client_max_size=1 << 28)
        handlers: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
            path: getattr(self, f"_{path[1:].removeprefix('get_')}")
            for path in (*ORDINARY, *CONTROL, "/health", "/ready")
        }
        handlers["/health_generate"] = handlers["/health"]
        for path, handler in handlers.items():
            app.router.add_route("*", path, handler)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self._engine = asyncio.get_running_loop().create_task(self._scheduler.run())

    async def _die(self) -> None:
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        for connection in list(runner.server.connections if runner.server else ()):
            sglang_faults.reset(connection.transport)
        await runner.cleanup()
        self._engine.cancel()
        await asyncio.gather(self._engine, return_exceptions=True)

    async def _crash(self) -> None:
        """The end of the process, met in the middle of a request."""
        self._dying = asyncio.get_running_loop().create_task(self._die())
        await asyncio.Event().wait()

    # Requests.

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        raw = await request.read()
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = None
        self.received.append(Received(request.path, body, dict(request.headers)))
        needed = self.admin_key or self.api_key if request.path in CONTROL else self.api_key
        if needed and not request.path.startswith(OPEN) and request.headers.get("Authorization") != f"Bearer {needed}":
            return _json({"error": "Unauthorized"}, 401)
        try:
            if raw and body is None:
                raise invalid("1 validation error: JSON decode error")
            return await handler(request)
        except Refused as refused:
            return _json(refused.body, refused.status)
        except web.HTTPNotFound:
            return _json({"detail": "Not Found"}, 404)

    async def _health(self, request: web.Request) -> web.Response:
        if not self._unpaused.is_set():  # its one-token request waits as all others do
            await asyncio.sleep(self.health_timeout)
            return web.Response(status=503)
        return web.Response()

    async def _ready(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self._unpaused.is_set() else 503)

    async def _model_info(self, request: web.Request) -> web.Response:
        path, version = self._info["path"], self._info["version"]
        return _json(dict(
            model_path=path, served_model_name=path, tokenizer_path=self.start_path, is_generation=True,
            preferred_sampling_params=None, weight_version=version, load_format="auto", reasoning_parser=None,
            tool_call_parser=None, disaggregation_mode="null", has_image_understanding=False,
            has_audio_understanding=False, model_type="toy", architectures=["ToyForCausalLM"],
        ))  # fmt: skip

    async def _server_info(self, request: web.Request) -> web.Response:
        return _json(dict(
            model_path=self._info["path"], tokenizer_path=self.start_path, skip_tokenizer_init=True, load_format="auto",
            context_length=None, dtype="float32", max_running_requests=self.max_running,
            max_queued_requests=self.max_queued, max_total_tokens=1 << 20, stream_interval=self.stream_interval,
            incremental_streaming_output=self.incremental, enable_deterministic_inference=self.deterministic,
            enable_return_routed_experts=self.experts is not None, weight_version=self._info["version"], tp_size=1,
            dp_size=1, disable_radix_cache=False, version=self.version, internal_states=[{"last_gen_throughput": 0.0}],
        ))  # fmt: skip

    async def _abort_request(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if body.get("abort_all"):
            self._scheduler.abort(None)
        elif self._active.get(body.get("rid") or ""):  # an unknown id ends nothing, a known one all that begin with it
            self._scheduler.abort(body["rid"])
        return web.Response()

    async def _pause_generation(self, request: web.Request) -> web.Response:
        mode = (await _body(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise invalid("Input should be 'abort', 'retract' or 'in_place'")
        self._mode = mode
        self._unpaused.clear()
        if mode == "abort":
            self._scheduler.abort(None)
            await self._idle.wait()
        else:
            self._scheduler.pause(retract=mode == "retract")
        return _json({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue_generation(self, request: web.Request) -> web.Response:
        self._mode = ""
        self._scheduler.resume()
        self._unpaused.set()
        return _json({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush_cache(self, request: web.Request) -> web.Response:
        if self._scheduler.flush():
            return web.Response(text="Cache flushed.\nPlease check backend logs for more details. (When there are "
                                "running or waiting requests, the operation will not be performed.)\n")  # fmt: skip
        return web.Response(text="Flush cache failed.\n", status=400)

    async def _weights_checker(self, request: web.Request) -> web.Response:
        if not self.checker:
            raise web.HTTPNotFound
        action = (await _body(request)).get("action", "compare")
        if action != "checksum":
            return _json({"success": False, "message": f"Unsupported {action=}"}, 400)
        value = f"{self._scheduler.weights:08x}"
        rank = dict(role="target", tp_rank=0, tp_size=1, dp_rank=0, dp_size=1, pp_rank=0, pp_size=1, rank=0, size=1)
        ranks = [{"checksums": {"weights": value * 2}, "per_gpu_checksum": value * 8, "parallelism_info": [rank]}]
        return _json({"success": True, "message": "Success.", "ranks": ranks, "per_engine_checksum": value[::-1] * 8})

    async def _begin_weight_update(self, request: web.Request) -> web.Response:
        return _json({"success": True, "message": "Success"})

    _end_weight_update = _begin_weight_update

    async def _update_weights_from_disk(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if not isinstance(body.get("model_path"), str):
            raise invalid("Field required: model_path")
        if body.get("abort_all_requests"):
            self._scheduler.abort(None)
        waited = False
        if self._unpaused.is_set():  # unpaused it waits for all who are running, and lets nobody in
            self._open.clear()
            waited = not self._idle.is_set()
            await self._idle.wait()
        try:
            return await self._load(body, waited)
        finally:
            self._open.set()

    async def _load(self, body: Json, waited: bool) -> web.Response:
        try:
            weights = digest(body["model_path"])
        except FileNotFoundError as missing:
            message = f"Failed to get weights iterator: {missing}."
            return _json({"success": False, "message": message, "num_paused_requests": 0}, 400)
        except ValueError:
            await self._crash()  # a file that is cut short kills the real server
            raise
        self._scheduler.load(weights, body.get("weight_version"))
        # The scheduler lets go of a request a moment after its answer has left: an update that waited for it comes too
        # early to flush, and so does one in four that come right after an answer. It has failed then, though the
        # weights are the new ones and answers carry the new version.
        if self.flush_failures and self._mode != "retract":
            self.flush_failures, waited = self.flush_failures - 1, True
        if body.get("flush_cache", True) and (waited or not self._scheduler.flush()):
            return _json({"success": False, "message": NOT_FLUSHED, "num_paused_requests": 0}, 400)
        message, version = "Succeeded to update model weights.", body.get("weight_version")
        self._info["path"] = body["model_path"]
        if version is not None:
            self._info["version"] = version
            message += f" Weight version updated to {version}."
        return _json({"success": True, "message": message, "num_paused_requests": 0})

    # Generation.

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        kind = self._forced.popleft() if self._forced else ""
        if not kind and self._share and self._dice.random() < self._share:
            kind = self._dice.choice(self._kinds)
        if kind in sglang_faults.INSTEAD:
            self.injected[kind] += 1
            return await sglang_faults.instead(kind, request, await _body(request), self.start_version)
        if kind == "slow":
            self.injected[kind] += 1
            await asyncio.sleep(self.slow_seconds)
        body = await _body(request)
        stream, answered = bool(body.get("stream")), False
        try:
            jobs, news = self._jobs(body)
            many = len(jobs) > 1 or (jobs and isinstance(body["input_ids"][0], list))
            if any(not job.prompt or not 0 <= min(job.prompt) <= max(job.prompt) < self.vocab_size for job in jobs):
                await self._crash()
            async with self._running(jobs):
                if stream:
                    answered = True
                    events = self._events(jobs, news, body, many)
                    return await sglang_faults.send_events(request, events, kind, self.injected, self.start_version)
                while any(job.finish is None for job in jobs):
                    await news.get()
                for job in jobs:
                    if job.finish and job.finish.get("status_code") == 503:
                        error = {"object": "error", "message": job.finish["message"], "type": "503", "param": None}
                        raise Refused(503, error | {"code": 503})
                answers = [self._answer(job, body) for job in jobs]
                payload = answers if many else answers[0]
                return await sglang_faults.send(request, payload, kind, self.injected, self.start_version)
        except Refused as refused:
            error = refused.body.get("error")
            if answered or not stream or not isinstance(error, dict):
                raise
            error |= {"type": "invalid_request_error", "code": refused.status, "retryable": False}
            return await sglang_faults.send_events(request, _only({"error": error}), "", self.injected, "")

    @asynccontextmanager
    async def _running(self, jobs: list[Job]) -> AsyncIterator[None]:
        """The jobs run inside; a client who leaves takes them along."""
        for job in jobs:
            if job.rid in self._active:
                raise bad(f"Duplicate request ID detected: {job.rid}")
        self._active |= {job.rid: None for job in jobs}
        entered = False
        try:
            while not (self._unpaused.is_set() and self._open.is_set()):
                await self._unpaused.wait()
                await self._open.wait()
            entered, self._readers = True, self._readers + 1
            self._idle.clear()
            self._active |= {job.rid: job for job in jobs}
            for job in jobs:
                self._scheduler.submit(job)
            yield
        finally:
            for job in jobs:
                self._scheduler.drop(job)
                del self._active[job.rid]
            self._readers -= entered
            if not self._readers:
                self._idle.set()

    def _jobs(self, body: Json) -> tuple[list[Job], asyncio.Queue[Job]]:
        news: asyncio.Queue[Job] = asyncio.Queue()
        jobs = []
        for name, prompt, params in sglang_requests.asked(body, self.context_length, self.vocab_size):
            job = Job(name, prompt, params, news.put_nowait, str(body.get("extra_key") or ""))
            if (start := body.get("logprob_start_len", -1)) >= 0 and body.get("return_logprob"):
                job.cacheable = start
            job.script = (self.script(prompt) if self.script else None) or None
            jobs.append(job)
        return jobs, news

    async def _events(self, jobs: list[Job], news: asyncio.Queue[Job], body: Json, many: bool) -> AsyncIterator[Json]:
        sent = dict.fromkeys((job.rid for job in jobs), 0)
        left = len(jobs)
        while left:
            job = await news.get()
            left -= job.finish is not None
            interval = job.params["stream_interval"] or self.stream_interval
            if job.finish is None and 0 < sent[job.rid] > len(job.ids) - interval:
                continue  # the first token goes out at once
            answer = self._answer(job, body, sent[job.rid] if self.incremental else 0)
            sent[job.rid] = len(job.ids)
            yield answer | {"index": jobs.index(job)} if many else answer

    def _answer(self, job: Job, body: Json, start: int = 0) -> Json:
        """The answer so far, its ids and log-probs from `start` on."""
        ended, wants = job.finish is not None, bool(body.get("return_logprob"))
        now = {"response_sent_to_client_ts": time.time()}
        meta: Json = {"id": job.rid, "finish_reason": job.finish, "weight_version": self._info["version"]}
        if ended:
            meta |= {"weight_version": job.spans[-1]["version"], "weight_versions": [dict(span) for span in job.spans],
                     "e2e_latency": 0.001}  # fmt: skip
        if wants:
            triples = [[score, token, None] for score, token in zip(job.scores, job.ids, strict=True)]
            meta |= {"input_token_logprobs": [], "output_token_logprobs": triples[start:],
                     "output_token_logprobs_length": len(triples)}  # fmt: skip
            if (first := body.get("logprob_start_len", -1)) >= 0:
                scores = self._scheduler.scores_of(job.prompt, first)
                meta["input_token_logprobs"] = [
                    [score, token, None] for score, token in zip(scores, job.prompt[first:], strict=True)
                ]
        if not self.weight_versions:
            meta.pop("weight_versions", None)
        meta["completion_tokens"] = len(job.ids)
        if job.queued_abort:
            if wants and start:  # the real server's last event has all triples then, and of the ids the last one again
                meta["output_token_logprobs"] = triples
                return {"text": "", "output_ids": job.ids[-1:], "meta_info": meta | now}
            return {"text": "", "output_ids": job.ids, "meta_info": meta | now}
        cached = job.cached or 0
        meta |= dict(
            prompt_tokens=len(job.prompt), num_retractions=job.retractions, reasoning_tokens=0, cached_tokens=cached,
            cached_tokens_details={"device": cached, "host": 0} if cached else None, dp_rank=None,
        )  # fmt: skip
        if ended and self.experts and body.get("return_routed_experts"):
            ids = (job.prompt + job.ids)[body.get("routed_experts_start_len", 0) : -1]
            meta["routed_experts"] = encode_experts(routed_experts(self._scheduler.weights, ids, self.experts))
        return {"output_ids": job.ids[start:], "meta_info": meta | now}


async def _body(request: web.Request) -> Json:
    raw = await request.read()
    return (json.loads(raw) if raw else None) or {}


def _json(body: Any, status: int = 200) -> web.Response:
    return web.json_response(body, status=status)


async def _only(event: Json) -> AsyncIterator[Json]:
    yield event
