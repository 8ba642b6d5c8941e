"""The servers of a run: which one is asked next, which one is out, and how it comes back.

A server is asked while it answers and is known to have the current weights. A failed connection, a missed deadline or
an answer from other weights puts it out at once, and a task of its own looks at it until it is back: it has to be
healthy, to have the current weights (a server that was restarted has those that it was started with, and is given ours)
and to say so. Nothing is asked of it before that, and of no server while weights change.

Requests go to the least loaded server, those of one prompt to the same one, whose prefix cache has the prompt.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import aiohttp

from m1jax.errors import EngineLost, ServerRefused
from m1jax.rl.servers.keys import Keys
from m1jax.rl.servers.probes import probe_flags, probe_logprobs, probe_vocabulary
from m1jax.rl.servers.protocol import BUSY, CHECK, Fault
from m1jax.rl.servers.server import Checksums, Server
from m1jax.rl.servers.settings import ServersConfig
from m1jax.rl.servers.weights import Published, update, wake

WAITING_S = 20.0
"""Seconds without a server after which the run says so, and says so again."""
PAST_S = 30.0
"""Seconds that servers are asked directly after their gateway failed."""
FIRST_S, LOOK_S, LOADED_S = 0.25, 5.0, 300.0
"""Seconds between two looks at a server that is out: at first, at the most, and at one that takes no weights."""
HEALTH_S = 30.0
"""Seconds that a look at a server's health takes at the most; SGLang itself gives up after 20."""


class Pool:
    """Servers, and the weights that they should have. Lives in one event loop.

    Args:
        needs: what the run wants of a server, see `m1jax.rl.servers.probes`.
        log: takes a line when a server serves for the first time, does not take its weights, or is waited for.
        counts: failures and restarts, for the metrics.
    """

    def __init__(
        self,
        config: ServersConfig,
        session: aiohttp.ClientSession,
        keys: Keys,
        needs,
        log: Callable[[str], None],
        counts: Counter[str],
    ):
        self.config, self.needs, self.log, self.counts = config, needs, log, counts
        self.servers = [Server(url, session, keys, counts) for url in config.urls]
        self.front = Server(config.gateway, session, keys, counts) if config.gateway else None
        self.current: Published | None = None
        self._sums: dict[str, tuple[str, ...]] = {}  # of the current weights, by how a server is spread over ranks
        self._sticky: dict[int, Server] = {}
        self._waiting: deque[tuple[int, asyncio.Future[Server]]] = deque()
        self._closed = self._started = False
        self._closed_at = self._updates_s = 0.0
        self._behind: set[Server] = set()  # those that are being given the current weights, of those that served
        self._past_front = 0.0  # time of the event loop before which the gateway is not asked
        self._news = asyncio.Event()  # there are newer weights than when it was made
        self._lookers: dict[Server, asyncio.Task[None]] = {}
        self._probed: set[str] = set()
        self._reading: dict[Server, Path] = {}
        self.broken: Exception | None = None

    @property
    def serving(self) -> list[Server]:
        """The servers that may be asked."""
        return [server for server in self.servers if not server.out]

    @property
    def updating(self) -> bool:
        """Whether weights are changing, and nothing is asked."""
        return self._closed

    @property
    def loading(self) -> bool:
        """Whether all that can be waited for are servers that read weights, which `update_s` bounds."""
        return self._closed or (not self.serving and bool(self._reading))

    @property
    def reading(self) -> list[Path]:
        """Folders of weights that servers are reading; a slow one may be some versions behind."""
        return list(self._reading.values())

    @property
    def current_version(self) -> int:
        """Version of the weights that servers should have; -1 before there are any."""
        return self.current.version if self.current is not None else -1

    def causes(self) -> str:
        """Why each server is out, or how much it has under way, in one line."""
        return "; ".join(f"{s.url} {s.out or f'serves, {s.in_flight} requests under way'}" for s in self.servers)

    @asynccontextmanager
    async def server(self, group: int) -> AsyncIterator[Server]:
        """A server to ask something of prompt `group`, once there is one with room.

        Raises:
            EngineLost: there was none for `patience_s`.
            ServerRefused: a server turned out to be set up wrongly.
        """
        server = await self._place(group)
        while self._closed:  # weights began to change when it had been dealt and was not taken yet
            self._leave(server)
            server = await self._place(group)
        try:
            yield server
        finally:
            self._leave(server)

    async def _place(self, group: int) -> Server:
        """A place at a server, which has to be left again."""
        place: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        self._waiting.append((group, place))
        self._deal()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._leave(place.result())
            raise

    def note(self, server: Server, fault: Fault) -> None:
        """Draw the conclusions of a failed request."""
        self.counts[fault.kind] += 1
        now = asyncio.get_running_loop().time()
        if server is self.front:
            # Of other weights: it has a server behind it that it will not leave out, and we cannot tell which. Anything
            # else is its own failure or that of a server, which then fails when it is asked itself.
            stale = fault.kind == "version" and self._past_front < math.inf
            if stale or (fault.kind in CHECK and now >= self._past_front):
                until = "the next update" if stale else f"{PAST_S:.0f} s have passed"
                self.log(f"warning: {server.url}: {fault.detail}; servers are asked directly until {until}")
                self._past_front = math.inf if stale else now + PAST_S
        elif fault.kind in CHECK:
            self.put_out(server, fault)
        if fault.kind in BUSY:
            server.rest_until = now + random.uniform(0.1, 1.0)

    def put_out(self, server: Server, fault: Fault) -> None:
        """Ask nothing more of a server until it has been looked at."""
        if server.out:
            return
        server.out = fault.detail.removeprefix(f"{server.url}: ")
        self.counts["servers_out"] += 1
        if server not in self._lookers or self._lookers[server].done():
            self._lookers[server] = asyncio.create_task(self._bring_back(server, fault.kind))
        self._deal()

    async def publish(self, published: Published) -> None:
        """Make all servers use these weights; those that cannot are out. While it lasts nothing is asked.

        Raises:
            EngineLost: none could, nor came back within `patience_s`.
        """
        self._closed_at = asyncio.get_running_loop().time()
        self._closed, before = True, self.current
        self._past_front = 0.0 if self._past_front == math.inf else self._past_front
        self.current, self._sums = published, {}
        news, self._news = self._news, asyncio.Event()
        serving = self.serving if before is not None else []
        try:
            sums = await asyncio.gather(*(self._update(server, self.config.update_mode) for server in serving))
            self._compare(dict(zip(serving, sums, strict=True)))
        finally:
            self._updates_s += asyncio.get_running_loop().time() - self._closed_at
            self._closed = False
            self._deal()
        news.set()
        for server in self.servers:
            if server.out and (server not in self._lookers or self._lookers[server].done()):
                self._lookers[server] = asyncio.create_task(self._bring_back(server, "new"))
        await self._some()
        if before is None:  # at a start all are wanted, yet not for ever
            await self._all_or_a_moment()
        self._started = True

    @property
    def lookers(self) -> list[asyncio.Task[None]]:
        """The tasks that look at servers."""
        return list(self._lookers.values())

    def close(self) -> None:
        """Tell them to end."""
        for task in self.lookers:
            task.cancel()

    def clock(self) -> float:
        """Seconds since whenever, in which the time of updates does not count."""
        now = asyncio.get_running_loop().time()
        return (self._closed_at if self._closed else now) - self._updates_s

    def forget(self, group: int) -> None:
        """All of prompt `group` is answered."""
        self._sticky.pop(group, None)

    def _leave(self, server: Server) -> None:
        server.in_flight -= 1
        self._deal()

    def _deal(self) -> None:
        """Give places to those who wait, first come, first served, as long as there are any."""
        while self._waiting and self.broken is None:
            group, place = self._waiting[0]
            if not place.done():
                server = self._choose(group)
                if server is None:
                    return
                server.in_flight += 1
                place.set_result(server)
            self._waiting.popleft()

    def _choose(self, group: int) -> Server | None:
        """The server for a request of prompt `group`; None while none has room."""
        now = asyncio.get_running_loop().time()
        ready = [] if self._closed else [s for s in self.serving if s.rest_until <= now]
        if self.front is not None and now >= self._past_front:
            free = self.front.rest_until <= now and self.front.in_flight < self.config.in_flight * len(ready)
            return self.front if free else None
        ready = [s for s in ready if s.in_flight < self.config.in_flight]
        if not ready:
            return None
        least = min(ready, key=lambda s: s.in_flight)
        favourite = self._sticky.get(group, least)
        # Its cache is worth a queue that is a little longer, not one that is much longer.
        if favourite not in ready or favourite.in_flight > 2 * least.in_flight + 8:
            favourite = least
        self._sticky[group] = favourite
        return favourite

    async def watch(self) -> None:
        """See to it, for as long as the pool lives, that nobody waits for ever."""
        loop = asyncio.get_running_loop()
        alive, told, updates_told = loop.time(), 0.0, 0.0
        while True:
            await asyncio.sleep(0.1)
            self._deal()  # servers that were left alone may be asked again
            if self._closed and loop.time() - self._closed_at > updates_told + WAITING_S:
                updates_told = loop.time() - self._closed_at
                slow = ", ".join(server.url for server in self.servers if server in self._behind)
                self.log(f"weights have been changing for {updates_told:.0f} s: {slow} not done yet")
            elif not self._closed:
                updates_told = 0.0
            if self.serving or self.loading or self.current is None:
                alive, told = loop.time(), 0.0
            elif loop.time() - alive > told + WAITING_S:
                told = loop.time() - alive
                left = self.config.patience_s - told
                self.log(f"waiting for a rollout server, for {left:.0f} s more: {self.causes()}")
            if self.broken is None and loop.time() - alive > self.config.patience_s:
                self.broken = EngineLost(f"no rollout server for {self.config.patience_s:.0f} s: {self.causes()}")
            if self.broken is not None:
                while self._waiting:
                    _, place = self._waiting.popleft()
                    if not place.done():
                        place.set_exception(self.broken)

    async def _some(self) -> None:
        """Wait until a server has the current weights."""
        while not self.serving:
            if self.broken is not None:
                raise self.broken
            await asyncio.sleep(0.02)

    async def _all_or_a_moment(self, seconds: float = 60.0) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(seconds, self.config.patience_s)
        while len(self.serving) < len(self.servers) and loop.time() < deadline:
            if self.broken is not None:
                raise self.broken
            await asyncio.sleep(0.1)
        for server in self.servers:
            if server.out:
                self.log(f"warning: goes on without {server.url}: {server.out}")

    async def _update(self, server: Server, mode: str) -> Checksums | None:
        """Update one server, and its checksums then; where that fails it is out."""
        self._behind.add(server)
        try:
            found = (await server.info()).get("weight_version")
            if found != server.label:
                # It was started anew: it is looked at, and tried out, as one that comes back.
                self.put_out(server, Fault("version", f"{server.url}: has weights {found!r}, not {server.label!r}"))
                return None
            return await self._give_weights(server, mode, self.front)
        except Fault as fault:
            server.digest = server.digest if fault.kind == "version" else None  # it may have taken all the same
            self._failed(server, fault)
            return None
        except ServerRefused as error:
            if not self._started:
                raise
            self._failed(server, Fault("refused", str(error)))  # it was started anew, and wrongly
            return None
        finally:
            self._behind.discard(server)

    def _failed(self, server: Server, fault: Fault) -> None:
        self.counts["updates_failed"] += 1
        if not server.out:
            self.log(f"warning: {server.url} is out, its update failed: {fault.detail}")
        self.put_out(server, fault)

    def _compare(self, sums: Mapping[Server, Checksums | None]) -> None:
        """Put out the servers whose checksums are not those of most; of two, the second."""
        for layout in {s.layout for s in sums.values() if s is not None}:
            found = {server: s.sums for server, s in sums.items() if s is not None and s.layout == layout}
            votes = Counter(found.values())  # in the order of the servers, which decides a tie
            self._sums[layout] = votes.most_common(1)[0][0]
            for server, hashes in found.items():
                if hashes != self._sums[layout]:
                    self._disagrees(server)

    def _disagrees(self, server: Server) -> Fault:
        """Put a server out for its checksums; the fault that says so."""
        server.label, server.digest = "", None
        fault = Fault("version", f"{server.url}: its checksums are not those of the other servers")
        self._failed(server, fault)
        return fault

    async def _give_weights(self, server: Server, mode: str, front: Server | None = None) -> Checksums | None:
        """Make a server use the current weights; what the gateway `front` has under way may be its."""
        async with server.updates:
            published = self.current
            assert published is not None
            there = str(published.folder.absolute())
            if self.config.weights_folder_there:
                here = Path(self.config.weights_folder) if self.config.weights_folder else published.folder.parent
                there = f"{self.config.weights_folder_there.rstrip('/')}/{published.folder.relative_to(here)}"
            inspect = partial(probe_flags, server.url, needs=self.needs)
            self._reading[server] = published.folder
            asked = [server] if front is None else [server, front]
            try:
                return await update(server, published, there, mode, self.config.update_s, inspect, asked)
            finally:
                del self._reading[server]

    async def _bring_back(self, server: Server, kind: str) -> None:
        """Look at a server until it may be asked again.

        A "new" one may have been left paused by a run that was killed, and is not healthy then: that is not asked.
        """
        try:
            wait_s, longest_s, news = 0.0, LOOK_S, self._news
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), wait_s)
                wait_s, news = min(max(2 * wait_s, FIRST_S), longest_s) * random.uniform(0.8, 1.2), self._news
                if self.current is None:
                    continue
                try:
                    if kind in ("timeout", "error") or (kind != "new" and wait_s > 0.5):
                        async with server.updates:
                            await wake(server)  # in a pause nothing is healthy
                        await server.call("/health", timeout_s=HEALTH_S)
                    if await self._has_current(server):
                        break
                except Fault as fault:
                    server.out = fault.detail.removeprefix(f"{server.url}: ")
                    # One that is there and does not take the weights reads all of them every time.
                    longest_s = LOADED_S if fault.kind in ("version", "refused") else LOOK_S
            server.out = ""
            self.counts["servers_back"] += 1
            if server.url not in self._probed:
                self._probed.add(server.url)
                self.log(f"{server.url}: serves {self.current.label}")
            self._deal()
        except Exception as error:  # a ServerRefused, or a bug of ours: whoever waits for the server gets it
            if isinstance(error, ServerRefused) and self._started and self.serving:
                server.out = str(error)  # one that was started anew, and wrongly: the others go on
                self.log(f"warning: goes on without {error}")
                return
            self.broken = error
            self._deal()

    async def _has_current(self, server: Server) -> bool:
        """Whether a server has the current weights by now; it is given them where it has not."""
        wanted = self.current
        assert wanted is not None
        info = await server.info()
        probe_flags(server.url, info, self.needs)
        server.deterministic = bool(info.get("enable_deterministic_inference"))
        if self.front is not None:
            self.front.deterministic = all(each.deterministic for each in self.servers)
        found = info.get("weight_version")
        if not found == server.label == wanted.label:
            if server.label and found not in (server.label, wanted.label):
                server.digest = None  # it was restarted, and may be set up in another way
                self._probed.discard(server.url)
                self.counts["restarts"] += 1
                self.log(f"{server.url}: came back with weights {found!r}; it is given {wanted.label}")
            async with server.updates:
                await wake(server)  # it may have been left in a pause, in which nothing is answered
            await probe_vocabulary(server, self.needs)
            sums = await self._give_weights(server, "abort")
            if sums is not None and wanted is self.current and self._sums.setdefault(*sums) != sums.sums:
                raise self._disagrees(server)
        else:
            await wake(server)
        if server.url not in self._probed:
            try:
                await probe_logprobs(server, self.needs, self.log)
            except Fault as fault:
                if fault.kind == "refused":
                    raise ServerRefused(f"{server.url}: {fault.detail}") from fault
                raise
        return wanted is self.current
