"""A plain client of an SGLang server, real or double, for the claims of `tests/sglang_contract.py`.

It trusts nothing that it is there to check: it does not retry, and what breaks off is an exception of http.client.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    status: int
    type: str  # "" for plain words
    body: Any  # JSON; words; the events of a stream, [DONE] among them

    @property
    def meta(self) -> dict[str, Any]:
        return self.body["meta_info"]


@dataclass
class Subject:
    """A server under test, which was started with the weights of folder `a`; `b` has others of the same model."""

    url: str
    vocab_size: int
    a: Path
    b: Path
    key: str = ""
    admin_key: str = ""
    incremental: bool = False  # its streams' pieces are disjoint
    context_length: int = 32768
    timeout: float = 60.0

    def ask(self, path: str, body: Any = None, key: str | None = None) -> Answer:
        """POST, or GET without a body; `key` instead of the one that the path needs."""
        with self.connection(path, body, key) as response:
            raw, kind = response.read(), (response.getheader("Content-Type") or "").split(";")[0]
        if kind == "application/json":
            return Answer(response.status, kind, json.loads(raw))
        if kind == "text/event-stream":
            return Answer(response.status, kind, [_event(part) for part in raw.split(b"\n\n") if part.strip()])
        return Answer(response.status, "", raw.decode())

    def generate(self, prompt: Any = (5, 6, 7), tokens: int = 4, **more: Any) -> Answer:
        """An answer of `tokens` tokens that no eos ends; what is no field of the request is one of the sampling."""
        return self.ask("/generate", request(prompt, tokens, **more))

    def begin(self, rid: str, tokens: int = 120, **more: Any) -> Running:
        """A request in a thread, its first token here."""
        running = Running(self, request((5, 6, 7), tokens, rid=rid, **more))
        running.first.wait(self.timeout)
        return running

    def version(self) -> str:
        return self.ask("/model_info").body["weight_version"]

    def checksum(self) -> str:
        return self.ask("/weights_checker", {"action": "checksum"}).body["per_engine_checksum"]

    def update(self, folder: Path, version: str | None = None, **more: Any) -> Answer:
        named = {} if version is None else {"weight_version": version}
        return self.ask("/update_weights_from_disk", {"model_path": str(folder), **named, **more})

    def load(self, folder: Path, version: str | None = None) -> Answer:
        """An update that succeeds: one that comes right after an answer, unless retracted, may fail to flush."""
        with self.paused("retract"):
            answer = self.update(folder, version)
        assert answer.status == 200 and answer.body["success"] is True
        return answer

    def flush(self) -> None:
        until(lambda: self.ask("/flush_cache", {}).status == 200)

    @contextmanager
    def paused(self, mode: str) -> Iterator[Answer]:
        try:
            yield self.ask("/pause_generation", {"mode": mode})
        finally:
            self.ask("/continue_generation", {})

    @contextmanager
    def connection(self, path: str, body: Any, key: str | None) -> Iterator[http.client.HTTPResponse]:
        control = path.split("?")[0] not in ("/generate", "/model_info", "/server_info")
        key = (self.admin_key if control else self.key) if key is None else key
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=self.timeout)
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        try:
            connection.request("GET" if raw is None else "POST", path, raw, headers)
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()


class Running:
    """A streamed request that a thread reads; `answer` is what a call without a stream would have returned."""

    def __init__(self, subject: Subject, body: dict[str, Any]):
        self.first, self._subject, self._body, self._events = threading.Event(), subject, body | {"stream": True}, []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def answer(self) -> Answer:
        """Raises IndexError where no event came."""
        self.join(self._subject.timeout)
        events = [event for event in self._events if event != "[DONE]"]
        last = events[-1]
        if len(last["meta_info"]["output_token_logprobs"]) > len(last["output_ids"]):
            # Aborted in the waiting queue after a retraction: all triples at once, and of the ids the last one.
            assert last["output_ids"] == [last["meta_info"]["output_token_logprobs"][-1][1]]
            last["output_ids"] = [token for _, token, _ in last["meta_info"]["output_token_logprobs"]]
        elif self._subject.incremental:
            last["output_ids"] = [token for event in events for token in event["output_ids"]]
            triples = [triple for event in events for triple in event["meta_info"]["output_token_logprobs"]]
            last["meta_info"]["output_token_logprobs"] = triples
        return Answer(200, "application/json", last)

    def _read(self) -> None:
        # What breaks off shows in the answer, and in nothing that a thread would print.
        broken = suppress(OSError, http.client.HTTPException)
        with broken, self._subject.connection("/generate", self._body, None) as response:
            for line in response:
                if line.strip():
                    self._events.append(_event(line))
                    self.first.set()
        self.first.set()


def _event(raw: bytes) -> Any:
    text = raw.decode().strip().removeprefix("data: ")
    return text if text == "[DONE]" else json.loads(text)


def request(prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
    prompt = [list(one) for one in prompt] if isinstance(prompt[0], list | tuple) else list(prompt)
    fields = {"rid", "return_logprob", "logprob_start_len", "stream", "extra_key"}
    top = {"return_logprob": True} | {name: value for name, value in more.items() if name in fields}
    sampling = {name: value for name, value in more.items() if name not in fields}
    return top | {"input_ids": prompt, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True} | sampling}


def whole(answer: Answer, tokens: int | None = None) -> None:
    """The ids are those of the triples, every count is theirs, the versions' spans cover them."""
    body, meta = answer.body, answer.meta
    triples, spans = meta["output_token_logprobs"], meta["weight_versions"]
    assert answer.status == 200
    assert body["output_ids"] == [token for _, token, _ in triples]
    assert len(triples) == meta["completion_tokens"] == meta["output_token_logprobs_length"]
    assert tokens is None or len(triples) == tokens
    assert all(score <= 0 for score, _, _ in triples)
    assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
    assert spans[-1]["end"] == len(triples)
    assert spans[-1]["version"] == meta["weight_version"]


def until(condition: Callable[[], bool], tries: int = 300) -> None:
    for _ in range(tries):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")
