"""One SGLang server over HTTP: answers, and the control of its weights. Every failure comes out as a `Fault`.

Which server to ask, when to ask again and what an answer means is not known here.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import aiohttp

from m1jax.errors import ServerRefused
from m1jax.rl.servers.keys import ADMIN_KEY, API_KEY, Keys
from m1jax.rl.servers.protocol import Events, Fault, read_json, read_status

CALL_S = 30.0
"""Seconds for a call that only asks or tells."""


def open_session() -> aiohttp.ClientSession:
    """Connections for all servers of a run.

    SGLang closes a connection that was idle for 5 seconds; one that is let go before cannot be closed under a request.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0)
    return aiohttp.ClientSession(connector=connector, trust_env=False)


class Checksums(NamedTuple):
    """What a server's weights are, without the weights.

    Attributes:
        layout: how they are spread over ranks.
        sums: of each rank, hashes of all its parameters.
    """

    layout: str
    sums: tuple[str, ...]


class Server:
    """A server, and what the pool knows of it.

    Attributes:
        url: its base.
        in_flight: requests under way.
        out: why it is not asked; "" while it is.
        rest_until: time of the event loop before which it is not asked.
        label: of the weights that it was seen to have after an update of ours; "" before that.
        digest: `Published.digest` of the weights that it has; None where that is not known.
        deterministic: whether it makes the noise of a token from a seed.
        updates: held by whoever changes its weights.
        has_checker: whether it has /weights_checker; None before that is known.
        counts: bytes received, by all its answers.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, keys: Keys, counts: Counter[str]):
        self.url, self._session, self._keys, self.counts = url, session, keys, counts
        self.updates = asyncio.Lock()
        self.in_flight, self.out, self.rest_until, self.label = 0, "not looked at yet", 0.0, ""
        self.digest: int | None = None
        self.deterministic = False
        self.has_checker: bool | None = None

    async def whole(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
        """The answer to a /generate that does not stream, decoded. It may take any time: the caller sees to that."""
        timeout = aiohttp.ClientTimeout(total=None)
        with _faults(self.url, 0.0):
            async with self._post("/generate", body, timeout, False, headers) as response:
                raw = await response.read()
                self.counts["bytes"] += len(raw)
                self._read_status(response.status, raw)
        return read_json(raw)

    async def events(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> AsyncGenerator[Any, None]:
        """The events of a /generate that streams, decoded; leaving early closes the connection, which aborts it.

        They may take any time: the caller sees to that.
        """
        timeout = aiohttp.ClientTimeout(total=None)
        with _faults(self.url, 0.0):
            async with self._post("/generate", body, timeout, False, headers) as response:
                if response.status != 200:
                    self._read_status(response.status, await response.read())
                events = Events()
                async for chunk in response.content.iter_any():
                    self.counts["bytes"] += len(chunk)
                    for event in events.feed(chunk):
                        if event != b"[DONE]":
                            yield read_json(event)

    async def abort(self, rid: str) -> None:
        """End a request whose answer nobody waits for; that it may be over already is no matter."""
        try:
            await self.call("/abort_request", {"rid": rid})
        except Fault:
            self.counts["aborts_lost"] += 1

    async def call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = CALL_S) -> Any:
        """A control endpoint: POST with a body, GET without; decoded JSON, or None where the answer is no JSON.

        Raises:
            Fault: "refused" with the status and message where the server says no.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        with _faults(self.url, timeout_s):
            if body is None:
                request = self._session.get(self.url + path, timeout=timeout, headers=self._keys.headers(False))
            else:
                request = self._post(path, body, timeout, True, None)
            async with request as response:
                raw = await response.read()
                self._read_status(response.status, raw, path, control=body is not None)
        try:
            return json.loads(raw)
        except ValueError:
            return None

    async def info(self) -> dict[str, Any]:
        """/server_info and /model_info in one, by their old names too."""
        found: dict[str, Any] = {}
        for path in ("/server_info", "/model_info"):
            try:
                answer = await self.call(path)
            except Fault as fault:
                if fault.kind != "refused":
                    raise
                answer = await self._by_its_old_name(path)
            found |= answer if isinstance(answer, dict) else {}
        return found

    async def _by_its_old_name(self, path: str) -> Any:
        try:
            return await self.call(path.replace("/", "/get_"))
        except Fault as fault:
            if fault.kind != "refused":
                raise
            told = f"{self.url}{path}: {fault.detail}; is this the address of an SGLang server?"
            raise ServerRefused(told) from fault

    async def checksums(self) -> Checksums | None:
        """By /weights_checker; None without one."""
        if self.has_checker is False:
            return None
        try:
            answer = await self.call("/weights_checker", {"action": "checksum"}, timeout_s=300.0)
        except Fault as fault:
            if not fault.detail.startswith("status 404"):
                raise
            self.has_checker = False
            return None
        self.has_checker = True
        ranks = answer.get("ranks") or [] if isinstance(answer, dict) else []
        layout, sums = ([rank.get(key) for rank in ranks] for key in ("parallelism_info", "checksums"))
        return Checksums(json.dumps(layout, sort_keys=True), tuple(json.dumps(s, sort_keys=True) for s in sums))

    def _post(self, path, body, timeout, control, headers) -> Any:
        headers = self._keys.headers(control) | {"Content-Type": "application/json"} | (headers or {})
        return self._session.post(self.url + path, data=json.dumps(body), timeout=timeout, headers=headers)

    def _read_status(self, status: int, raw: bytes, path: str = "/generate", control: bool = False) -> None:
        if status in (401, 403):
            key = f"{ADMIN_KEY} (or {API_KEY}, where it has but one key)" if control else API_KEY
            raise ServerRefused(f"{self.url}{path}: the server refuses our key; set {key} to the server's")
        read_status(status, raw)


@contextmanager
def _faults(url: str, seconds: float) -> Iterator[None]:
    """The client library's errors as faults."""
    try:
        yield
    except TimeoutError as error:
        raise Fault("timeout", f"{url}: nothing for {seconds:.0f} s") from error
    except aiohttp.ClientPayloadError as error:
        raise Fault("cut", f"{url}: the answer stopped short") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Fault("unreachable", f"{url}: {type(error).__name__} {error}".strip()[:200]) from error
