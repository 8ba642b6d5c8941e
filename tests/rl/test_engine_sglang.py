"""The engine over SGLang servers: what it believes of them, and that no failure of theirs loses, doubles or spoils one.

The servers are doubles (`tests/sglang_double.py`) whose tokens and log-probabilities can be verified one by one against
the weights that they claim to be of.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from m1jax.config import build
from m1jax.errors import EngineLost, UserError
from m1jax.model import transformer
from m1jax.model.config import ModelConfig
from m1jax.rl.engine_sglang import Response, SGLangEngine
from m1jax.rl.servers.keys import Keys
from m1jax.rl.servers.protocol import Fault
from m1jax.rl.servers.settings import ServersConfig
from m1jax.rl.servers.weights import KEPT
from m1jax.types import Problem, Prompt, Sampling
from m1jax.weights.hf_folder import HFFolder
from tests import runs
from tests.sglang_double import ALL, Double, digest, logprobs

STOP = 1
MODEL = build(ModelConfig, runs.MODEL | dict(vocab_size=64))
FAULTS_OF = {
    "reset_before": "unreachable", "reset_after": "cut", "status_400": "refused", "status_429": "busy",
    "status_503": "busy", "abort_503": "busy", "stuck": "timeout", "half_event": "cut", "truncated_json": "cut",
    "nan_logprob": "logprobs", "null_logprob": "logprobs", "missing_logprobs": "logprobs", "wrong_length": "lengths",
    "beyond_vocabulary": "vocabulary", "id_mismatch": "ids", "rid_mismatch": "identity", "duplicate": "duplicate",
    "old_version": "version", "old_span": "version", "no_finish": "cut", "abort_before_prefill": "aborted",
}  # fmt: skip
"""What the engine calls each fault that a double can be told to have; an answer that is slow is none to it."""


@pytest.fixture(scope="module")
def params():
    init = jax.jit(transformer.init, static_argnums=1)
    return [jax.tree.map(np.asarray, init(jax.random.key(seed), MODEL)) for seed in range(3)]


@contextmanager
def engine(folder, *doubles, keys=None, log=None, stop_ids=(STOP,), temperature=1.0, experts=False, **config):
    config = dict(urls=tuple(d.url for d in doubles), patience_s=20.0, stall_s=3.0, stream_interval=4) | config
    made = SGLangEngine(
        ServersConfig(**config), dataclasses.replace(MODEL, num_experts=4) if experts else MODEL, stop_ids=stop_ids,
        temperature=temperature, positions=4096, weights=folder, keys=keys or Keys(),
        log=log or (lambda line: None), record_experts=experts,
    )  # fmt: skip
    try:
        yield made
    finally:
        made.close()


def double(**options) -> Double:
    return Double(**dict(vocab_size=64, eos_ids=(STOP,)) | options)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, Problem("t", f"q{i}", "a"), (2, 3 + i % 7, 5 + i % 50)) for i in range(count)]


def check(groups, asked, responses, digests, temperature=1.0, max_tokens=40):
    """Every prompt has its responses once and in order, and every token is one of the weights that it names."""
    assert len(groups) == len(asked)
    for prompt, group in zip(asked, groups, strict=True):
        assert [(r.prompt_index, r.sample) for r in group] == [(prompt.index, i) for i in range(responses)]
        for r in group:
            assert 1 <= len(r.token_ids) == len(r.rollout_logprobs) <= max_tokens
            versions = r.weight_versions if r.weight_versions is not None else [r.weight_version] * len(r.token_ids)
            assert len(versions) == len(r.token_ids) and r.weight_version == min(versions)
            assert (r.ending == "stop") == (int(r.token_ids[-1]) == STOP) and STOP not in r.token_ids[:-1]
            assert r.ending != "length" or len(r.token_ids) == max_tokens
            ids = list(prompt.token_ids)
            for token, logprob, version in zip(r.token_ids, r.rollout_logprobs, versions, strict=True):
                expected = logprobs(digests[int(version)], ids, 64, temperature)[token]
                assert logprob == pytest.approx(expected, abs=1e-6)  # float32 of a float64
                ids.append(int(token))


def served(made: SGLangEngine, version: int = 0) -> dict[int, int]:
    """{version: digest} of the weights that the servers were given last."""
    assert made.pool.current is not None
    return {version: digest(made.pool.current.folder)}


@pytest.mark.parametrize("repetition_stop", ["stream", "segments"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rollouts_are_what_the_servers_sampled(tmp_path, params, repetition_stop, temperature):
    with (
        double() as a,
        double() as b,
        engine(tmp_path, a, b, repetition_stop=repetition_stop, temperature=temperature) as made,
    ):
        made.set_weights(params[0], 0)
        sampling = Sampling(40, temperature=temperature)
        groups = made.generate(prompts(12), 4, sampling, 0)
        check(groups, prompts(12), 4, served(made), temperature)
        assert {r.ending for g in groups for r in g} == {"stop", "length"}
        metrics = made.take_metrics()
        assert metrics["engine/requests"] == 48 and metrics["engine/faults"] == 0 and metrics["engine/servers"] == 2
        assert metrics["sync/bytes"] > 40_000 and metrics["sync/seconds"] >= metrics["sync/write_seconds"] > 0
        for each in (a, b):  # both are asked, those of one prompt the same one
            bodies = [r.body for r in each.received if r.path == "/generate" and r.body["rid"]]
            assert all(len(body["rid"]) == 32 for body in bodies)
        shares = [
            {
                tuple(r.body["input_ids"][:3])
                for r in each.received
                if r.path == "/generate" and len(r.body["input_ids"]) == 3
            }
            for each in (a, b)
        ]
        assert len(shares[0]) == len(shares[1]) == 6 and not shares[0] & shares[1]
    assert "rollout servers" not in [thread.name for thread in threading.enumerate()]


def test_the_noise_is_new_in_every_call_and_greedy_has_none(tmp_path, params):
    with double() as a, engine(tmp_path, a) as made:
        made.set_weights(params[0], 0)
        once, again = (made.generate(prompts(4), 2, Sampling(20), 0) for _ in range(2))
        assert any(
            r.token_ids.tolist() != s.token_ids.tolist()
            for g, h in zip(once, again, strict=True)
            for r, s in zip(g, h, strict=True)
        )
        greedy = made.generate(prompts(4), 2, Sampling(20, temperature=0.0), 0)
        check(greedy, prompts(4), 2, served(made), max_tokens=20)
        assert all(g[0].token_ids.tolist() == g[1].token_ids.tolist() for g in greedy)


@pytest.mark.parametrize("kind", [kind for kind in ALL])
@pytest.mark.parametrize("repetition_stop", ["stream", "segments"])
def test_no_fault_loses_doubles_or_spoils_a_response(tmp_path, params, kind, repetition_stop):
    """One of each kind, alone; the metrics call it by its name."""
    # Nothing has been seen yet of how quick the servers are: the deadline is that of the speed given.
    options = dict(repetition_stop=repetition_stop, slowest_tokens_per_s=400.0)
    with double() as a, engine(tmp_path, a, **options) as made:
        made.set_weights(params[0], 0)
        made.take_metrics()
        a.fault(kind)
        groups = made.generate(prompts(3), 2, Sampling(40), 0)
        check(groups, prompts(3), 2, served(made))
        assert a.injected == {kind: 1}
        metrics = made.take_metrics()
        if kind == "slow":
            assert metrics["engine/faults"] == 0
        else:
            # A stream that is cut by a reset and an answer that is look different.
            names = {FAULTS_OF[kind]} | ({"unreachable", "cut"} if FAULTS_OF[kind] in ("unreachable", "cut") else set())
            found = {k.removeprefix("engine/fault_") for k in metrics if k.startswith("engine/fault_")}
            assert metrics["engine/faults"] == 1 and found <= names and len(found) == 1
        assert metrics["engine/restarts"] == 0


@pytest.mark.parametrize("repetition_stop", ["stream", "segments"])
def test_500_rollouts_with_a_tenth_of_the_requests_failing(tmp_path, params, repetition_stop):
    options = dict(repetition_stop=repetition_stop, slowest_tokens_per_s=200.0, in_flight=64)
    with double() as a, double(seed=1) as b, engine(tmp_path, a, b, **options) as made:
        made.set_weights(params[0], 0)
        for seed, each in enumerate((a, b)):
            each.faults(share=0.1, seed=seed)
            for kind in ALL[seed::2]:  # each kind at least once
                each.fault(kind)
        groups = made.generate(prompts(125), 4, Sampling(40), 0)
        check(groups, prompts(125), 4, served(made))
        injected = a.injected + b.injected
        # One that cannot happen to the request that it was meant for, a stream without a last event, say, does not.
        assert len(set(injected)) >= len(ALL) - 2 and sum(injected.values()) >= 50
        metrics = made.take_metrics()
        # A machine that is busy may make more answers late than were told to be.
        late = metrics["engine/fault_timeout"]
        assert late >= injected["stuck"]
        assert metrics["engine/faults"] - late == sum(injected.values()) - injected["slow"] - injected["stuck"]
        rids = [r.body["rid"] for d in (a, b) for r in d.received if r.path == "/generate"]
        assert len(set(rids)) == len(rids) and {len(rid) for rid in rids} == {32}


def test_a_server_that_dies_in_a_batch_comes_back_with_the_current_weights(tmp_path, params):
    said: list[str] = []
    with double(seconds_per_token=0.01) as a, engine(tmp_path, a, log=said.append) as made:
        made.set_weights(params[0], 0)
        made.set_weights(params[1], 1)
        futures = made.submit(prompts(8), 2, Sampling(60), 0)
        time.sleep(0.2)  # in the middle of the answers
        a.kill()
        time.sleep(0.3)
        a.restart()  # with its own weights, under their own name
        groups = [future.result(60) for future in futures]
        check(groups, prompts(8), 2, served(made, 1), max_tokens=60)
        metrics = made.take_metrics()
        assert metrics["engine/restarts"] == 1 and metrics["engine/servers_out"] >= 1 == metrics["engine/servers"]
        assert metrics.get("engine/fault_unreachable", 0) + metrics.get("engine/fault_cut", 0) >= 1
        assert metrics["engine/continued"] >= 1  # what a stream had brought was kept
    assert any("came back with weights 'default'; it is given 00000001-" in line for line in said)


def test_the_others_go_on_when_one_dies(tmp_path, params):
    with double(seconds_per_token=0.005) as a, double(seconds_per_token=0.005) as b, engine(tmp_path, a, b) as made:
        made.set_weights(params[0], 0)
        futures = made.submit(prompts(8), 2, Sampling(40), 0)
        time.sleep(0.1)
        a.kill()
        check([f.result(60) for f in futures], prompts(8), 2, served(made))
        made.set_weights(params[1], 1)  # the dead one is no part of it
        check(made.generate(prompts(4), 2, Sampling(40), 0), prompts(4), 2, served(made, 1))
        assert made.take_metrics()["engine/servers"] == 1
        a.restart()
        made.set_weights(params[2], 2)
        deadline = time.monotonic() + 20
        while len(made.pool.serving) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert {s.label for s in made.pool.servers} == {made.pool.current.label} and len(made.pool.serving) == 2
        check(made.generate(prompts(8), 2, Sampling(40), 0), prompts(8), 2, served(made, 2))


@pytest.mark.parametrize("repetition_stop", ["stream", "segments"])
def test_when_all_are_gone_it_ends_and_names_the_cause(tmp_path, params, repetition_stop):
    with double() as a, engine(tmp_path, a, patience_s=0.5, repetition_stop=repetition_stop) as made:
        made.set_weights(params[0], 0)
        a.kill()
        with pytest.raises(
            EngineLost, match=rf"no rollout server for 0 s: {a.url} ClientConnectorError Cannot connect"
        ):
            made.generate(prompts(4), 2, Sampling(40), 0)


def test_servers_that_are_there_and_give_nothing_end_it_too(tmp_path, params):
    with double() as a, engine(tmp_path, a, patience_s=1.0, stall_s=30.0) as made:
        made.set_weights(params[0], 0)
        a.fault("stuck", 100)
        with pytest.raises(
            EngineLost, match="no token from any rollout server for 1 s: .* serves, 4 requests under way"
        ):
            made.generate(prompts(2), 2, Sampling(40), 0)


def test_what_is_refused_again_and_again_is_the_users_to_mend(tmp_path, params):
    with double() as a, engine(tmp_path, a, attempts=3) as made:
        made.set_weights(params[0], 0)
        a.fault("status_400", 100)
        with pytest.raises(UserError, match="prompt [01]: 3 failures in a row, the last: status 400: injected"):
            made.generate(prompts(2), 2, Sampling(40), 0)


def test_no_id_beyond_the_vocabulary_is_sent(tmp_path, params):
    """One ends the process of the real server."""
    with double() as a, engine(tmp_path, a) as made:
        made.set_weights(params[0], 0)
        odd = Prompt(3, Problem("t", "q", "a"), (2, 64))
        with pytest.raises(UserError, match="prompt 3 of task t has the id 64, the model has 64"):
            made.generate([odd], 2, Sampling(4), 0)


@pytest.mark.parametrize("mode", ["retract", "abort", "in_place"])
def test_answers_under_way_continue_over_an_update_and_say_so(tmp_path, params, mode):
    with (
        double(seconds_per_token=0.01) as a,
        double(seconds_per_token=0.01) as b,
        engine(tmp_path, a, b, update_mode=mode) as made,
    ):
        digests = {}
        made.set_weights(params[0], 0)
        digests |= served(made, 0)
        futures = made.submit(prompts(8), 2, Sampling(60), 0)
        for version in (1, 2):
            time.sleep(0.15)
            made.set_weights(params[version], version)
            digests |= served(made, version)
        groups = [future.result(60) for future in futures]
        check(groups, prompts(8), 2, digests, max_tokens=60)
        several = [r for g in groups for r in g if r.weight_versions is not None]
        assert len(several) >= 4 and any(set(r.weight_versions.tolist()) == {0, 1, 2} for r in several)
        assert all((np.diff(r.weight_versions) >= 0).all() for r in several)
        pauses = [r.body["mode"] for r in a.received if r.path == "/pause_generation"]
        assert pauses[-1] == mode
        # Prefixes of one version are not shared with another.
        for d in (a, b):
            label, paused = "", False
            for r in d.received:
                if r.path == "/update_weights_from_disk":
                    label = r.body["weight_version"]
                    assert r.body["flush_cache"] is (mode != "in_place") or r.body["weight_version"][:8] == "00000000"
                elif r.path in ("/pause_generation", "/continue_generation"):
                    paused = r.path == "/pause_generation"
                elif r.path == "/generate" and "extra_key" in r.body:
                    assert r.body["extra_key"] == label and not paused  # nothing is asked while weights change


def test_an_update_that_fails_puts_that_server_out_and_says_so(tmp_path, params, monkeypatch):
    said: list[str] = []
    with double() as a, double() as b, engine(tmp_path, a, b, log=said.append) as made:
        made.set_weights(params[0], 0)

        async def broken(body, waited):
            from tests.sglang_double import _json

            return _json({"success": False, "message": "no such file", "num_paused_requests": 0}, 400)

        monkeypatch.setattr(b, "_load", broken)
        made.set_weights(params[1], 1)
        assert any(f"{b.url} is out, its update failed: status 400: no such file" in line for line in said)
        groups = made.generate(prompts(8), 2, Sampling(40), 0)
        check(groups, prompts(8), 2, served(made, 1))
        metrics = made.take_metrics()
        assert metrics["engine/updates_failed"] >= 1 and metrics["engine/servers"] == 1


@pytest.mark.parametrize("lie", ["label", "checksum", "unchanged"])
def test_an_update_is_not_believed_for_its_answer_alone(tmp_path, params, monkeypatch, lie):
    with double() as a, double() as b, engine(tmp_path, a, b) as made:
        made.set_weights(params[0], 0)
        load = b._load

        async def half(body, waited):
            before = b._scheduler.weights
            answer = await load(body | ({"weight_version": None} if lie == "label" else {}), waited)
            if lie != "label":
                b._scheduler.weights = before if lie == "unchanged" else before + 1
            return answer

        monkeypatch.setattr(b, "_load", half)
        made.set_weights(params[1], 1)
        assert [s.url for s in made.pool.serving] == [a.url]
        expected = {
            "label": "says '00000000-",
            "checksum": "its checksums are not those of the other",
            "unchanged": "its checksums are",
        }
        assert expected[lie] in made.pool.servers[1].out
        check(made.generate(prompts(4), 2, Sampling(40), 0), prompts(4), 2, served(made, 1))


def test_weights_on_disk_are_whole_named_and_few(tmp_path, params):
    """What is there can be served or trained on; another's folders in the same place are left alone."""
    (tmp_path / "mine").mkdir()
    (tmp_path / ".00000009-aaaaaaaa.writing").mkdir()
    with double() as a, engine(tmp_path, a, weights_dtype="bfloat16") as made:
        for version in range(5):
            made.set_weights(params[version % 3], version)
        names = sorted(f.name for f in tmp_path.iterdir())
        assert [n[:8] for n in names if n != "mine"] == ["00000002", "00000003", "00000004"] and len(names) == KEPT + 1
        folder = HFFolder(tmp_path / names[2], "bfloat16")
        stored = folder.read("model.embed_tokens.weight")
        np.testing.assert_array_equal(stored, params[1]["embedding"].astype(stored.dtype))
        assert {folder.read(n).dtype.name for n in ("lm_head.weight", "model.norm.weight")} == {"float32"}
        assert not list(tmp_path.glob(".*"))


def test_weights_that_a_slow_server_reads_stay_until_it_has_them(tmp_path, params, monkeypatch):
    with double() as a, double() as b, engine(tmp_path, a, b) as made:
        made.set_weights(params[0], 0)
        load, reading, enough = b._load, threading.Event(), threading.Event()
        there: list[bool] = []

        async def slow(body, waited):
            reading.set()
            while not enough.is_set():
                await asyncio.sleep(0.01)
            there.append(Path(body["model_path"]).is_dir())
            return await load(body, waited)

        made._loop.call_soon_threadsafe(made.pool.put_out, made.pool.servers[1], Fault("cut", "for a test"))
        monkeypatch.setattr(b, "_load", slow)
        made.pool.servers[1].label = ""  # as after a restart: it has to be given the current ones
        assert reading.wait(20)
        for version in range(1, 6):
            made.set_weights(params[version % 3], version)
        enough.set()
        deadline = time.monotonic() + 20
        while len(made.pool.serving) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert there[0] and len(made.pool.serving) == 2 and made.pool.reading == []
        made.set_weights(params[0], 6)
        assert sorted(f.name[:8] for f in tmp_path.iterdir()) == ["00000004", "00000005", "00000006"]


SPIKE = 3


def scripted(likely: list[bool]):
    """A stream of ids with probability above 0.99 where `likely` says so, whatever was asked before."""

    def script(ids):
        done = len(ids) - 3
        return [(7 + i % 5, -1e-4 if above else -2.0) for i, above in enumerate(likely)][done:] if ids[0] == 2 else []

    return script


def test_the_server_can_be_asked_to_stop_repetition_itself(tmp_path, params):
    """By name, with what it needs to know; a server that goes on all the same is cut at the same token."""
    sampling = Sampling(400, temperature=0.7, repetition_run=30)
    with (
        double(script=scripted([False] * 7 + [True] * 300), context_length=1000) as a,
        engine(tmp_path, a, repetition_stop="processor") as made,
        pytest.raises(UserError, match="needs --enable-custom-logit-processor and --disable-overlap-schedule"),
    ):
        made.set_weights(params[0], 0)
    with (
        double(script=scripted([False] * 7 + [True] * 300), context_length=1000) as a,
        engine(tmp_path, a, repetition_stop="processor") as made,
    ):
        made.pool.needs = dataclasses.replace(made.pool.needs, repetition_stop="segments")  # the double has no flags
        made.set_weights(params[0], 0)
        [[response]] = made.generate(prompts(1), 1, sampling, 0)
        assert (len(response.token_ids), response.ending) == (37, "repetition")
        body = a.received[-1].body
        assert body["sampling_params"]["custom_params"] == {
            "repetition_run": 30, "repetition_probability": 0.99, "temperature": 0.7, "stop_id": STOP, "run": 0,
        }  # fmt: skip
        named = bytes.fromhex(json.loads(body["custom_logit_processor"])["callable"])
        assert named == b"cm1jax.serving.repetition\nRepetitionStop\n."  # pickled by reference: no code


@pytest.mark.parametrize("repetition_stop", ["stream", "segments"])
@pytest.mark.parametrize(
    ("likely", "length", "ending"),
    [
        ([True] * 3200, 3000, "repetition"),
        ([False] * 7 + [True] * 3200, 3007, "repetition"),
        ([True] * 2999 + [False] + [True] * 900, 3900, "length"),
        ([True] * 2999 + [False] + [True] * 3100, 6000, "repetition"),
    ],
)
def test_3000_likely_tokens_in_a_row_end_a_response_at_exactly_that_token(
    tmp_path, params, repetition_stop, likely, length, ending
):
    sampling = Sampling(3900 if ending == "length" else 8000, repetition_run=3000)
    with (
        double(script=scripted(likely), context_length=10_000) as a,
        engine(tmp_path, a, repetition_stop=repetition_stop, stream_interval=64) as made,
    ):
        made.set_weights(params[0], 0)
        [[response, _]] = made.generate(prompts(1), 2, sampling, 0)
        assert (len(response.token_ids), response.ending) == (length, ending)
        assert response.token_ids.tolist() == [7 + i % 5 for i in range(length)]
        aborted = [r for r in a.received if r.path == "/abort_request"]
        assert len(aborted) == (2 if repetition_stop == "stream" and ending == "repetition" else 0)


@pytest.mark.parametrize("repetition_stop", ["stream", "segments"])
def test_what_is_sent_and_received_is_linear_in_the_length(tmp_path, params, repetition_stop):
    """Four times as long an answer takes at most five times the bytes, up and down."""
    volumes = []
    for length in (4_000, 16_000):
        likely = [i % 100 > 0 for i in range(length)]
        with (
            double(script=scripted(likely), context_length=40_000) as a,
            engine(tmp_path, a, repetition_stop=repetition_stop, segment_tokens=500, stream_interval=64) as made,
        ):
            made.set_weights(params[0], 0)
            made.take_metrics()
            sent = len(a.received)
            made.generate(prompts(1), 1, Sampling(length, repetition_run=3000), 0)
            up = sum(8 * len(r.body["input_ids"]) for r in a.received[sent:] if r.path == "/generate")
            volumes.append((made.take_metrics()["engine/bytes"], up))
    assert volumes[1][0] < 5 * volumes[0][0] and volumes[1][1] <= 5 * max(volumes[0][1], 1000)


def test_a_response_ends_by_the_rules_of_the_local_engine():
    """A stop token counts before the run, the run before the window; nothing after the end is kept."""
    sampling = Sampling(5, repetition_run=3)
    for token_ids, ending, length in (
        ([4, 4, 4, 4], "repetition", 3),
        ([4, 4, STOP, 4], "stop", 3),
        ([4, 4], None, 2),
    ):
        response = Response(sampling, frozenset({STOP}))
        response.take(token_ids, [-1e-3] * len(token_ids), [0] * len(token_ids))
        assert (response.ending, len(response.token_ids)) == (ending, length)
    response.take([4] * 9, [-1.0] * 9, [1] * 9)
    assert response.ending == "length" and response.versions == [0, 0, 1, 1, 1]


def test_experts_come_with_the_tokens_that_they_served(tmp_path, params):
    with double(experts=(2, 2, 4)) as a, engine(tmp_path, a, experts=True) as made:
        made.model = dataclasses.replace(MODEL, num_experts=4)
        made.pool.needs = dataclasses.replace(made.pool.needs, experts=True)
        publishes(made, params[0])
        [[r]] = made.generate(prompts(1), 1, Sampling(20), 0)
        assert r.expert_ids.dtype == np.int8 and r.expert_ids.shape == (3 + len(r.token_ids), 2, 2)
        assert (r.expert_ids[-1] == -1).all() and (r.expert_ids[:-1] >= 0).all()
        ids = [*prompts(1)[0].token_ids, *r.token_ids.tolist()][:-1]
        from tests.sglang_double import routed_experts

        np.testing.assert_array_equal(r.expert_ids[:-1], routed_experts(a.weights, ids, (2, 2, 4)))


@pytest.mark.parametrize("repetition_stop", ["stream", "segments"])
@pytest.mark.parametrize("kind", ["reset_after", "no_finish", "half_event", "abort_before_prefill"])
def test_experts_outlast_a_failure(tmp_path, params, repetition_stop, kind):
    """What a broken answer did not tell, the next one does; or nobody, and then it says so."""
    from tests.sglang_double import routed_experts

    with (
        double(experts=(2, 2, 4), seed=2) as a,
        engine(tmp_path, a, experts=True, repetition_stop=repetition_stop) as made,
    ):
        publishes(made, params[0])
        a.fault(kind, 2)
        for [r] in made.generate(prompts(3), 1, Sampling(20), 0):
            ids = [*prompts(3)[r.prompt_index].token_ids, *r.token_ids.tolist()][:-1]
            told = routed_experts(a.weights, ids, (2, 2, 4))
            known = r.expert_ids[:-1] >= 0
            assert r.expert_ids.shape == (3 + len(r.token_ids), 2, 2)
            np.testing.assert_array_equal(r.expert_ids[:-1][known], told[known])
            assert known.all() or (not known.any() and kind == "no_finish" and repetition_stop == "stream")


def test_experts_of_tokens_sampled_before_an_update_are_not_those_after_it(tmp_path, params):
    from tests.sglang_double import routed_experts

    with double(experts=(2, 2, 4), seconds_per_token=0.01) as a, engine(tmp_path, a, experts=True) as made:
        publishes(made, params[0])
        futures = made.submit(prompts(4), 1, Sampling(60), 0)
        time.sleep(0.2)
        publishes(made, params[1], 1)
        rollouts = [r for f in futures for r in f.result(30)]
        several = [r for r in rollouts if r.weight_versions is not None]
        assert several
        for r in several:
            old = int((r.weight_versions == 0).sum())
            assert (r.expert_ids[: 3 + old - 1] == -1).all()  # the prompt's too: its first token is of the old weights
            ids = [*prompts(4)[r.prompt_index].token_ids, *r.token_ids.tolist()][:-1]
            told = routed_experts(a.weights, ids, (2, 2, 4))
            np.testing.assert_array_equal(r.expert_ids[3 + old - 1 : -1], told[3 + old - 1 :])


def publishes(made, params, version=0):
    """The double takes any safetensors for weights; the tensors are those of the two experts that `MODEL` has."""
    model, made.model = made.model, MODEL
    made.set_weights(params, version)
    made.model = model


@pytest.mark.parametrize(
    ("server", "run", "message"),
    [
        (
            dict(original_logprobs=True),
            dict(temperature=0.7),
            "at temperature 0.25 it returns log-probabilities at temperature 1, which at config.sampling",
        ),
        (dict(incremental=False), {}, "streams all earlier tokens again with every event"),
        (dict(weight_versions=False), {}, "does not tell which weights each token is of"),
        (dict(api_key="secret"), {}, "/server_info: the server refuses our key; set SGLANG_API_KEY to"),
        (dict(), dict(experts=True), "--enable-return-routed-experts"),
        (dict(vocab_size=63), {}, r"a model of fewer ids than the 64 of .* trains \(status 400: logit_bias must has"),
        (dict(vocab_size=65), {}, "a model of more ids than the 64 of the one that trains; start it with an export"),
    ],
)
def test_a_server_that_would_bias_the_ratio_is_refused_with_the_reason(tmp_path, params, server, run, message):
    with double(**server) as a, engine(tmp_path, a, **run) as made, pytest.raises(UserError, match=message):
        publishes(made, params[0])


@pytest.mark.parametrize(
    ("server", "run"),
    [
        (dict(original_logprobs=True), {}),  # at temperature 1 both conventions agree
        (dict(incremental=False), dict(repetition_stop="segments")),
        (dict(weight_versions=False), dict(update_mode="abort")),
        (dict(checker=False), {}),
    ],
)
def test_and_not_where_nothing_hangs_on_it(tmp_path, params, server, run):
    with double(**server) as a, engine(tmp_path, a, **run) as made:
        made.set_weights(params[0], 0)
        made.set_weights(params[1], 1)
        check(made.generate(prompts(4), 2, Sampling(40), 0), prompts(4), 2, served(made, 1))


def test_keys_go_where_they_belong_and_nowhere_else(tmp_path, params, monkeypatch, capfd):
    monkeypatch.setenv("SGLANG_API_KEY", "ordinary-secret")
    monkeypatch.setenv("SGLANG_ADMIN_KEY", "admin-secret")
    from m1jax.rl.servers.keys import keys_from_environment

    keys, said = keys_from_environment(), []
    with (
        double(api_key="ordinary-secret", admin_key="admin-secret") as a,
        engine(tmp_path, a, keys=keys, log=said.append) as made,
    ):
        made.set_weights(params[0], 0)
        made.generate(prompts(2), 2, Sampling(8), 0)
        for received in a.received:
            control = received.path not in ("/generate", "/model_info", "/server_info")
            secret = "admin-secret" if control else "ordinary-secret"
            if received.path != "/health":
                assert received.headers["Authorization"] == f"Bearer {secret}", received.path
    told = "".join([*said, *capfd.readouterr(), repr(keys), repr(made.config)])
    assert "secret" not in told and "secret" not in "".join(
        p.read_text(errors="ignore") for p in tmp_path.rglob("*") if p.is_file()
    )


def test_a_gateway_gets_the_questions_and_the_servers_their_weights(tmp_path, params):
    with double() as a, double() as b, double() as gateway:
        with engine(tmp_path, a, b, gateway=gateway.url) as made:
            made.set_weights(params[0], 0)
            label = made.pool.current.label
            gateway._scheduler.load(digest(made.pool.current.folder), label)  # as the servers behind it have
            gateway._info["version"] = label
            groups = made.generate(prompts(4), 2, Sampling(20), 0)
            check(groups, prompts(4), 2, served(made), max_tokens=20)
        asked = [r for r in gateway.received if r.path == "/generate"]
        assert len(asked) == 8 and {r.headers["X-SMG-Routing-Key"] for r in asked} == set("0123")
        assert not any(r.path == "/update_weights_from_disk" for r in gateway.received)


def test_a_stop_that_the_run_does_not_know_is_refused(tmp_path, params):
    with double(eos_ids=(STOP, *range(8, 60))) as a, engine(tmp_path, a) as made:
        made.set_weights(params[0], 0)
        with pytest.raises(UserError, match="a server ended an answer at id .* add it to config.tokenizer.stop_tokens"):
            made.generate(prompts(4), 2, Sampling(40), 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(urls=()), "names no server"),
        (dict(urls=("host:1",)), "must look like http://host:30000"),
        (dict(urls=("http://u:p@h:1",)), "would end in logs"),
        (dict(urls=("http://h:1", "http://h:1")), "twice"),
        (dict(update_mode="wait"), "update_mode: 'wait' must be one of"),
        (dict(repetition_stop="never"), "repetition_stop: 'never'"),
        (dict(weights_dtype="int8"), "weights_dtype: 'int8'"),
        (dict(attempts=0), "attempts: 0 must be at least 1"),
        (dict(patience_s=0.0), "patience_s: 0.0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ServersConfig(**dict(urls=("http://h:1",)) | values)


def test_faults_have_one_name_each():
    assert Counter(FAULTS_OF.values()).keys() <= set(
        __import__("m1jax.rl.engine_sglang", fromlist=["FAULT_KINDS"]).FAULT_KINDS
    )
    assert set(FAULTS_OF) == set(ALL) - {"slow"}


def test_a_server_that_comes_back_set_up_wrongly_is_left_out_and_at_the_start_refused(tmp_path, params):
    said: list[str] = []
    with double() as a, double() as b, engine(tmp_path, a, b, log=said.append) as made:
        made.set_weights(params[0], 0)
        b.kill()
        b.incremental = False  # as one that was started again without a flag
        b.restart()
        made.set_weights(params[1], 1)  # finds it gone
        deadline = time.monotonic() + 20
        while not any("streams all earlier" in line for line in said) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert any(f"{b.url}: streams all earlier tokens again" in line for line in said)
        check(made.generate(prompts(4), 2, Sampling(40), 0), prompts(4), 2, served(made, 1))
    with (
        double() as a,
        double(incremental=False) as b,
        engine(tmp_path, a, b) as made,
        pytest.raises(UserError, match=f"{b.url}: streams all earlier"),
    ):
        made.set_weights(params[0], 0)


def test_a_request_says_all_that_shapes_the_distribution(tmp_path, params):
    """A server may have defaults of its own; one in deterministic mode is told the noise as well."""
    shared = tmp_path / "shared"
    with (
        double(deterministic=True, experts=(2, 2, 4)) as a,
        engine(shared / "run", a, weights_folder=str(shared), weights_folder_there=f"{shared}/../shared") as made,
    ):
        made.set_weights(params[0], 0)
        made.generate(prompts(2), 2, Sampling(7, temperature=0.7, top_p=0.5, top_k=9), 3)
        bodies = [r.body for r in a.received if r.path == "/generate" and r.body["sampling_params"]["top_p"] < 1]
        for body in bodies:
            sampling = body["sampling_params"]
            assert (sampling["max_new_tokens"], sampling["temperature"], sampling["top_k"]) == (7, 0.7, 9)
            assert sampling["stop_token_ids"] == [STOP] and not sampling["ignore_eos"] and body["return_logprob"]
        assert len({body["sampling_params"]["sampling_seed"] for body in bodies}) == 4
        update = next(r.body for r in a.received if r.path == "/update_weights_from_disk")
        assert update["model_path"].startswith(f"{shared}/../shared/run/00000000-")
        again = made.generate(prompts(2), 2, Sampling(7, temperature=0.7, top_p=0.5, top_k=9), 3)
        assert len(again) == 2
        asked = [r.body["sampling_params"] for r in a.received if r.path == "/generate"][-4:]
        assert {sampling["sampling_seed"] for sampling in asked} == {
            body["sampling_params"]["sampling_seed"] for body in bodies
        }  # the same noise


def test_no_more_is_under_way_at_a_server_than_it_is_to_have(tmp_path, params):
    with double(seconds_per_token=0.005) as a, engine(tmp_path, a, in_flight=3) as made:
        made.set_weights(params[0], 0)
        futures, most = made.submit(prompts(6), 4, Sampling(20), 0), 0
        while not all(f.done() for f in futures):
            most = max(most, made.pool.servers[0].in_flight)
            time.sleep(0.001)
        assert most == 3
        check([f.result() for f in futures], prompts(6), 4, served(made), max_tokens=20)


def test_a_full_queue_is_waited_for_and_is_no_failure(tmp_path, params):
    options = dict(max_queued=1, max_running=2, seconds_per_token=0.01)
    with double(**options) as a, engine(tmp_path, a, attempts=2, stall_s=20.0) as made:
        made.set_weights(params[0], 0)
        check(made.generate(prompts(6), 2, Sampling(20), 0), prompts(6), 2, served(made), max_tokens=20)
        assert made.take_metrics()["engine/fault_busy"] > 2


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_an_update_may_take_longer_than_any_patience(tmp_path, params, monkeypatch, mode):
    """Nothing is generated meanwhile, which is nobody's fault; the answers go on after it."""
    import asyncio

    with (
        double(seconds_per_token=0.01) as a,
        engine(tmp_path, a, update_mode=mode, stall_s=1.5, patience_s=2.0) as made,
    ):
        made.set_weights(params[0], 0)
        digests, load = served(made, 0), a._load

        async def slow(body, waited):
            await asyncio.sleep(4.0)
            return await load(body, waited)

        monkeypatch.setattr(a, "_load", slow)
        futures = made.submit(prompts(4), 2, Sampling(60), 0)
        time.sleep(0.2)
        made.set_weights(params[1], 1)
        digests |= served(made, 1)
        check([f.result(60) for f in futures], prompts(4), 2, digests, max_tokens=60)
        metrics = made.take_metrics()
        assert metrics["engine/faults"] == 0 and metrics["engine/servers_out"] == 0


def test_streams_that_break_after_an_update_keep_no_token_of_doubtful_weights(tmp_path, params):
    """An event of many tokens may straddle the update; it names the new weights, and only a last event would tell."""
    import asyncio

    from tests.sglang_faults import reset

    async def reset_all():
        for connection in list(a._runner.server.connections):
            reset(connection.transport)

    for attempt in range(3):
        with double(seconds_per_token=0.01) as a, engine(tmp_path / str(attempt), a, stream_interval=32) as made:
            made.set_weights(params[0], 0)
            digests = served(made, 0)
            futures = made.submit(prompts(8), 2, Sampling(120), 0)
            time.sleep(0.3 + 0.05 * attempt)
            made.set_weights(params[1], 1)
            digests |= served(made, 1)
            time.sleep(0.35)
            asyncio.run_coroutine_threadsafe(reset_all(), a._loop).result(10)
            check([f.result(60) for f in futures], prompts(8), 2, digests, max_tokens=120)


@pytest.mark.parametrize("interval", [1, 2, 8])
def test_disjoint_pieces_are_not_taken_for_repeated_ones(tmp_path, params, interval):
    with double(stream_interval=interval) as a, engine(tmp_path, a, stream_interval=0) as made:
        made.set_weights(params[0], 0)
        check(made.generate(prompts(2), 2, Sampling(40), 0), prompts(2), 2, served(made))


def test_an_address_of_something_else_is_refused_at_once(tmp_path, params):
    with (
        double() as a,
        engine(tmp_path, urls=(f"{a.url}/v1",)) as made,
        pytest.raises(UserError, match="is this the address of an SGLang server"),
    ):
        made.set_weights(params[0], 0)


def test_weights_that_did_not_change_are_noticed_where_there_is_but_one_server(tmp_path, params, monkeypatch):
    with double() as a, engine(tmp_path, a, patience_s=1.0) as made:
        made.set_weights(params[0], 0)
        load = a._load

        async def label_only(body, waited):
            before = a._scheduler.weights
            answer = await load(body, waited)
            a._scheduler.weights = before
            return answer

        monkeypatch.setattr(a, "_load", label_only)
        with pytest.raises(EngineLost, match="its checksums are the same on rank 0 after an update to 00000001-"):
            made.set_weights(params[1], 1)


def test_an_abort_that_is_lost_costs_a_moment_and_no_token(tmp_path, params, monkeypatch):
    """The answer has ended by our own rule: its stream is left, however long it would go on."""
    from m1jax.rl import engine_sglang
    from m1jax.rl.servers.server import Server

    async def lost(self, rid): ...

    monkeypatch.setattr(Server, "abort", lost)
    monkeypatch.setattr(engine_sglang, "LEAVE_S", 0.2)
    with (
        double(script=scripted([True] * 2000), context_length=10_000, seconds_per_token=0.005) as a,
        engine(tmp_path, a, stream_interval=8, stall_s=30.0) as made,
    ):
        made.set_weights(params[0], 0)
        [[response]] = made.generate(prompts(1), 1, Sampling(1900, repetition_run=20), 0)
        assert (len(response.token_ids), response.ending) == (20, "repetition")
        assert made.take_metrics()["engine/bytes"] < 60 * 200  # of some 1900 tokens at 50 bytes


def test_a_server_of_another_model_is_refused(tmp_path, params, monkeypatch):
    with double() as a, engine(tmp_path, a) as made:
        made.pool.needs = dataclasses.replace(made.pool.needs, model_type="qwen2")
        info = made.pool.servers[0].info

        async def of_a_llama():
            return await info() | {"model_type": "llama"}

        monkeypatch.setattr(made.pool.servers[0], "info", of_a_llama)
        with pytest.raises(UserError, match="serves /models/toy, a llama, and the run trains a qwen2"):
            made.set_weights(params[0], 0)


def test_a_server_that_somebody_left_paused_is_woken(tmp_path, params):
    """Its streams stall, it is looked at, and in a pause it would never be healthy."""
    with double(seconds_per_token=0.005) as a, engine(tmp_path, a, stall_s=0.5, patience_s=15.0) as made:
        made.set_weights(params[0], 0)
        made._run(made.pool.servers[0].call("/pause_generation", {"mode": "retract"})).result(10)
        check(made.generate(prompts(2), 2, Sampling(20), 0), prompts(2), 2, served(made), max_tokens=20)
        assert made.take_metrics()["engine/servers_back"] >= 1
