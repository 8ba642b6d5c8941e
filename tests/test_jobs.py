"""Jobs of real processes, started by launch/local.sh: what they compute, and what becomes of them when one is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from m1jax.train.checkpoint import steps
from m1jax.train.leaf_store import StoredLeaves
from m1jax.weights.hf_folder import HFFolder
from tests.sglang_double import Double

ROOT = Path(__file__).parents[1]
STEPS = 10
FLAGS = (
    "train_rl", "configs/rl_tiny_cpu.py:smoke", "--config.evaluation.every=100", f"--config.steps={STEPS}",
    "--config.checkpoint.every=1", "--config.checkpoint.keep=20",
)  # fmt: skip


def start(folder: Path, processes: int, *flags: str, **environment: str) -> subprocess.Popen:
    """launch/local.sh over so many processes of one device."""
    entry, config, *more = FLAGS
    own = {"PROCESSES": str(processes), "JAX_NUM_CPU_DEVICES": "1", "OMP_NUM_THREADS": "1", "VENV": _venv()}
    command = ["launch/local.sh", entry, config, str(folder), *more, *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | own | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def _venv() -> str:
    return str(Path(sys.executable).parents[1])


def finish(job: subprocess.Popen, seconds: float = 240) -> tuple[int, str]:
    """Exit code and output; a job that does not end is ended, with all that it started."""
    try:
        said, _ = job.communicate(timeout=seconds)
        return job.returncode, said
    except subprocess.TimeoutExpired:
        end(job)
        raise


def end(job: subprocess.Popen) -> None:
    """Kill what the script started, each in a group of its own, and the script."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for child in map(int, children):
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    job.kill()


def reaches(folder: Path, step: int, job: subprocess.Popen, seconds: float = 240) -> None:
    """Wait until a step is saved."""
    deadline = time.monotonic() + seconds
    while step not in steps(folder / "checkpoints"):
        assert job.poll() is None, job.communicate()[0]
        if time.monotonic() > deadline:
            end(job)
            raise AssertionError(f"step {step} was not reached")
        time.sleep(0.05)


def sign(job: Path, process: int) -> dict:
    """What a process last showed of itself."""
    return json.loads((job / "hosts" / f"{process:05d}.json").read_text())


def stop_in_an_update(job: Path, victim: int, others: tuple[int, ...]) -> None:
    """Let a process stand still while the others wait for its part of an update: the middle of a step for all."""
    pid = sign(job, victim)["pid"]
    for _ in range(20):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)  # they show once a second what they are at
        if all(sign(job, n)["stage"] == "update" for n in others):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)
    raise AssertionError("no update was met")


def largest_difference(one: Path, other: Path, step: int) -> float:
    """Of all parameters at a step, to their norm."""
    states = [StoredLeaves(folder / "checkpoints" / f"{step:08d}" / "state") for folder in (one, other)]
    assert states[0].shapes.keys() == states[1].shapes.keys()
    pairs = [[np.asarray(s.read(leaf), np.float64) for s in states] for leaf in states[0].shapes]
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(x)) for x, y in pairs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: a run that samples and saves its rollouts, and one that trains on them."""
    folder = tmp_path_factory.mktemp("jobs")
    for name, flags in (("sampled", ("--config.rollout.save=true",)), ("alone", (f"--replay={folder / 'sampled'}",))):
        code, said = finish(start(folder / name, 1, *flags))
        assert code == 0, said
    return folder


@pytest.mark.slow
def test_four_processes_train_as_one_lose_one_and_go_on_as_two(alone):
    """SIGKILL in the middle of an update; then two processes, which SIGTERM to one ends; then one, to the end."""
    job, replay = alone / "job", f"--replay={alone / 'sampled'}"
    four = start(job, 4, replay)
    reaches(job, 3, four)
    try:
        stop_in_an_update(job, 2, (0, 1, 3))
    except BaseException:
        end(four)
        raise
    victim = sign(job, 2)
    os.kill(victim["pid"], signal.SIGKILL)
    killed = time.monotonic()
    code, said = finish(four)
    assert time.monotonic() - killed < 60 and code == 75, said
    told = "(process 2 of 4) gave no sign of life for "
    assert f"error: host {victim['host']} {told}" in said and "the last checkpoint stays; start again with" in said
    assert "process 2 ended with code 137" in said
    for process in (1, 3):
        assert told in (job / "hosts" / "logs" / f"{process}.log").read_text()
    kept = steps(job / "checkpoints")[-1]
    assert 3 <= kept <= STEPS - 3, "its next three updates are compared below"

    two = start(job, 2, replay)
    reaches(job, kept + 3, two)
    with suppress(ProcessLookupError):  # it may have been at its end
        os.kill(sign(job, 1)["pid"], signal.SIGTERM)  # one of them alone
    code, said = finish(two)
    assert code in (0, 75), said  # it may have been at its end
    assert f"resumed {job} after step {kept} of {STEPS}" in said
    if code == 75:
        assert said.count("stopped and saved") >= 1
        code, said = finish(start(job, 1, replay))
        assert code == 0, said
    for step in range(STEPS + 1):
        assert largest_difference(job, alone / "alone", step) < 1e-5, step
    rows = [json.loads(line)["step"] for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(STEPS + 1)), "every step is recorded once, by one process"


@pytest.mark.slow
def test_two_processes_sample_what_one_does(alone):
    """Prompts by their global index, noise by prompt: the same rollouts on another number of processes."""
    code, said = finish(start(alone / "pair", 2, "--config.rollout.save=true", "--config.steps=2"))
    assert code == 0, said
    names = sorted(f.name for f in (alone / "pair" / "rollouts").iterdir())
    assert len(names) == 2
    for name in names:
        pair, one = (np.load(alone / run / "rollouts" / name) for run in ("pair", "sampled"))
        assert set(pair) == set(one)
        for key in pair:
            if pair[key].dtype.kind == "f":
                np.testing.assert_allclose(pair[key], one[key], rtol=0, atol=2e-5, err_msg=key)
            else:
                np.testing.assert_array_equal(pair[key], one[key], key)


@pytest.mark.slow
def test_a_job_that_loses_its_first_process_ends_and_says_so(alone):
    """JAX aborts the others at once, whatever our watchdog would say: the script tells why, and starts them again."""
    job = alone / "headless"
    two = start(job, 2, f"--replay={alone / 'sampled'}", "--config.steps=3", RESTARTS="1")
    reaches(job, 1, two)
    os.kill(sign(job, 0)["pid"], signal.SIGKILL)
    code, said = finish(two)
    assert code == 0 and "process 0 ended with code 137" in said, said
    assert "process 1 ended with code 134 (aborted by JAX: the first process, which all need, is gone)" in said
    assert "starting all 2 processes again from the last checkpoint, 0 further times at the most" in said
    assert f"resumed {job} after step " in said
    assert largest_difference(job, alone / "alone", 3) < 1e-5


def by_hand(folder: Path, devices: tuple[int, ...], *flags: str) -> list[subprocess.Popen]:
    """The processes of a job, one for each number of devices, each in a folder of its own that has the configs."""
    port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
    command = (sys.executable, "-m", "experiments.train_rl", f"--config={ROOT / FLAGS[1]}", *flags)
    own = {"M1JAX_PROCESSES": str(len(devices)), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    jobs = []
    for process, count in enumerate(devices):
        here = folder / f"host{process}"
        here.mkdir()
        (here / "configs").symlink_to(ROOT / "configs")
        more = {"M1JAX_PROCESS": str(process), "JAX_NUM_CPU_DEVICES": str(count), "PYTHONPATH": str(ROOT)}
        jobs.append(subprocess.Popen(command, cwd=here, env=os.environ | own | more, stderr=subprocess.PIPE, text=True))
    return jobs


def all_ended(jobs: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit code and complaints of each."""
    try:
        said = [job.communicate(timeout=seconds)[1] for job in jobs]
        return [(job.returncode, text) for job, text in zip(jobs, said, strict=True)]
    finally:
        for job in jobs:
            job.kill()


@pytest.mark.slow
def test_what_one_host_lacks_ends_all_with_its_name(tmp_path, alone):
    """A checkpoint that one of two hosts does not see: neither goes on, nor waits."""
    jobs = by_hand(tmp_path, (1, 1), "--init_from=start", f"--workdir={tmp_path / 'job'}", "--config.steps=1")
    (tmp_path / "host0" / "start").symlink_to(alone / "alone")  # long before it is asked for
    lacks = "start: no such folder"
    first, second = all_ended(jobs)
    assert first[0] == second[0] == 2, (first, second)
    assert f"error: host {socket.gethostname()} (process 1): {lacks}" in first[1] and f"error: {lacks}" in second[1]


@pytest.mark.slow
def test_hosts_with_other_numbers_of_devices_are_refused(tmp_path):
    for code, said in all_ended(by_hand(tmp_path, (1, 2), f"--workdir={tmp_path / 'job'}")):
        assert code == 2 and "needs as many devices, and process 0 has 1, process 1 has 2; give all as many" in said


@pytest.mark.slow
def test_a_host_that_is_lost_while_all_load_ends_the_job_as_later(tmp_path, alone):
    """Before the first step: the weights to start from are a pipe, which nobody fills."""
    start, job = tmp_path / "start", tmp_path / "job"
    (start / "checkpoints" / "00000000").mkdir(parents=True)
    os.mkfifo(start / "checkpoints" / "00000000" / "manifest.json")
    flags = f"--init_from={start}", f"--workdir={job}", "--config.hosts.lost_s=5"
    jobs = by_hand(tmp_path, (1, 1), *flags)
    deadline = time.monotonic() + 120
    while not all((job / "hosts" / f"{n:05d}.json").exists() for n in (0, 1)):
        assert time.monotonic() < deadline and all(j.poll() is None for j in jobs)
        time.sleep(0.1)
    os.kill(jobs[1].pid, signal.SIGKILL)
    code, said = all_ended(jobs)[0]
    assert code == 75 and "(process 1 of 2) gave no sign of life for " in said and "in starting of step 0" in said, said


@pytest.mark.slow
def test_one_of_two_processes_asks_the_servers_and_gives_them_the_weights(tmp_path):
    with Double(vocab_size=512) as server:
        job = start(tmp_path / "job", 2, f"--config.servers.urls=('{server.url}',)", "--config.steps=2",
                    "--config.servers.patience_s=60", "--config.mesh.data=1", "--config.mesh.fsdp=2")  # fmt: skip
        code, said = finish(job)
        assert code == 0, said
        asked = [r for r in server.received if r.path == "/generate" and "extra_key" in r.body]
        given = [r.body["weight_version"] for r in server.received if r.path == "/update_weights_from_disk"]
    assert [label[:8] for label in given] == ["00000000", "00000001", "00000002"], "once each, by the first"
    assert len(asked) >= 2 * 16 and {r.body["extra_key"] for r in asked} == set(given)
    rows = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[1]["engine/requests"] >= 16
    # What the servers were given are the parameters of both processes, joined.
    stored = StoredLeaves(tmp_path / "job" / "checkpoints" / "00000002" / "state").read(("embedding",))
    served = HFFolder(next((tmp_path / "job" / "weights").glob("00000002-*")))
    np.testing.assert_array_equal(served.read("model.embed_tokens.weight"), stored)


@pytest.mark.slow
def test_a_mistake_of_the_users_ends_all_of_them_with_one_line(tmp_path):
    code, said = finish(start(tmp_path / "job", 2, "--config.update.micro_batch_rows=1"))
    assert code == 2 and "config.update.micro_batch_rows: 1 rows cannot be dealt out to 2 devices; choose 2" in said


@pytest.mark.slow
def test_a_signal_to_another_process_is_seen_while_the_first_waits_for_servers(tmp_path):
    """Its answers may take hours: all save and end with what they have, whichever of them is asked to stop."""
    with Double(vocab_size=512) as server:
        flags = f"--config.servers.urls=('{server.url}',)", "--config.servers.stall_s=600", "--config.steps=2"
        job = start(tmp_path / "job", 2, *flags)
        deadline = time.monotonic() + 200
        while not server.injected["stuck"]:
            if any(r.path == "/generate" and "extra_key" in r.body for r in server.received):  # a prompt of the run
                server.faults(1.0, ("stuck",))
            assert job.poll() is None, job.communicate()[0]
            if time.monotonic() > deadline:
                end(job)
                raise AssertionError("no prompt was asked")
            time.sleep(0.05)
        os.kill(sign(tmp_path / "job", 1)["pid"], signal.SIGTERM)
        code, said = finish(job, 60)
    assert code == 75 and "stopped and saved" in said, said
