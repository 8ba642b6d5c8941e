"""The scripts of launch/: what they would start, and what they do under a scheduler, for which stubs stand in."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p.name for p in (ROOT / "launch").glob("*.sh"))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_run_and_tells_how(script):
    assert os.access(ROOT / "launch" / script, os.X_OK)
    done = run(f"launch/{script}")
    assert done.returncode == 2 and f"launch/{script} " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("PROCESSES", "0", "write how many, 1 or more"), ("RESTARTS", "many", "write how often, 0 or more")],
)
def test_what_is_no_number_is_refused(name, value, said):
    done = run("launch/local.sh", "train_rl", "configs/c.py", "w", **{"VENV": "/none", name: value})
    assert done.returncode == 2 and f"{name}={value}: {said}" in done.stderr


def test_no_line_of_a_script_is_wider_than_a_screen():
    wide = [
        f"{file.name}:{number}"
        for file in (ROOT / "launch").iterdir()
        if file.suffix in (".sh", ".yaml")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not wide


@pytest.mark.parametrize(("codes", "code"), [("75 2 75", 2), ("1 75 75", 1), ("137 75 75", 75), ("0 137 0", 137)])
def test_the_code_of_a_job_is_that_of_what_has_to_be_mended(tmp_path, codes, code):
    """A process that a user has to help, and those that lost it; nothing of it is started again."""
    stub(
        tmp_path / "bin",
        "python",
        f'[ "$1" = -c ] && echo 1 && exit; codes=({codes}); exit "${{codes[$M1JAX_PROCESS]}}"',
    )
    done = run(
        "launch/local.sh", "train_rl", "configs/c.py", str(tmp_path / "w"), PROCESSES="3", VENV=str(tmp_path),
        RESTARTS="1" if code in (1, 2) else "0",
    )  # fmt: skip
    assert done.returncode == code and "starting all" not in done.stderr


def test_a_dry_run_on_this_machine_prints_every_process(tmp_path):
    folder = tmp_path / "a run"
    done = run(
        "launch/local.sh", "--dry_run", "train_rl", "configs/c.py", str(folder), "--config.seed=1", PROCESSES="3"
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3 and not folder.exists()
    for number, line in enumerate(lines):
        assert f"'M1JAX_PROCESSES=3' 'M1JAX_PROCESS={number}' " in line
        assert "'JAX_COORDINATOR_ADDRESS=127.0.0.1:" in line
        assert f"'-m' 'experiments.train_rl' '--config=configs/c.py' '--workdir={folder}' '--config.seed=1'" in line
        assert f"hosts/logs/{number}.log'" in line
    alone = run("launch/local.sh", "--dry_run", "train_rl", "configs/c.py", str(folder), PROCESSES="1")
    assert "M1JAX_PROCESSES" not in alone.stdout and len(alone.stdout.splitlines()) == 1


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_dry_run_prints_what_a_run_on_this_machine_starts(tmp_path, platform, processes):
    """The printed lines, run by a shell, start the same: variables, flags and logs."""
    stub(tmp_path / "bin", "python", f"""{{ env | grep -E '^(JAX|M1JAX)'; printf '<%s>' "$@"; echo; }} |
sort >"{tmp_path}/started-${{M1JAX_PROCESS:-alone}}"; echo said""")  # fmt: skip
    folder = tmp_path / "a > b"
    asked = ("train_rl", "configs/c.py", str(folder), "--config.name=it's")
    environment = {"PROCESSES": processes, "PLATFORM": platform, "PORT": "1", "VENV": str(tmp_path)}
    assert run("launch/local.sh", *asked, **environment).returncode == 0
    started = {file.name: file.read_text() for file in tmp_path.glob("started-*")}
    assert len(started) == int(processes)
    assert ("JAX_LOCAL_DEVICE_IDS=1\n" in started.get("started-1", "")) == (platform == "cuda" and processes == "2")
    for file in tmp_path.glob("started-*"):
        file.unlink()
    for line in run("launch/local.sh", "--dry_run", *asked, **environment).stdout.splitlines():
        assert run("bash", "-c", line).returncode == 0
    assert {file.name: file.read_text() for file in tmp_path.glob("started-*")} == started
    if processes == "2":
        assert (folder / "hosts" / "logs" / "1.log").read_text() == "said\nsaid\n"


def test_one_process_is_started_again_too(tmp_path):
    """On the terminal, without a log, and with its own exit code."""
    again = tmp_path / "again"
    stub(tmp_path / "bin", "python", f"""[ "$1" = -c ] && echo 1 && exit
echo "out ${{M1JAX_PROCESSES:-alone}}"; echo err >&2
[ ! -e {again} ] || exit 3; touch {again}; exit 75""")  # fmt: skip
    asked = ("launch/local.sh", "train_rl", "configs/c.py", str(tmp_path / "w"))
    done = run(*asked, VENV=str(tmp_path), RESTARTS="1")
    assert done.returncode == 3 and done.stdout == "out alone\n" * 2 and not (tmp_path / "w").exists()
    assert done.stderr == "err\nstarting again from the last checkpoint, 0 further times at the most\nerr\n"
    again.unlink()
    done = run(*asked, VENV=str(tmp_path))
    assert done.returncode == 75 and done.stdout == "out alone\n" and done.stderr == "err\n"


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"{folder}/calls"\n{body}\n')
    file.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of three nodes whose steps do nothing; the trainer's exits with $CODE."""
    folder = tmp_path / "bin"
    stub(folder, "sbatch", "")
    started = f'grep -qs "^srun .*sglang.sh" "{folder}/calls" || exit 1'  # it is healthy when it is there
    stub(folder, "curl", f"{started}; exit ${{HEALTHY:-0}}")
    stub(folder, "sleep", "exec /bin/sleep 0.1")
    stub(folder, "scontrol", '[ "$1" = requeue ] || printf "n1\\nn2\\nn3\\n"')
    stub(folder, "srun", 'case "$*" in *sglang.sh*) exec /bin/sleep 60 ;; esac; exit ${CODE:-0}')
    return folder, {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_ID": "7", "NODES": "2", "GPUS": "4",
    }  # fmt: skip


def calls(folder: Path, name: str) -> list[str]:
    if not (folder / "calls").exists():
        return []
    return [line for line in (folder / "calls").read_text().splitlines() if line.startswith(f"{name} ")]


@contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A script that runs beside the test, in a session of its own, which ends with the test."""
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as job:  # fmt: skip
        try:
            yield job
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


LASTS = "for _ in $(seq 300); do /bin/sleep 0.1; done"
"""What a stub does that goes on until it gets a signal: not for ever, should the test fail."""


def test_slurm_submits_itself_and_a_dry_run_nothing(tmp_path, slurm):
    folder, environment = slurm
    asked = ("train_rl", "configs/c.py", str(tmp_path / "w"), "--config.seed=1")
    dry = run("launch/slurm.sh", "--dry_run", *asked, **environment)
    assert dry.returncode == 0 and not (folder / "calls").exists() and not (tmp_path / "w").exists()
    assert "'--nodelist=NODE1,NODE2' '--nodes=2' '--ntasks=8' '--ntasks-per-node=4'" in dry.stdout
    assert run("launch/slurm.sh", *asked, **environment).returncode == 0
    (call,) = calls(folder, "sbatch")
    assert "--nodes=2 --exclusive --gpus-per-node=4" in call
    assert "--signal=B:TERM@300 --requeue" in call, "SIGTERM to the script alone, which passes it on to the trainer"
    assert call.endswith(f"launch/slurm.sh --job {' '.join(asked)}")
    assert "NODES" in run("launch/slurm.sh", *asked, **environment | {"NODES": ""}).stderr
    assert "RESTARTS=x: write how often" in run("launch/slurm.sh", *asked, **environment | {"RESTARTS": "x"}).stderr


def test_a_dry_run_of_slurm_prints_what_is_submitted_and_what_the_job_starts(tmp_path, slurm):
    """But for the names of the nodes, which Slurm gives."""
    folder, environment = slurm
    variables = 'echo "$PLATFORM $HOST $M1JAX_PROCESSES $JAX_PLATFORMS" >>"$(dirname "$0")/calls"'
    stub(folder, "srun", f'{variables}; case "$*" in *sglang.sh*) exec /bin/sleep 60 ;; esac')
    stub(folder, "scontrol", 'printf "NODE1\\nNODE2\\nNODE3\\n"')
    stub(folder, "curl", f"grep -q '^cuda 0.0.0.0' {folder}/calls")  # healthy as soon as its server is recorded
    environment |= {"SERVERS": "1", "MODEL": "/a model", "SERVER_FLAGS": "--tp-size 4"}
    asked = ("train_rl", "configs/c.py", str(tmp_path / "a > b"), "--config.name=it's")
    assert run("launch/slurm.sh", *asked, **environment).returncode == 0
    assert run("launch/slurm.sh", "--job", *asked, **environment).returncode == 0

    def recorded() -> list[str]:
        lines = (folder / "calls").read_text().splitlines()
        (folder / "calls").unlink()
        return [line for line in lines if not line.startswith(("curl", "scontrol", "sleep"))]

    true = recorded()
    stub(folder, "srun", variables)
    for line in run("launch/slurm.sh", "--dry_run", *asked, **environment).stdout.splitlines():
        assert run("bash", "-c", line, **environment).returncode == 0
    assert recorded() == true and len(true) == 5


def test_sigterm_of_slurm_goes_to_the_step_of_the_trainer(tmp_path, slurm):
    """Not to srun, which makes a SIGKILL of it, and not to the servers; the job is requeued."""
    folder, environment = slurm
    environment |= {"SERVERS": "1", "MODEL": "/shared/m"}
    stub(folder, "srun", f"""case "$*" in *sglang.sh*) exec /bin/sleep 60 ;; esac
trap 'echo "killed by srun" >>{folder}/calls; exit 137' TERM
echo "up" >>{folder}/calls
for _ in $(seq 300); do [ ! -e {folder}/saved ] || exit 75; /bin/sleep 0.1; done""")  # fmt: skip
    # At first Slurm does not know the trainer's step.
    stub(folder, "squeue", f"""echo "7.batch batch"; echo "7.0 servers"
[ ! -e {folder}/known ] || echo "7.1 trainer"; touch {folder}/known""")  # fmt: skip
    stub(folder, "scancel", f"touch {folder}/saved")
    asked = ("launch/slurm.sh", "--job", "train_rl", "configs/c.py", str(tmp_path / "w"))
    with running(*asked, **environment) as job:
        wait_for(lambda: (folder / "calls").exists() and "\nup\n" in (folder / "calls").read_text())
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=30)
    assert job.returncode == 75, said
    assert calls(folder, "scancel") == ["scancel --signal=TERM 7.1"] and not calls(folder, "killed")
    assert "scontrol requeue 7" in calls(folder, "scontrol")
    assert calls(folder, "squeue") == 2 * ["squeue --noheader --steps --jobs=7 --format=%i %j"]


def test_sigterm_of_slurm_while_servers_start_requeues_the_job(tmp_path, slurm):
    folder, environment = slurm
    environment |= {"SERVERS": "1", "MODEL": "/shared/m", "HEALTHY": "1"}
    with running("launch/slurm.sh", "--job", "train_rl", "configs/c.py", str(tmp_path / "w"), **environment) as job:
        wait_for(lambda: calls(folder, "curl"))
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=30)
    assert job.returncode == 75 and "scontrol requeue 7" in calls(folder, "scontrol"), said
    assert not [call for call in calls(folder, "srun") if "train_rl" in call]


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, "0", False), (2, "0", False), (75, "0", True), (137, "0", True), (75, "9", False)],
)
def test_slurm_requeues_what_asks_for_it(tmp_path, slurm, code, restarts, again):
    folder, environment = slurm
    environment |= {"CODE": str(code), "SLURM_RESTART_COUNT": restarts, "RESTARTS": "9"}
    done = run("launch/slurm.sh", "--job", "train_rl", "configs/c.py", str(tmp_path / "w"), **environment)
    assert done.returncode == code, done.stderr
    assert ("scontrol requeue 7" in calls(folder, "scontrol")) == again
    (step,) = calls(folder, "srun")
    assert "--nodelist=n1,n2 --nodes=2 --ntasks=8" in step and "--config=configs/c.py" in step


def test_slurm_waits_for_servers_and_ends_them(tmp_path, slurm):
    folder, environment = slurm
    environment |= {"SERVERS": "1", "MODEL": "/shared/m", "SERVER_FLAGS": "--tp-size 4"}
    done = run("launch/slurm.sh", "--job", "train_rl", "configs/c.py", str(tmp_path / "w"), **environment)
    assert done.returncode == 0, done.stderr
    server, trainer = sorted(calls(folder, "srun"), key=lambda call: "sglang.sh" not in call)
    assert "--nodelist=n3 --nodes=1" in server and server.endswith("launch/sglang.sh /shared/m 30000 --tp-size 4")
    assert "--nodelist=n1,n2" in trainer and trainer.endswith("--config.servers.urls=('http://n3:30000',)")
    assert calls(folder, "curl")[-1].endswith("http://n3:30000/health")
    sick = run(
        "launch/slurm.sh", "--job", "train_rl", "configs/c.py", str(tmp_path / "w"),
        **environment | {"HEALTHY": "1", "HEALTH": "0"},
    )  # fmt: skip
    assert sick.returncode == 2 and "the rollout server on n3 is not healthy" in sick.stderr
    assert len([call for call in calls(folder, "srun") if "train_rl" in call]) == 1, "no trainer without servers"


def test_tpu_vms_get_one_command_and_only_ours_is_stopped(tmp_path):
    folder = tmp_path / "bin"
    once = 'case "$*" in *"rm -f"*) exit 0 ;; esac; test -e "$(dirname "$0")/again" && exit 0'
    stub(folder, "gcloud", f'{once}; touch "$(dirname "$0")/again"; exit 75')
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    asked = ("slice", "zone", "train_rl", "configs/c.py", "w w")
    dry = run("launch/tpu_vm.sh", "--dry_run", *asked, **environment)
    assert dry.returncode == 0 and not (folder / "calls").exists() and "M1JAX_PROCESSES=auto" in dry.stdout
    done = run("launch/tpu_vm.sh", *asked, **environment)
    assert done.returncode == 0 and "starting again from the last checkpoint, 99 further times" in done.stderr
    forgot, *starts = calls(folder, "gcloud")
    assert forgot.endswith("--command=rm -f ~/.m1jax-slice.pid.stop"), "once: a --stop between two starts is seen"
    assert len(starts) == 2 and all("tpu-vm ssh slice --zone=zone --worker=all" in call for call in starts)
    (folder / "calls").unlink()
    for line in dry.stdout.splitlines():
        assert run("bash", "-c", line, **environment).returncode == 0
    assert calls(folder, "gcloud") == [forgot, starts[0]], "a dry run prints what starts"
    (folder / "calls").unlink()
    # What the remote command makes of 75 where --stop was there.
    stub(folder, "gcloud", 'case "$*" in *"rm -f"*) exit 0 ;; esac; exit 143')
    assert run("launch/tpu_vm.sh", *asked, **environment).returncode == 143
    assert len(calls(folder, "gcloud")) == 2, "what was asked to stop is not started again"
    assert "is not a number" in run("launch/tpu_vm.sh", *asked, **environment | {"RESTARTS": "x"}).stderr


REMOTE = 'while [ $# -gt 1 ]; do shift; done; cd "$HOME" && eval "${1#--command=}"'
"""A gcloud that runs here what each host would run."""


@pytest.fixture
def host(tmp_path):
    folder, home = tmp_path / "bin", tmp_path / "home"
    (home / "m1jax").mkdir(parents=True)
    stub(folder, "gcloud", REMOTE)
    stub(folder, "curl", 'test "$SICK" != "${!#}"')
    stub(folder, "python", "")
    return folder, home, {
        "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(home), "VENV": str(tmp_path), "SICK": "",
    }  # fmt: skip


def tpu_vm(tmp_path: Path, *flags: str) -> tuple[str, ...]:
    return ("launch/tpu_vm.sh", "slice", "zone", "train_rl", "configs/c.py", str(tmp_path / "w w"), *flags)


def trains(folder: Path) -> str:
    """A trainer for a stub that saves when it gets SIGTERM; a second one is done at once."""
    return f"""echo "up $$" >>{folder}/calls; [ $(grep -c ^up {folder}/calls) = 1 ] || exit 0
trap '/bin/sleep 0.5; echo "saved" >>{folder}/calls; exit 75' TERM; {LASTS}"""


def test_a_host_that_lost_its_connection_does_not_train_twice(tmp_path, host):
    """What is left there saves first, then the next one starts."""
    folder, home, environment = host
    stub(folder, "python", trains(folder))
    # ssh goes away, and what it started stays
    stub(folder, "gcloud", f"""case "$*" in *"rm -f"* | *touch*) ;; *)
if [ ! -e {folder}/lost ]; then touch {folder}/lost
( {REMOTE} ) >/dev/null 2>&1 & for _ in $(seq 300); do ! grep -q ^up {folder}/calls || exit 255; /bin/sleep 0.1; done
fi ;; esac; {REMOTE}""")  # fmt: skip
    with running(*tpu_vm(tmp_path), **environment) as job:
        _, said = job.communicate(timeout=60)
    assert job.returncode == 0 and "starting again" in said, said
    happened = [x.split()[0] for x in (folder / "calls").read_text().splitlines() if x.startswith(("up", "saved"))]
    assert happened == ["up", "saved", "up"]


def test_what_does_not_save_in_time_is_ended(tmp_path, host):
    folder, home, environment = host
    stub(folder, "python", f"""echo "up $$" >>{folder}/calls; [ $(grep -c ^up {folder}/calls) = 1 ] || exit 0
trap '' TERM; {LASTS}""")  # fmt: skip
    with running(*tpu_vm(tmp_path), **environment) as first:
        wait_for(lambda: calls(folder, "up"))
        assert run(*tpu_vm(tmp_path), **environment | {"GRACE": "1"}).returncode == 0
        _, said = first.communicate(timeout=30)
    assert first.returncode == 143 and "starting again" not in said, "it gave way to the other"
    assert len(calls(folder, "up")) == 2


def test_a_slice_is_stopped_while_it_trains(tmp_path, host):
    folder, home, environment = host
    stub(folder, "python", trains(folder))
    with running(*tpu_vm(tmp_path), **environment) as job:
        wait_for(lambda: calls(folder, "up"))
        wait_for(lambda: "experiments" in Path("/proc", calls(folder, "up")[0].split()[1], "cmdline").read_text())
        assert run("launch/tpu_vm.sh", "--stop", "slice", "zone", **environment).returncode == 0
        _, said = job.communicate(timeout=30)
    assert job.returncode == 143 and "starting again" not in said, said
    assert len(calls(folder, "up")) == 1 and (folder / "calls").read_text().endswith("saved\n")
    (home / ".m1jax-slice.pid").write_text(f"{os.getpid()}\n")
    assert "experiments" not in Path("/proc/self/cmdline").read_text()
    assert run("launch/tpu_vm.sh", "--stop", "slice", "zone", **environment).returncode == 0, "and the test is not ours"


def test_a_slice_is_stopped_while_it_waits_for_servers(tmp_path, host):
    folder, home, environment = host
    environment |= {"SERVERS": "http://a:1"}
    stub(folder, "sleep", "exec /bin/sleep 0.1")
    stub(folder, "curl", f"test -e {folder}/healthy")
    with running(*tpu_vm(tmp_path), **environment) as job:
        wait_for(lambda: calls(folder, "curl"))
        assert run("launch/tpu_vm.sh", "--stop", "slice", "zone", **environment).returncode == 0
        (folder / "healthy").touch()
        _, said = job.communicate(timeout=30)
    assert job.returncode == 143 and not calls(folder, "python"), said


def test_a_stop_between_two_starts_is_seen(tmp_path, host):
    folder, home, environment = host
    stub(folder, "python", "exit 75")
    stub(folder, "gcloud", f"""( {REMOTE} ); code=$?
[ $code != 75 ] || launch/tpu_vm.sh --stop slice zone; exit $code""")  # fmt: skip
    done = run(*tpu_vm(tmp_path), **environment)
    assert done.returncode == 143 and "starting again" in done.stderr and len(calls(folder, "python")) == 1


def test_hosts_of_a_slice_wait_for_the_servers(tmp_path, host):
    """Nothing starts before the servers are healthy, nor is it tried again."""
    folder, home, environment = host
    environment |= {"SERVERS": "http://a:1 http://b:2", "HEALTH": "0"}
    asked = tpu_vm(tmp_path, "--config.seed=1")
    sick = run(*asked, **environment | {"SICK": "http://b:2/health"})
    assert sick.returncode == 2 and "the rollout server http://b:2 is not healthy" in sick.stderr, sick.stderr
    assert not calls(folder, "python") and len(calls(folder, "gcloud")) == 2
    assert run(*asked, **environment).returncode == 0
    (call,) = calls(folder, "python")
    assert call.endswith(
        f"--workdir={tmp_path / 'w w'} --config.seed=1 --config.servers.urls=('http://a:1','http://b:2',)"
    )
    assert sorted(x.split()[-1] for x in calls(folder, "curl")) == sorted(
        2 * ["http://a:1/health", "http://b:2/health"]
    )


@pytest.mark.parametrize("processes", [1, 3])
def test_a_signal_to_the_script_comes_to_every_process_once(tmp_path, processes):
    """And no process is left behind, nor the job started again."""
    folder = tmp_path / "bin"
    stub(
        folder,
        "python",
        f"""[ "$1" = -c ] && echo 1 && exit
me=${{M1JAX_PROCESS:-0}}
trap "echo got $me >>{folder}/calls; exit 75" TERM; echo "up $me" >>{folder}/calls; {LASTS}""",
    )
    asked = ("launch/local.sh", "train_rl", "configs/c.py", str(tmp_path / "w"))
    with running(*asked, PROCESSES=str(processes), VENV=str(tmp_path), RESTARTS="1") as job:
        wait_for(lambda: len(calls(folder, "up")) == processes)
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=20)
    assert job.returncode == 75 and "starting" not in said
    assert sorted(calls(folder, "got")) == [f"got {number}" for number in range(processes)]


def test_a_signal_while_processes_are_started_comes_to_all_of_them(tmp_path):
    """From the first of many, which is up before the last is there."""
    folder = tmp_path / "bin"
    stub(folder, "python", f"""trap 'echo "got $M1JAX_PROCESS" >>{folder}/calls; exit 75' TERM
[ "$M1JAX_PROCESS" != 0 ] || kill -TERM $PPID; {LASTS}""")  # fmt: skip
    asked = ("launch/local.sh", "train_rl", "configs/c.py", str(tmp_path / "w"))
    with running(*asked, PROCESSES="30", PORT="1", VENV=str(tmp_path), RESTARTS="1") as job:
        _, said = job.communicate(timeout=25)
    assert job.returncode in (75, 143) and "starting" not in said  # 143: it came before a process had asked for it
    got = calls(folder, "got")
    assert "got 0" in got and len(set(got)) == len(got)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_signal_before_processes_are_started_starts_none(tmp_path, name, code, restarts):
    """At the first start, and between two, while a port is looked for."""
    folder = tmp_path / "bin"
    stub(folder, "python", f"""[ "$1" = -c ] || {{ echo up >>{folder}/calls; exit 75; }}
[ $(grep -c "python -c" {folder}/calls) -gt {restarts} ] || {{ echo 1; exit; }}
touch {folder}/asks; for _ in $(seq 300); do [ ! -e {folder}/go ] || break; /bin/sleep 0.1; done
echo 1""")  # fmt: skip
    asked = ("launch/local.sh", "train_rl", "configs/c.py", str(tmp_path / "w"))
    with running(*asked, PROCESSES="2", VENV=str(tmp_path), RESTARTS="9") as job:
        wait_for((folder / "asks").exists)
        job.send_signal(getattr(signal, name))
        (folder / "go").touch()
        _, said = job.communicate(timeout=20)
    assert job.returncode == code, said
    assert (folder / "calls").read_text().splitlines().count("up") == 2 * restarts


def test_the_job_set_is_what_its_head_says():
    """Filled in as the head does it, it is YAML without a variable of ours, and with those of its shell commands."""
    text = (ROOT / "launch" / "gke.yaml").read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    words = [word for x in head.splitlines() if "export " in x for word in shlex.split(x.partition("export ")[2])]
    exported = dict(word.split("=", 1) for word in words)
    names = re.findall(r"\$(\w+)", head.partition("envsubst")[2].partition("<")[0])
    assert sorted(exported) == sorted(names)
    body = text[len(head) :]
    assert set(re.findall(r"\$\{(\w+)\}", body)) == set(names)
    for name, value in sorted(exported.items(), key=lambda item: -len(item[0])):
        body = re.sub(rf"\$(\{{{name}\}}|{name}\b)", value, body)
    jobs = yaml.safe_load(body)["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == ["trainer", "rollout"] and jobs[1]["replicas"] == 16
    trainer = jobs[0]["template"]["spec"]
    assert trainer["parallelism"] == trainer["completions"] == 128 and trainer["backoffLimit"] == 0
    (container,) = trainer["template"]["spec"]["containers"]
    assert "--config.servers.urls=" in container["command"][2] and "$urls" in container["command"][2]
    assert {"name": "M1JAX_PROCESSES", "value": "auto"} in container["env"]
    assert {"name": "FLAGS", "value": "--init_from=/shared/m1"} in container["env"]
    (gate,) = trainer["template"]["spec"]["initContainers"]
    assert "http://rl-rollout-$i-0.rl:30000/health" in gate["command"][2]
    (server,) = jobs[1]["template"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "SERVER_FLAGS", "value": "--tp-size 8 --context-length 45056"} in server["env"]
    assert {"name": "MODEL", "value": "/shared/MiniMax-M1-40k"} in server["env"]
    for script in (container["command"][2], gate["command"][2], server["command"][2]):
        assert run("bash", "-n", "-c", script).returncode == 0
    config = (ROOT / "configs" / "rl_m1_sglang.py").read_text()  # the same folders, flags and seconds as by hand
    for value in (exported["MODEL"], exported["SERVER_FLAGS"], exported["FLAGS"], exported["READY_SECONDS"]):
        assert value in config, value
