"""What the double of an SGLang server computes: the language model, its weights' digest and the scheduler.

The model is a pure function of the weights' digest and the ids so far, so that a test can verify every token and every
log-probability that came back, also across a change of weights in the middle of an answer. The scheduler has the
states of the real one (waiting, running, paused in three ways), because what an abort, a flush or an update does hangs
on them. It knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np


@lru_cache(1 << 14)
def _logits(weights: int, last: tuple[int, ...], vocab_size: int) -> np.ndarray:
    return np.random.default_rng((weights, *last)).normal(scale=2.0, size=vocab_size)


def logprobs(weights: int, prefix: Sequence[int], vocab_size: int, temperature: float) -> np.ndarray:
    """Float64 [V]: log-probabilities of the token after `prefix`; it hangs on the last two ids alone.

    Greedy, which temperatures below 1e-6 are, has those of temperature 1, as the real server returns them.
    """
    temperature = 1.0 if temperature < 1e-6 else temperature
    logits = _logits(weights, tuple(int(token) for token in prefix[-2:]), vocab_size) / temperature
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def digest(folder: str | Path) -> int:
    """CRC of a folder's *.safetensors: what `logprobs` takes as weights.

    Raises FileNotFoundError where there are none and ValueError where one is cut short.
    """
    files, crc = sorted(Path(folder).glob("*.safetensors")), 0
    if not files:
        raise FileNotFoundError(f"Cannot find any model weights with `{folder}`.")
    for path in files:
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        if len(data) < max(end, 10):
            raise ValueError("Error while deserializing header: invalid header length")
        header = json.loads(data[8:end])
        tensors = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if len(data) != end + max(tensors, default=0):
            raise ValueError("Error while deserializing header: incomplete metadata, file not fully covered")
        crc = zlib.crc32(data, crc)
    return crc


def routed_experts(weights: int, ids: Sequence[int], experts: tuple[int, int, int]) -> np.ndarray:
    """Int32 [ids, layers, top_k]: the experts that `ids` go to; those of a token are distinct."""
    layers, top_k, num_experts = experts
    token, layer, choice = np.ix_(np.asarray(ids, np.int64), np.arange(layers), np.arange(top_k))
    return ((token + 3 * layer + weights % 97 + choice) % num_experts).astype(np.int32)


@dataclass(eq=False)
class Job:
    """One answer in the making. `news` is called whenever it has grown or ended."""

    rid: str
    prompt: list[int]
    params: dict[str, Any]
    news: Callable[[Job], None]
    extra_key: str = ""
    cacheable: int = (
        1 << 30
    )  # as many prompt tokens may come from the prefix cache (fewer where their scores are asked)
    script: list[tuple[int, float]] | None = None
    ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    cached: int | None = None  # None before the prefill
    retractions: int = 0
    aborted: bool = False  # ends after its next token
    finish: dict[str, Any] | None = None
    queued_abort: bool = False  # never reached, or no longer stood in, a batch: its answer has fewer fields


class Scheduler:
    """Requests to tokens: admits, decodes one token of every running request at a time, pauses, aborts, loads."""

    def __init__(self, vocab_size: int, eos_ids: Sequence[int], weights: int, version: str, max_running: int,
                 max_queued: int | None, seconds_per_token: float, original_logprobs: bool, deterministic: bool,
                 seed: int, noise: float = 0.0):  # fmt: skip
        self.vocab_size, self.eos_ids, self.weights, self.version = vocab_size, set(eos_ids), weights, version
        self.max_running, self.max_queued, self.seconds_per_token = max_running, max_queued, seconds_per_token
        self.original_logprobs, self.deterministic = original_logprobs, deterministic
        self.random, self.noise, self._dice = random.Random(seed), noise, random.Random(seed + 1)
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.paused = False
        self.cache: dict[str, dict] = {}  # by extra_key: a tree of ids
        self.wake = asyncio.Event()

    async def run(self) -> None:
        """Decodes until it is cancelled."""
        while True:
            if self.paused or not (self.waiting or self.running):
                self.wake.clear()
                await self.wake.wait()
                continue
            while self.waiting and len(self.running) < self.max_running:
                self.running.append(self.waiting.pop(0))
                self._prefill(self.running[-1])
            await asyncio.sleep(self.seconds_per_token)
            if not self.paused:
                for job in list(self.running):
                    self._step(job)

    def submit(self, job: Job) -> None:
        if self.max_queued is not None and len(self.waiting) >= self.max_queued:
            full = {"type": "abort", "status_code": 503, "message": "The request queue is full."}
            return self._end(job, full, queued=True)
        self.waiting.append(job)
        self.wake.set()

    def abort(self, rid: str | None) -> None:
        """Ends all whose id starts with `rid`, or all: the running ones after one more token, as the real one does."""
        for job in [job for job in self.waiting if rid is None or job.rid.startswith(rid)]:
            self.waiting.remove(job)
            self._end(job, {"type": "abort", "message": "Abort in waiting queue"}, queued=True)
        for job in self.running:
            job.aborted |= rid is None or job.rid.startswith(rid)

    def drop(self, job: Job) -> None:
        """The client has left."""
        for jobs in (self.waiting, self.running):
            if job in jobs:
                jobs.remove(job)

    def pause(self, retract: bool) -> None:
        self.paused = True
        if retract:
            for job in self.running:
                job.retractions += 1
            self.waiting[:0], self.running = self.running, []

    def resume(self) -> None:
        self.paused = False
        self.wake.set()

    def flush(self) -> bool:
        """Whether the prefix cache is empty now: it is kept while requests run, or wait without a pause."""
        if self.running or (self.waiting and not self.paused):
            return False
        self.cache.clear()
        return True

    def load(self, weights: int, version: str | None) -> None:
        self.weights, self.version = weights, version if version is not None else self.version

    def scores_of(self, ids: Sequence[int], start: int) -> list[float | None]:
        """Log-probabilities of a prompt's ids from `start` on at temperature 1; the first has none."""
        lines = [(logprobs(self.weights, ids[:at], self.vocab_size, 1.0) if at else None) for at in range(len(ids))]
        return [None if line is None or at == start else float(line[ids[at]]) for at, line in enumerate(lines)][start:]

    def _prefill(self, job: Job) -> None:
        if job.cached is None:
            node, length = self.cache.get(job.extra_key, {}), 0
            while length < min(len(job.prompt) - 1, job.cacheable) and job.prompt[length] in node:
                node, length = node[job.prompt[length]], length + 1
            job.cached = length
        self._remember(job, job.prompt)

    def _remember(self, job: Job, ids: Sequence[int]) -> None:
        node = self.cache.setdefault(job.extra_key, {})
        for token in ids:
            node = node.setdefault(token, {})

    def _step(self, job: Job) -> None:
        limit, script = job.params["max_new_tokens"], job.script
        if limit > 0:
            if script is not None:
                token, score = script[len(job.ids)] if script else (0, 0.0)
            else:
                token, score = self._sample(job)
            job.ids.append(token)
            job.scores.append(score)
        self._span(job)
        stops = self.eos_ids | set(job.params["stop_token_ids"] or ())
        if job.aborted:
            self._end(job, {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})
        elif len(job.ids) >= limit:
            self._end(job, {"type": "length", "length": limit})
        elif (job.ids[-1] in stops and not job.params["ignore_eos"]) or (script and len(job.ids) >= len(script)):
            self._end(job, {"type": "stop", "matched": job.ids[-1]})  # ignore_eos ignores stop_token_ids as well
        else:
            job.news(job)

    def _sample(self, job: Job) -> tuple[int, float]:
        greedy = job.params["temperature"] < 1e-6 or job.params["top_k"] == 1
        temperature = 1.0 if greedy else job.params["temperature"]
        scores = logprobs(self.weights, (job.prompt[-2:] + job.ids)[-2:], self.vocab_size, temperature)
        if greedy:
            token = int(scores.argmax())
        else:
            token = self._draw(scores, job)
        if self.original_logprobs:
            scores = logprobs(self.weights, (job.prompt[-2:] + job.ids)[-2:], self.vocab_size, 1.0)
        return token, min(float(np.float32(scores[token] + self._dice.gauss(0.0, self.noise))), 0.0)

    def _draw(self, scores: np.ndarray, job: Job) -> int:
        """A token of the few best; the log-probability that comes back is still that of the whole vocabulary."""
        top_k, top_p, seed, dice = job.params["top_k"], job.params["top_p"], job.params["sampling_seed"], self.random
        if self.deterministic and seed is not None:  # elsewhere the seed counts for nothing
            dice = random.Random(f"{seed} {len(job.ids)}")
        if top_k < 0 and top_p >= 1:
            order, mass = np.arange(len(scores)), np.cumsum(np.exp(scores))
        else:
            order = np.argsort(-scores)[: top_k if top_k > 0 else None]
            mass = np.cumsum(np.exp(scores[order]))
            mass = mass[: int(np.searchsorted(mass, top_p)) + 1]
        return int(order[min(np.searchsorted(mass, dice.random() * mass[-1], "right"), len(mass) - 1)])

    def _span(self, job: Job) -> None:
        if not job.spans or (job.spans[-1]["version"] != self.version and len(job.ids) > job.spans[-1]["end"]):
            job.spans.append({"version": self.version, "start": max(len(job.ids) - 1, 0), "end": len(job.ids)})
        job.spans[-1]["end"] = len(job.ids)

    def _end(self, job: Job, finish: dict[str, Any], queued: bool = False) -> None:
        self.drop(job)
        if not job.spans:
            job.spans.append({"version": self.version, "start": 0, "end": 0})
        if not queued:
            self._remember(job, job.prompt + job.ids[:-1])
        job.finish, job.queued_abort = finish, queued
        job.news(job)


def encode_experts(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
