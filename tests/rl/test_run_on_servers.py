"""Whole runs whose responses come from servers: what is recorded, and what is left when the servers go."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from m1jax.errors import EngineLost, ServerRefused, UserError
from m1jax.rl.loop import train
from m1jax.train.checkpoint import steps
from m1jax.train.interrupt import Interrupted
from tests import runs
from tests.sglang_double import Double

EOS = runs.TOKENS.index("<eos>")


def script(ids):
    """`<think></think><answer>D</answer><eos>` with a digit that hangs on how often it was asked; or the rest of it."""
    script.calls += 1
    before, last = (runs.TOKENS[i] for i in [0, *ids][-2:])
    order = ("<think>", "</think>", "<answer>", "a digit", "</answer>")
    done = 4 if before == "<answer>" else order.index(last) + 1 if last in order else 0
    digit = str(int(np.random.default_rng(script.calls).integers(10)))
    text = ("<think>", "</think>", "<answer>", digit, "</answer>", "<eos>")
    return [(runs.TOKENS.index(t), -2.3 if t == digit else -0.01) for t in text[done:]]


script.calls = 0


def double(**options) -> Double:
    return Double(**dict(vocab_size=20, eos_ids=(EOS,), script=script) | options)


def config(folder, *doubles, **changes):
    servers = dict(urls=tuple(d.url for d in doubles), patience_s=5.0, stall_s=2.0) | changes.pop("servers", {})
    return runs.rl_config(folder, **dict(servers=servers, init_from=runs.save_bigram(folder)) | changes)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_records_what_the_servers_went_through(tmp_path):
    said = []
    with double() as a, double() as b:
        result = train(config(tmp_path, a, b, servers=dict(stall_s=60.0)), tmp_path / "run", log=said.append)
        assert [row["step"] for row in result.metrics] == [0, 1, 2, 3]
        for row in result.metrics[1:]:
            assert row["engine/servers"] == 2 and row["engine/faults"] == 0 and row["engine/requests"] >= 32
            assert row["sync/bytes"] > 0 and row["sync/seconds"] > 0 and row["engine/client_cpu"] >= 0
            assert row["train/updates_applied"] > 0
        # Every version went to both, and the run waits for none of them at its end.
        updates = [
            [r.body["weight_version"][:8] for r in d.received if r.path == "/update_weights_from_disk"] for d in (a, b)
        ]
        assert updates == [["00000000", "00000001", "00000002", "00000003"]] * 2
    weights = sorted(f.name for f in (tmp_path / "run" / "weights").iterdir())
    assert [name[:8] for name in weights] == ["00000001", "00000002", "00000003"]
    assert (tmp_path / "run" / "weights" / weights[0] / "tokenizer.json").is_file()
    assert not any("key" in line.lower() for line in said)
    assert "rollout servers" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 3])
def test_when_the_servers_are_gone_it_saves_exits_75_and_goes_on_later(tmp_path, step, monkeypatch):
    """Lost in the rollouts, or in the sync, of any step: every step is recorded once, evaluations are all there."""
    with double() as a:
        made = config(tmp_path, a, servers=dict(patience_s=2.0))
        load = a._load

        async def gone_at(body, waited):
            if body["weight_version"].startswith(f"{step:08d}") and not gone_at.over:
                gone_at.over = True
                await a._crash()
            return await load(body, waited)

        gone_at.over = False
        monkeypatch.setattr(a, "_load", gone_at)
        error = Interrupted if step else EngineLost  # at a start there is nothing to save
        with pytest.raises(error, match="no rollout server for 2 s: http://127.0.0.1:.* Cannot connect") as lost:
            train(made, tmp_path / "run", log=lambda _: None)
        if step:
            assert isinstance(lost.value, Interrupted) and lost.value.exit_code == 75
            assert [r["step"] for r in rows(tmp_path / "run")] == list(range(step))
        a.restart()
        result = train(made, tmp_path / "run", log=lambda _: None)
    assert [row["step"] for row in result.metrics] == [0, 1, 2, 3]
    if step:  # lost at the sync of that step, whose row says so though another process has written it
        assert result.metrics[step]["engine/servers_out"] >= 1 and result.metrics[step]["engine/requests"] >= 32
        assert "time/tokens_per_second" not in result.metrics[step]
    assert result.metrics[0]["heldout/sums/mean"] >= 0 and "heldout/sums/mean" in result.metrics[3]
    assert set(result.summary["heldout"]["sums"]) == {"majority", "before", "after"}


@pytest.mark.parametrize("step", [0, 2])
def test_asked_to_stop_while_servers_read_weights_it_saves_and_goes_on_later(tmp_path, step, monkeypatch):
    """At the start as after an update; the servers are left as they can be used."""
    with double() as a:
        made, load = config(tmp_path, a, checkpoint=dict(every=100)), a._load

        async def slow(body, waited):
            if body["weight_version"].startswith(f"{step:08d}"):
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(600)
            return await load(body, waited)

        monkeypatch.setattr(a, "_load", slow)
        with pytest.raises(Interrupted) as stopped:
            train(made, tmp_path / "run", log=lambda _: None)
        assert stopped.value.exit_code == 75 and a._unpaused.is_set()
        assert steps(tmp_path / "run" / "checkpoints") == ([0, 2] if step else [])
        monkeypatch.undo()
        result = train(made, tmp_path / "run", log=lambda _: None)
    assert [row["step"] for row in result.metrics] == [0, 1, 2, 3]
    assert all("heldout/sums/mean" in result.metrics[at] for at in (0, 3))


def test_a_server_that_turns_out_to_be_of_no_use_costs_no_update(tmp_path, monkeypatch):
    """It ends answers at ids that the run does not know: a mistake of set-up, which a person has to mend."""
    with double() as a:
        made, load, known = config(tmp_path, a, checkpoint=dict(every=100)), a._load, a._scheduler.eos_ids

        async def changed(body, waited):
            if body["weight_version"].startswith("00000002"):
                a._scheduler.eos_ids = set(range(20))
            return await load(body, waited)

        monkeypatch.setattr(a, "_load", changed)
        with pytest.raises(ServerRefused, match="ended an answer at id .* add it to config.tokenizer.stop_tokens"):
            train(made, tmp_path / "run", log=lambda _: None)
        assert steps(tmp_path / "run" / "checkpoints") == [0, 2]
        monkeypatch.undo()
        a._scheduler.eos_ids = known
        result = train(made, tmp_path / "run", log=lambda _: None)
    assert [row["step"] for row in result.metrics] == [0, 1, 2, 3]


def test_servers_that_come_back_in_time_cost_nothing_but_time(tmp_path):
    """Twice, in the middle of the answers to a batch."""
    with double(seconds_per_token=0.02) as a:

        def lines():
            return len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())

        def crash():
            for batch in (1, 3):
                while not (tmp_path / "run" / "metrics.jsonl").exists() or lines() <= batch:
                    time.sleep(0.005)
                asked = len(a.received)
                while not any(r.path == "/generate" for r in a.received[asked:]):
                    time.sleep(0.005)
                a.kill()
                time.sleep(0.2)
                a.restart()

        thread = threading.Thread(target=crash)
        thread.start()
        result = train(config(tmp_path, a, steps=6), tmp_path / "run", log=lambda _: None)
        thread.join()
    assert [row["step"] for row in result.metrics] == list(range(7))
    assert sum(row["engine/servers_out"] for row in result.metrics) >= 2
    assert sum(row["engine/restarts"] for row in result.metrics) >= 2
    assert all(row["rollout/tokens"] == 4 * 8 * 6 for row in result.metrics[1:])


@pytest.mark.parametrize(
    ("staleness", "unfinished"),
    [
        (1, "wait"),
        pytest.param(2, "wait", marks=pytest.mark.slow),
        pytest.param(3, "next_batch", marks=pytest.mark.slow),
    ],
)
def test_batches_asked_ahead_are_no_older_than_the_bound(tmp_path, staleness, unfinished):
    changes = dict(rollout__staleness=staleness, rollout__unfinished=unfinished, steps=6)
    with double(seconds_per_token=0.002) as a:
        result = train(config(tmp_path, a, **changes), tmp_path / "run", log=lambda _: None)
    ages = [row["rollout/staleness_largest"] for row in result.metrics[1:]]
    assert ages[0] == 0 and max(ages) <= staleness and (max(ages) == staleness or unfinished == "next_batch")
    assert all("rollout/dropped_stale" in row for row in result.metrics[1:])


@pytest.mark.slow
def test_the_local_engine_can_be_asked_ahead_too_and_a_resumed_run_asks_what_is_missing(tmp_path):
    changes = dict(rollout__staleness=1, init_from=runs.save_bigram(tmp_path), steps=5, rollout__save=True)
    config_ = runs.rl_config(tmp_path, **changes)
    result = train(config_, tmp_path / "run", log=lambda _: None)
    ages = [row["rollout/staleness_largest"] for row in result.metrics[1:]]
    assert ages == [0, 1, 1, 1, 1]
    # The engine's log-probabilities are of older weights, so that the first update is off policy already.
    first = [row["ratio/abs_log_first_update"] for row in result.metrics[1:]]
    assert first[0] < 1e-4 < min(first[1:])
    asked = [sorted(np.load(f)["prompt_index"].tolist()) for f in sorted((tmp_path / "run" / "rollouts").iterdir())]
    assert asked == [list(range(4 * s, 4 * s + 4)) for s in range(5)]

    replayed = train(
        runs.rl_config(tmp_path, init_from=changes["init_from"], steps=5, rollout__replay=str(tmp_path / "run")),
        tmp_path / "replayed", log=lambda _: None,
    )  # fmt: skip
    assert [r["train/loss"] for r in replayed.metrics[1:]] == [r["train/loss"] for r in result.metrics[1:]]


@pytest.mark.slow
def test_a_run_asked_ahead_is_resumed_with_fresh_answers_to_the_same_prompts(tmp_path):
    changes = dict(rollout__staleness=1, init_from=runs.save_bigram(tmp_path), steps=4, rollout__save=True)

    class Stop(Exception): ...

    from m1jax.rl import loop

    original, seen = loop.finish_step, []

    def finish_step(run, metrics):
        original(run, metrics)
        seen.append(run.step)
        if run.step == 2 and seen == [1, 2]:
            raise Stop

    loop.finish_step = finish_step
    try:
        with pytest.raises(Stop):
            train(runs.rl_config(tmp_path, **changes), tmp_path / "run", log=lambda _: None)
        result = train(runs.rl_config(tmp_path, **changes), tmp_path / "run", log=lambda _: None)
    finally:
        loop.finish_step = original
    assert [row["step"] for row in result.metrics] == [0, 1, 2, 3, 4]
    assert [row["rollout/staleness_largest"] for row in result.metrics[1:]] == [0, 1, 0, 1]
    asked = [sorted(np.load(f)["prompt_index"].tolist()) for f in sorted((tmp_path / "run" / "rollouts").iterdir())]
    assert asked == [list(range(4 * s, 4 * s + 4)) for s in range(4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rollout__staleness=-1), "config.rollout.staleness: -1 must be at least 0"),
        (dict(rollout__unfinished="never"), "config.rollout.unfinished: 'never' must be one of"),
        (dict(rollout__unfinished="next_batch", rollout__staleness=1), "config.rollout.unfinished: 'next_batch' with"),
        (dict(rollout__staleness=1, rollout__replay="runs/x"), "config.rollout.staleness: 1, and a replay generates"),
        (dict(servers=dict(urls=("http://h:1",)), rollout__replay="x"), "config.servers: .* would not be asked"),
        (dict(servers=dict(urls=("h:1",))), "config.servers.urls: 'h:1' must look like"),
        (dict(servers=dict(url="http://h:1")), "config.servers.url: unknown key; did you mean urls"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        runs.rl_config(tmp_path, **changes)
