"""The scripts of launch/: what they would start, and what they do under a scheduler, for which stubs stand in."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
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


def test_no_process_is_refused():
    done = run("launch/local.sh", "train_rl", "configs/c.py", "w", PROCESSES="0")
    assert done.returncode == 2 and "PROCESSES=0: write how many, 1 or more" in done.stderr


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
        assert f"M1JAX_PROCESSES=3 M1JAX_PROCESS={number} " in line and "JAX_COORDINATOR_ADDRESS=127.0.0.1:" in line
        assert f"'-m' 'experiments.train_rl' '--config=configs/c.py' '--workdir={folder}' '--config.seed=1'" in line
        assert line.endswith(f"hosts/logs/{number}.log")
    alone = run("launch/local.sh", "--dry_run", "train_rl", "configs/c.py", str(folder), PROCESSES="1")
    assert "M1JAX_PROCESSES" not in alone.stdout and len(alone.stdout.splitlines()) == 1


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
    stub(folder, "curl", "exit ${HEALTHY:-0}")
    stub(folder, "sleep", "exec /bin/sleep 0.1")
    stub(folder, "scontrol", '[ "$1" = requeue ] || printf "n1\\nn2\\nn3\\n"')
    stub(folder, "srun", 'case "$*" in *sglang.sh*) exec /bin/sleep 60 ;; esac; exit ${CODE:-0}')
    return folder, {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_ID": "7", "NODES": "2", "GPUS": "4",
    }  # fmt: skip


def calls(folder: Path, name: str) -> list[str]:
    return [line for line in (folder / "calls").read_text().splitlines() if line.startswith(f"{name} ")]


def test_slurm_submits_itself_and_a_dry_run_nothing(tmp_path, slurm):
    folder, environment = slurm
    asked = ("train_rl", "configs/c.py", str(tmp_path / "w"), "--config.seed=1")
    dry = run("launch/slurm.sh", "--dry_run", *asked, **environment)
    assert dry.returncode == 0 and not (folder / "calls").exists() and not (tmp_path / "w").exists()
    assert "'--nodes=2' '--ntasks=8' '--ntasks-per-node=4'" in dry.stdout and "'experiments.train_rl'" in dry.stdout
    assert run("launch/slurm.sh", *asked, **environment).returncode == 0
    (call,) = calls(folder, "sbatch")
    assert "--nodes=2 --exclusive --gpus-per-node=4" in call and "--signal=B:TERM@300 --requeue" in call
    assert call.endswith(f"launch/slurm.sh --job {' '.join(asked)}")
    assert "NODES" in run("launch/slurm.sh", *asked, **environment | {"NODES": ""}).stderr


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
    stub(folder, "gcloud", 'test -e "$(dirname "$0")/again" && exit 0; touch "$(dirname "$0")/again"; exit 75')
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    asked = ("slice", "zone", "train_rl", "configs/c.py", "w w")
    dry = run("launch/tpu_vm.sh", "--dry_run", *asked, **environment)
    assert dry.returncode == 0 and not (folder / "calls").exists() and "M1JAX_PROCESSES=auto" in dry.stdout
    done = run("launch/tpu_vm.sh", *asked, **environment)
    assert done.returncode == 0 and "starting again from the last checkpoint, 99 further times" in done.stderr
    started = calls(folder, "gcloud")
    assert len(started) == 2 and all("tpu-vm ssh slice --zone=zone --worker=all" in call for call in started)
    (folder / "again").unlink()
    stub(
        folder, "gcloud", 'case "$*" in *touch*) exit 0 ;; esac; exit 143'
    )  # what the remote command makes of 75 where --stop was there
    assert run("launch/tpu_vm.sh", *asked, **environment).returncode == 143
    assert len(calls(folder, "gcloud")) == 3, "what was asked to stop is not started again"
    assert run("launch/tpu_vm.sh", "--stop", "slice", "zone", **environment).returncode == 0
    assert "grep -q experiments /proc/$pid/cmdline" in (folder / "calls").read_text()


def test_hosts_of_a_slice_wait_for_the_servers(tmp_path):
    """What each host would run, run here: nothing starts before the servers are healthy, nor is it tried again."""
    folder, home = tmp_path / "bin", tmp_path / "home"
    (home / "m1jax").mkdir(parents=True)
    stub(folder, "gcloud", 'while [ $# -gt 1 ]; do shift; done; cd "$HOME" && eval "${1#--command=}"')
    stub(folder, "curl", 'test "$SICK" != "${!#}"')
    stub(folder, "python", "")
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(home), "VENV": str(tmp_path), "HEALTH": "0", "SICK": "",
        "SERVERS": "http://a:1 http://b:2",
    }  # fmt: skip
    asked = ("launch/tpu_vm.sh", "slice", "zone", "train_rl", "configs/c.py", str(tmp_path / "w w"), "--config.seed=1")
    sick = run(*asked, **environment | {"SICK": "http://b:2/health"})
    assert sick.returncode == 2 and "the rollout server http://b:2 is not healthy" in sick.stderr, sick.stderr
    assert not calls(folder, "python") and len(calls(folder, "gcloud")) == 1
    assert run(*asked, **environment).returncode == 0
    (call,) = calls(folder, "python")
    assert call.endswith(
        f"--workdir={tmp_path / 'w w'} --config.seed=1 --config.servers.urls=('http://a:1','http://b:2',)"
    )
    assert sorted(x.split()[-1] for x in calls(folder, "curl")) == sorted(
        2 * ["http://a:1/health", "http://b:2/health"]
    )


def test_a_signal_to_the_script_comes_to_every_process_once(tmp_path):
    """And no process is left behind, nor the job started again."""
    stub(
        tmp_path / "bin", "python",
        f"""[ "$1" = -c ] && echo 1 && exit
trap 'echo "got $M1JAX_PROCESS" >>{tmp_path}/bin/calls; exit 75' TERM
echo "up $M1JAX_PROCESS" >>{tmp_path}/bin/calls; while true; do sleep 0.1; done""",
    )  # fmt: skip
    job = subprocess.Popen(
        ["launch/local.sh", "train_rl", "configs/c.py", str(tmp_path / "w")], cwd=ROOT,
        env=os.environ | {"PROCESSES": "3", "VENV": str(tmp_path), "RESTARTS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (tmp_path / "bin" / "calls").exists() or len(calls(tmp_path / "bin", "up")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=30)
    assert job.returncode == 75 and "starting all" not in said
    assert sorted(calls(tmp_path / "bin", "got")) == ["got 0", "got 1", "got 2"]


def test_the_job_set_is_what_its_head_says():
    """Filled in as the head does it, it is YAML without a variable of ours, and with those of its shell commands."""
    text = (ROOT / "launch" / "gke.yaml").read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    exported = dict(re.findall(r"(\w+)=(\S+)", "\n".join(x for x in head.splitlines() if "export " in x)))
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
    (gate,) = trainer["template"]["spec"]["initContainers"]
    assert "http://rl-rollout-$i-0.rl:30000/health" in gate["command"][2]
    for script in (container["command"][2], gate["command"][2]):
        assert run("bash", "-n", "-c", script).returncode == 0
