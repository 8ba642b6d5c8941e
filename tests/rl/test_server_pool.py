"""Servers that hang, change, leave or lie, a gateway before them, and a run that has to stop meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time

import pytest

from m1jax.errors import Stopped, UserError
from m1jax.rl.engine_sglang import Response
from m1jax.rl.servers.keys import keys_from_environment
from m1jax.rl.servers.protocol import Events, Fault
from m1jax.rl.servers.server import Checksums
from m1jax.rl.servers.weights import Published, update
from m1jax.types import Sampling
from tests.rl.test_engine_sglang import check, double, engine, params, prompts, served
from tests.sglang_double import digest

__all__ = ["params"]


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_many_requests_that_are_stuck_at_once_are_given_up_once(tmp_path, params):
    """Not one after another, each with more time than the one before."""
    options = dict(repetition_stop="segments", stall_s=0.3, slowest_tokens_per_s=400.0, patience_s=10.0)
    with double() as a, double(seed=1) as b, engine(tmp_path, a, b, **options) as made:
        made.set_weights(params[0], 0)
        b.fault("stuck", 40)
        groups = made.generate(prompts(20), 4, Sampling(40), 0)
        check(groups, prompts(20), 4, served(made))
        metrics = made.take_metrics()
        assert b.injected["stuck"] >= 20 and metrics["engine/fault_timeout"] >= b.injected["stuck"]
        assert made._doubt >= 0.75**6  # by the rounds of requests, not by the requests


def test_a_server_that_is_silent_and_not_healthy_is_not_waited_for(tmp_path, params, monkeypatch):
    """However long its answer might take by what is known of its speed."""
    options = dict(repetition_stop="segments", stall_s=0.3, slowest_tokens_per_s=0.001, patience_s=60.0)
    with double() as a, engine(tmp_path, a, **options) as made:
        made.set_weights(params[0], 0)
        a.fault("stuck", 8)
        call, looks = made.pool.servers[0].call, []

        async def sick(path, *args, **options):
            if path == "/health":
                looks.append(path)
                if len(looks) < 12:
                    raise Fault("busy", "status 503: ")
            return await call(path, *args, **options)

        monkeypatch.setattr(made.pool.servers[0], "call", sick)
        check(made.generate(prompts(4), 2, Sampling(40), 0), prompts(4), 2, served(made))
        metrics = made.take_metrics()
        assert metrics["engine/fault_timeout"] == 8 and metrics["engine/servers_back"] >= 1


def test_a_place_that_was_dealt_before_weights_change_is_not_taken_while_they_do(tmp_path, params):
    with double() as a, engine(tmp_path, a, in_flight=1) as made:
        made.set_weights(params[0], 0)
        pool, found = made.pool, []

        async def ask() -> None:
            async with pool.server(0) as server:
                found.append((pool.updating, server.label == pool.current.label))

        async def both() -> None:
            async with pool.server(1):
                waits = asyncio.create_task(ask())
                await asyncio.sleep(0)
                newer = dataclasses.replace(pool.current, label="00000001-aaaaaaaa")
                changes = asyncio.create_task(pool.publish(newer))
            # Its place is dealt here, and the update begins before it wakes.
            await asyncio.gather(waits, changes)

        made._run(both()).result(20)
        assert found == [(False, True)] and pool.servers[0].in_flight == 0


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.05])
def test_low_precision_hides_no_convention(tmp_path, params, noise):
    for seed in range(4 if noise else 1):
        with (
            double(original_logprobs=True, noise=noise, seed=seed) as a,
            engine(tmp_path / "a", a, temperature=0.7) as made,
            pytest.raises(UserError, match="returns log-probabilities at temperature 1"),
        ):
            made.set_weights(params[0], 0)
        with double(noise=noise, seed=seed) as a, engine(tmp_path / "b", a, temperature=0.7) as made:
            made.set_weights(params[0], 0)


@pytest.mark.parametrize("noticed_by", ["a request", "an update"])
def test_a_server_that_was_started_anew_is_tried_out_anew(tmp_path, params, noticed_by):
    said: list[str] = []
    with double() as a, double() as b, engine(tmp_path, a, b, temperature=0.7, log=said.append) as made:
        made.set_weights(params[0], 0)
        b.kill()
        b.original_logprobs = True  # a variable of its environment, which no flag shows
        b.restart()
        if noticed_by == "an update":
            made.set_weights(params[1], 1)
        groups = made.generate(prompts(8), 2, Sampling(40, temperature=0.7), 0)
        check(groups, prompts(8), 2, served(made, int(noticed_by == "an update")), temperature=0.7)
        until(lambda: any("returns log-probabilities at temperature 1" in line for line in said))
        assert made.take_metrics()["engine/restarts"] == 1 and made.pool.serving == [made.pool.servers[0]]


def slow(server, monkeypatch, seconds: float) -> threading.Event:
    """Let a double take its time over weights; set when it begins."""
    begun, load = threading.Event(), server._load

    async def late(body, waited):
        begun.set()
        await asyncio.sleep(seconds)
        return await load(body, waited)

    monkeypatch.setattr(server, "_load", late)
    return begun


def test_a_run_that_has_to_stop_does_not_wait_for_slow_servers_nor_leaves_them_paused(tmp_path, params, monkeypatch):
    stop = threading.Event()
    with double() as a, engine(tmp_path, a) as made:
        made.set_weights(params[0], 0)
        begun, made.stopped = slow(a, monkeypatch, 600.0), stop.is_set
        threading.Thread(target=lambda: begun.wait(30) and stop.set()).start()
        with pytest.raises(Stopped):
            made.set_weights(params[1], 1)
        made.close()
        assert begun.is_set() and a._unpaused.is_set() and a.received[-1].path == "/continue_generation"


def test_updates_that_take_long_are_told_by_name(tmp_path, params, monkeypatch):
    from m1jax.rl.servers import pool

    monkeypatch.setattr(pool, "WAITING_S", 1.0)
    said: list[str] = []
    with double() as a, double() as b, engine(tmp_path, a, b, log=said.append) as made:
        made.set_weights(params[0], 0)
        slow(b, monkeypatch, 4.0)
        made.set_weights(params[1], 1)
        told = [line for line in said if "weights have been changing for" in line]
        assert told[-1].endswith(f" s: {b.url} not done yet")


def test_newer_weights_wake_whoever_looks_at_a_server(tmp_path, params, monkeypatch):
    """One that did not take some may take the next ones; its turn to be looked at is minutes away."""
    from m1jax.rl.servers import pool

    for name in ("FIRST_S", "LOOK_S"):
        monkeypatch.setattr(pool, name, 120.0)
    with double() as a, double() as b, engine(tmp_path, a, b) as made:
        made.set_weights(params[0], 0)
        load, fails = b._load, True

        async def sometimes(body, waited):
            return await load(body if not fails else body | {"model_path": "/none"}, waited)

        monkeypatch.setattr(b, "_load", sometimes)
        made.set_weights(params[1], 1)
        until(lambda: made.pool.counts["updates_failed"] == 1 and len(made.pool.reading) == 0)
        time.sleep(0.5)  # the first look has failed too
        fails = False
        made.set_weights(params[2], 2)
        until(lambda: len(made.pool.serving) == 2, 60.0)


def behind(gateway, made) -> None:
    """Give a double that stands for a gateway the weights of the servers behind it."""
    label = made.pool.current.label
    gateway._scheduler.load(digest(made.pool.current.folder), label)
    gateway._info["version"] = label


@pytest.mark.parametrize("fault", ["gone", "other weights"])
def test_without_their_gateway_servers_are_asked_directly(tmp_path, params, monkeypatch, fault):
    from m1jax.rl.servers import pool

    monkeypatch.setattr(pool, "PAST_S", 600.0)
    said: list[str] = []
    with (
        double() as a,
        double() as b,
        double() as gateway,
        engine(tmp_path, a, b, gateway=gateway.url, log=said.append) as made,
    ):
        made.set_weights(params[0], 0)
        if fault == "gone":
            gateway.kill()
        groups = made.generate(prompts(8), 2, Sampling(20), 0)
        check(groups, prompts(8), 2, served(made), max_tokens=20)
        metrics = made.take_metrics()
        assert metrics["engine/servers"] == 2 and metrics["engine/servers_out"] == 0
        until_ = "600 s have passed" if fault == "gone" else "the next update"
        assert len([x for x in said if f"servers are asked directly until {until_}" in x]) == 1
        if fault == "gone":  # and when it is back it is asked again
            gateway.restart()
            made.pool._past_front = 0.0
        else:
            made.set_weights(params[0], 0)
        behind(gateway, made)
        before = len(gateway.received)
        check(made.generate(prompts(4), 2, Sampling(20), 0), prompts(4), 2, served(made), max_tokens=20)
        assert sum(r.path == "/generate" for r in gateway.received[before:]) >= 8


def test_a_gateway_of_deterministic_servers_is_told_the_noise(tmp_path, params):
    with (
        double(deterministic=True) as a,
        double(deterministic=True) as gateway,
        engine(tmp_path, a, gateway=gateway.url) as made,
    ):
        made.set_weights(params[0], 0)
        behind(gateway, made)
        made.generate(prompts(2), 2, Sampling(5), 0)
        asked = [r.body["sampling_params"] for r in gateway.received if r.path == "/generate"]
        assert len({sampling["sampling_seed"] for sampling in asked}) == 4


@pytest.mark.parametrize(
    ("before", "after", "digests", "message"),
    [
        (("1", "1"), ("2", "2"), (5, 6), None),
        (("1", "1"), ("2", "1"), (5, 6), "its checksums are the same on rank 1"),
        (("1", "1"), ("1", "1"), (5, 5), None),
        (("1", "1"), ("1", "2"), (5, 5), "its checksums are others"),
        ((), (), (5, 6), "its checksums are of no rank"),
    ],
)
def test_an_update_has_to_land_on_every_rank(tmp_path, before, after, digests, message):
    class Stub:
        url, label, in_flight = "http://s", "", 0
        digest: int | None = digests[0]
        sums = [Checksums("tp", before), Checksums("tp", after)]

        async def checksums(self):
            return self.sums.pop(0)

        async def call(self, path, *args, **options):
            return {"success": True}

        async def info(self):
            return {"weight_version": "new"}

    server, published = Stub(), Published(1, "new", tmp_path, digests[1], 0, 0.0)
    if message:
        with pytest.raises(Fault, match=message):
            asyncio.run(update(server, published, "", "retract", 1.0))
    else:
        asyncio.run(update(server, published, "", "retract", 1.0))
        assert (server.label, server.digest) == ("new", digests[1])


def test_events_are_whole_however_they_come():
    sent = b"".join(b"data: " + bytes([65 + i]) * i + b"\r\n\n"[1:] * 2 for i in range(1, 30)) + b"data: [DONE]\n\n"
    wanted = [bytes([65 + i]) * i for i in range(1, 30)] + [b"[DONE]"]
    for size in (1, 2, 3, 7, 64, len(sent)):
        events = Events()
        found = [e for at in range(0, len(sent), size) for e in events.feed(sent[at : at + size])]
        assert found == wanted, size


def test_keys_are_taken_as_they_are_meant_or_refused_by_name(monkeypatch):
    monkeypatch.setenv("SGLANG_API_KEY", "secret\n")
    monkeypatch.delenv("SGLANG_ADMIN_KEY", raising=False)
    assert keys_from_environment().headers(True) == {"Authorization": "Bearer secret"}
    monkeypatch.setenv("SGLANG_ADMIN_KEY", "two words")
    with pytest.raises(UserError, match="SGLANG_ADMIN_KEY: has a space") as caught:
        keys_from_environment()
    assert "words" not in str(caught.value)


def test_a_stream_that_runs_out_of_time_as_weights_change_disturbs_no_update(tmp_path, params):
    """Its time is up and cannot be given back; the update goes on."""
    with double() as a, engine(tmp_path, a) as made:
        made.set_weights(params[0], 0)

        async def late() -> bool:
            try:
                async with asyncio.timeout(0) as limit:
                    made._limits.add(limit)
                    try:
                        await asyncio.sleep(60)
                    finally:  # between its end and its TimeoutError
                        await made._take_up(made.pool.current)
                        made._limits.discard(limit)
            except TimeoutError:
                return True
            return False

        assert made._run(late()).result(20)


def test_the_first_event_of_a_broken_stream_is_doubtful_too(tmp_path, params):
    """Asked for under some weights and begun under others: nobody tells any more of which its tokens are."""
    with double() as a, engine(tmp_path, a) as made:
        for version in (0, 1):
            made.set_weights(params[version], version)
        newer = made.pool.current
        made.pool.current = dataclasses.replace(newer, label="00000000-aaaaaaaa", version=0)

        class Server:
            url, deterministic = a.url, False

            async def events(self, body, headers):
                for count, label in ((1, newer.label), (2, newer.label)):
                    triples = [[-1.0, 5, None]]
                    meta = {"finish_reason": None, "output_token_logprobs": triples, "completion_tokens": count}
                    yield {"output_ids": [5], "meta_info": meta | {"weight_version": label}}
                raise Fault("cut", "for a test")

        response = Response(Sampling(40), frozenset({1}))

        async def asked():
            await made._continue(Server(), prompts(1)[0], response, 0)

        with pytest.raises(Fault, match="for a test"):
            made._run(asked()).result(20)
        assert response.token_ids == [] and response.ending is None


def test_weights_that_take_long_to_read_are_waited_for_at_the_start(tmp_path, params, monkeypatch):
    """`patience_s` is for servers that are gone; reading has a bound of its own."""
    with double() as a, engine(tmp_path, a, patience_s=0.5) as made:
        slow(a, monkeypatch, 2.0)
        made.set_weights(params[0], 0)
        check(made.generate(prompts(2), 2, Sampling(20), 0), prompts(2), 2, served(made), max_tokens=20)


def test_tokens_of_weights_that_they_should_not_be_of_are_taken_back(tmp_path, params):
    """The last event of a stream says so of the first token, when all but the last ones are there already."""
    with double(script=lambda ids: [(5, -1.0)] * (43 - len(ids))) as a, engine(tmp_path, a, stream_interval=4) as made:
        made.set_weights(params[0], 0)
        a.fault("old_span")
        before = len(a.received)
        [[response]] = made.generate(prompts(1), 1, Sampling(40), 0)
        asked = [len(r.body["input_ids"]) for r in a.received[before:] if r.path == "/generate"]
        assert asked == [3, 3] and len(response.token_ids) == 40
