"""Our engine and whole runs against real servers: weights that follow the trainer, and what a crash costs.

`make sglang-test` prints nothing of its numbers unless asked to: `pytest -m sglang tests/serving/test_engine.py -s`.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from m1jax.config import build
from m1jax.model.config import ModelConfig
from m1jax.rl.engine_sglang import SGLangEngine
from m1jax.rl.loop import train
from m1jax.rl.servers.settings import ServersConfig
from m1jax.train.convert import convert
from m1jax.types import Problem, Prompt, Sampling
from tests import runs
from tests.serving.models import TOLERANCE, Weights, perturbed, weights
from tests.serving.server import Server, installed

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(not installed(), reason="no SGLang server's environment; make sglang-env sets it up"),
]

STOP = 2
MODEL = build(ModelConfig, runs.MODEL)
FLAGS = ("--context-length", "2048")


class Served:
    """A server of a recorded model, our engine over it, and three versions of its weights."""

    def __init__(self, folder: Path, name: str, *flags: str):
        self.weights: list[Weights] = [weights(name, folder / "odd")]
        self.weights += [perturbed(self.weights[0], folder / f"perturbed{seed}", seed) for seed in (1, 2)]
        self.server = Server(self.weights[0].folder, folder / f"{name}.log", *FLAGS, *flags).start()
        self.folder, self.model = folder, self.weights[0].config

    def engine(self, **config) -> SGLangEngine:
        return SGLangEngine(
            ServersConfig(**dict(urls=(self.server.url,), in_flight=16, patience_s=120.0) | config), self.model,
            stop_ids=(STOP,), temperature=1.0, positions=2048, weights=self.folder / "weights",
            record_experts=self.model.num_experts > 0, log=lambda line: None,
        )  # fmt: skip

    def prompts(self, count: int, tokens: int = 12) -> list[Prompt]:
        rng = np.random.default_rng(3)
        ids = rng.integers(3, self.model.vocab_size, (count, tokens))
        return [Prompt(i, Problem("t", "q", "a"), tuple(row.tolist())) for i, row in enumerate(ids)]

    def gap(self, prompt: Prompt, rollout, temperature: float = 1.0) -> float:
        """Largest difference between a token's log-probability and ours under the weights that it names.

        Where all tokens are of the same weights the server's experts serve in ours too, for a near tie may go either
        way. Of an answer over an update they are not on record for every token and every version.
        """
        versions, experts = rollout.weight_versions, None
        if versions is None:
            versions, experts = np.full(len(rollout.token_ids), rollout.weight_version), rollout.expert_ids
        worst = 0.0
        for version in sorted(set(versions.tolist())):
            ids = [*prompt.token_ids, *rollout.token_ids.tolist()]
            ours, _ = self.weights[version].logprobs(ids, temperature, experts)
            mine = np.flatnonzero(versions == version)
            worst = max(worst, np.abs(ours[len(prompt.token_ids) + mine] - rollout.rollout_logprobs[mine]).max())
        return float(worst)


@pytest.fixture(scope="module", params=["m1_tiny", "qwen2_tiny"])
def served(request, tmp_path_factory):
    flags = ["--enable-return-routed-experts"] if request.param == "m1_tiny" else []
    made = Served(tmp_path_factory.mktemp(request.param), request.param, *flags)
    yield made
    made.server.stop()


@pytest.mark.parametrize("repetition_stop", ["stream", "segments"])
def test_rollouts_have_our_log_probabilities_before_and_after_each_update(served, repetition_stop):
    engine = served.engine(repetition_stop=repetition_stop, segment_tokens=16)
    try:
        for version, temperature in ((0, 1.0), (1, 0.7), (2, 1.3), (0, 1.0)):
            engine.set_weights(served.weights[version].params, version)
            sampling = Sampling(60, temperature=temperature, repetition_run=1000)
            asked = served.prompts(6, tokens=300 if version else 12)  # long ones are prefilled in pieces
            groups = engine.generate(asked, 4, sampling, 0)
            assert [[(r.prompt_index, r.sample) for r in g] for g in groups] == [
                [(p.index, i) for i in range(4)] for p in asked
            ]
            gaps = [served.gap(p, r, temperature) for p, g in zip(asked, groups, strict=True) for r in g]
            assert max(gaps) < TOLERANCE
            metrics = engine.take_metrics()
            # A recurrent state is kept at the end of a prompt only, and one token of it has to be fed anew.
            assert metrics["engine/faults"] == 0 and (metrics["engine/cached_share"] > 0.3 or served.model.num_experts)
    finally:
        engine.close()


@pytest.mark.parametrize("mode", ["retract", "abort", "in_place"])
def test_answers_over_an_update_are_of_the_weights_that_each_token_names(served, mode):
    """In place, the later ones are on keys, values and states of the old weights: nobody else has those."""
    engine = served.engine(update_mode=mode)
    try:
        engine.set_weights(served.weights[0].params, 0)
        asked = served.prompts(4)
        engine.generate(asked, 1, Sampling(20), 0)
        for attempt in range(5):  # where the machine is slow the update may miss the answers
            futures = engine.submit(asked, 2, Sampling(600), 0)
            time.sleep(0.4 + 0.2 * attempt)
            engine.set_weights(served.weights[1].params, 1)
            groups = [future.result(120) for future in futures]
            rollouts = [(p, r) for p, g in zip(asked, groups, strict=True) for r in g]
            several = [(p, r) for p, r in rollouts if r.weight_versions is not None]
            if several:
                break
            engine.set_weights(served.weights[0].params, 0)
        assert several
        if mode == "in_place":
            rollouts = [(p, until_the_update(r)) for p, r in rollouts]
        gaps = sorted(served.gap(p, r) for p, r in rollouts)
        assert gaps[-2] < TOLERANCE  # all but one, in which two experts may be nearly tied
        assert gaps[-1] < TOLERANCE or served.model.num_experts
    finally:
        engine.close()


def until_the_update(rollout):
    """The tokens of a response that the first of its weights sampled."""
    versions = rollout.weight_versions
    end = len(rollout.token_ids) if versions is None else int((versions == versions[0]).sum())
    return dataclasses.replace(
        rollout, token_ids=rollout.token_ids[:end], rollout_logprobs=rollout.rollout_logprobs[:end],
        weight_versions=None, expert_ids=None,
    )  # fmt: skip


def export(folder: Path) -> Path:
    """What a server is started with: the model that runs begin from, as its export."""
    runs.save_bigram(folder)
    run = folder / "first"
    (run / "checkpoints").mkdir(parents=True)
    (folder / "bigram" / f"{0:08d}").rename(run / "checkpoints" / f"{0:08d}")
    return convert(run, folder / "served", log=lambda line: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A server of the two layers that `tests/runs.py` trains, and the folder of what belongs to it."""
    folder = tmp_path_factory.mktemp("trained")
    server = Server(export(folder), folder / "server.log", *FLAGS, "--enable-return-routed-experts").start()
    yield server, folder
    server.stop()


def config(folder: Path, server: Server | None, **changes):
    servers = {} if server is None else dict(servers=dict(urls=(server.url,), in_flight=16, patience_s=120.0))
    values = dict(
        init_from=str(folder / "first"), steps=20, rollout__prompts=16, rollout__engine_rows=128,
        optimizer=dict(learning_rate=3e-3), evaluation__every=100, checkpoint__every=100,
    )  # fmt: skip
    return runs.rl_config(folder, **values | servers | changes)


def threes(folder: Path) -> str:
    """A task that is learnt in twenty batches."""
    return runs.sums(folder).replace(":parity", ":threes")


def rewards(result) -> float:
    """Mean reward of the last five batches."""
    return float(np.mean([row["reward/mean"] for row in result.metrics[-5:]]))


def test_cispo_over_a_server_learns_as_it_does_in_process(trained, tmp_path):
    """Twenty steps with a sync at each, over three seeds: the rewards differ by no more than chance.

    BUILD.md records a run within two standard errors. Of sound engines every ninth would be outside of them (three
    seeds each), and one of sixty outside of the four that are asked for here.
    """
    server, folder = trained
    ends: dict[str, list[float]] = {"server": [], "local": []}
    for seed in range(3):
        for name in ends:
            made = config(folder, server if name == "server" else None, seed=seed, tasks=threes(folder))
            result = train(made, tmp_path / f"{name}{seed}", log=lambda line: None)
            ends[name].append(rewards(result))
            steps = result.metrics[1:]
            assert min(row["mismatch/probability_correlation"] for row in steps) > 0.999
            # Of the first update after each sync: nothing lies between the engine's weights and the trainer's.
            assert max(row["mismatch/largest_logprob_gap"] for row in steps) < TOLERANCE
            if name == "server":
                assert all(row["sync/bytes"] > 0 and row["engine/faults"] == 0 for row in steps)
            told = min(row["mismatch/probability_correlation"] for row in steps)
            print(f"{name} {seed}: {steps[0]['reward/mean']:.3f} to {rewards(result):.3f}, correlation {told:.7f}")
    server_, local = (np.array(ends[name]) for name in ("server", "local"))
    error = np.sqrt(server_.var(ddof=1) / 3 + local.var(ddof=1) / 3)
    print(f"server {server_.mean():.4f} local {local.mean():.4f} two standard errors {2 * error:.4f}")
    assert abs(server_.mean() - local.mean()) < 4 * error
    assert min(*server_, *local) > 0.7  # of 1.1, from some 0.25


def test_experts_of_the_server_are_those_of_the_trainer(trained, tmp_path):
    server, folder = trained
    made = config(folder, server, steps=4, rollout__router_replay="use")
    result = train(made, tmp_path / "run", log=lambda line: None)
    assert all(row["router/replay_differs"] < 1e-3 for row in result.metrics[1:])


def test_the_server_stops_repetition_itself_at_the_same_token(trained, tmp_path):
    """`<think>`, `</think>` and `<answer>` come with 0.85 each: three in a row above 0.8 end the answer."""
    server, folder = trained
    flags = (*FLAGS, "--enable-custom-logit-processor")
    own = Server(folder / "served", tmp_path / "log", *flags).start()
    lengths = {}
    try:
        for url, way in ((own.url, "processor"), (server.url, "stream")):
            config_ = ServersConfig(urls=(url,), repetition_stop=way, in_flight=16)
            engine = SGLangEngine(
                config_, MODEL, stop_ids=(runs.TOKENS.index("<eos>"),),
                temperature=1.0, positions=64, weights=tmp_path / way, log=lambda line: None,
            )  # fmt: skip
            try:
                engine.set_weights(runs.bigram(), 0)
                sampling = Sampling(40, repetition_run=3, repetition_probability=0.8)
                prompt = Prompt(0, Problem("t", "q", "a"), (runs.TOKENS.index("<bos>"), runs.TOKENS.index("\n")))
                [group] = engine.generate([prompt], 64, sampling, 0)
                lengths[way] = [len(r.token_ids) for r in group if r.ending == "repetition"]
                for r in group:
                    likely = np.exp(r.rollout_logprobs) > np.float32(0.8)
                    ends = [i for i in range(2, len(likely)) if likely[i - 2 : i + 1].all()]
                    assert (ends[:1] == [len(likely) - 1]) == (r.ending == "repetition") and len(ends) <= 1
            finally:
                engine.close()
    finally:
        own.stop()
    assert len(lengths["processor"]) > 30 and len(lengths["stream"]) > 30


def test_a_server_that_is_killed_in_a_batch_comes_back_with_the_right_weights(trained, tmp_path):
    """SIGKILL of all its processes while answers are under way, then a start with the weights of long ago."""
    server, folder = trained
    made = config(folder, server, steps=8, rollout__staleness=1, sampling__max_tokens=64)
    workdir, said = tmp_path / "run", []

    def crash():
        while not (workdir / "metrics.jsonl").exists() or len((workdir / "metrics.jsonl").read_text().splitlines()) < 4:
            time.sleep(0.02)
        server.kill()
        server.start()

    thread = threading.Thread(target=crash)
    thread.start()
    result = train(made, workdir, log=said.append)
    thread.join()
    steps = result.metrics[1:]
    assert [row["step"] for row in result.metrics] == list(range(9))
    assert sum(row["engine/servers_out"] for row in steps) == sum(row["engine/servers_back"] for row in steps) >= 1
    assert sum(row["engine/restarts"] for row in steps) == 1 and sum(row["engine/faults"] for row in steps) >= 1
    assert any("came back with weights" in line for line in said)
    assert max(row["rollout/staleness_largest"] for row in steps) <= 1
    # A batch old: its log-probabilities are of weights two updates back, not of those that the server started with.
    assert min(row["mismatch/probability_correlation"] for row in steps) > 0.99


def test_the_trainer_outlives_its_script_as_it_should(trained, tmp_path):
    """launch/local_sglang.sh: SIGTERM saves, exits 75 and leaves no server."""
    _, folder = trained
    root = Path(__file__).parents[2]
    values = dict(runs.rl_values(folder, init_from=str(folder / "first"), steps=1000))
    values["servers"] = dict(urls=("http://127.0.0.1:1",), in_flight=16)
    file = tmp_path / "config.py"
    file.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n")
    port = Server(folder, tmp_path / "x").port
    script = subprocess.Popen(
        [root / "launch" / "local_sglang.sh", file, tmp_path / "run", folder / "first"], cwd=root, text=True,
        env=os.environ | {"PORT": str(port), "VENV": str(Path(sys.executable).parents[1])}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert script.poll() is None, script.communicate()[0]
        time.sleep(0.2)
    script.send_signal(signal.SIGTERM)
    out, _ = script.communicate(timeout=90)
    assert script.returncode == 75 and "stopped and saved; resume with:" in out
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
