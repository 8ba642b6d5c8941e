"""launch/sglang.sh and local_sglang.sh: flags, waiting, logs, keys and ends, with a stub in the server's place.

The real server is started by tests/serving/test_launch.py.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.test_launch_scripts import run, running, stub, wait_for

SERVER = """
import http.server, os, signal, sys
signal.alarm(300)  # should the test fail
statuses = dict(pair.split("=") for pair in os.environ.get("STATUSES", "/ready=200").split())
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(statuses.get(self.path, 404)))
        self.end_headers()
    def log_message(self, *_): ...
print("the server speaks", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""What answers GET as STATUSES say, until it is ended."""


@pytest.fixture
def served(tmp_path):
    """(folder of the stub, environment, port): a `python` that says how it was called and serves."""
    folder = tmp_path / "sglang" / "bin"
    (tmp_path / "server.py").write_text(SERVER)
    folder.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stub(folder, "python", f"""env | grep -E '^(SGLANG_A|TRITON)' >>{folder}/variables
while [ "${{1:-}}" != --config ] && [ $# -gt 0 ]; do shift; done; [ $# = 0 ] || cat "$2" >{folder}/keys
[ ! -e {folder}/dies ] || {{ sleep "$(cat {folder}/dies)"; rm {folder}/dies; kill -KILL $$; }}
exec {sys.executable} {tmp_path}/server.py {port}""")  # fmt: skip
    return folder, {"SGLANG_VENV": str(tmp_path / "sglang"), "READY_SECONDS": "30"}, str(port)


def called(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


@contextmanager
def telling(tmp_path: Path, served, **environment: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """launch/sglang.sh while it runs, and the file of what it tells."""
    told = tmp_path / "told"
    told.touch()
    command = f"exec launch/sglang.sh m {served[2]} >{told} 2>&1"
    with running("bash", "-c", command, **served[1], **environment, LOG="/dev/null") as script:
        yield script, told


def listens(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


@pytest.mark.parametrize(
    ("platform", "wanted", "unwanted"),
    [
        ("cpu", "--device cpu --dtype float32 --attention-backend torch_native", "bfloat16"),
        ("cuda", "--dtype bfloat16", "--device cpu"),  # else what has no dtype in config.json is served in float16
    ],
)
def test_it_serves_until_it_is_asked_to_stop(tmp_path, served, platform, wanted, unwanted):
    folder, environment, port = served
    log = tmp_path / "log"
    asked = ("launch/sglang.sh", "the model", port, "--tp-size", "2")
    with running(*asked, **environment, PLATFORM=platform, LOG=str(log)) as script:
        wait_for(lambda: listens(port))
        script.terminate()
        script.communicate(timeout=20)
    assert script.returncode == 143 and not listens(port)
    (call,) = called(folder)
    assert f"--model-path the model --host 127.0.0.1 --port {port} " in call and call.endswith("--tp-size 2")
    assert wanted in call and unwanted not in call
    assert "--skip-tokenizer-init --incremental-streaming-output --enable-fp32-lm-head" in call
    variables = (folder / "variables").read_text() if (folder / "variables").exists() else ""
    assert ("TRITON_F32_DEFAULT=tf32x3" in variables) == (platform == "cuda")
    assert log.read_text() == "the server speaks\n" and log.stat().st_mode & 0o077 == 0


def test_what_was_in_a_log_stays_and_nobody_else_reads_on(tmp_path, served):
    """The file that the caller writes to, and one of ours."""
    _, environment, port = served
    ours, log = tmp_path / "ours", tmp_path / "log"
    for file in (ours, log):
        file.write_text("before\n")
        file.chmod(0o644)
    command = f"exec launch/sglang.sh m {port} >>{ours} 2>&1"
    with running("bash", "-c", command, **environment) as script:
        wait_for(lambda: "ready: " in ours.read_text())
        script.terminate()
        script.communicate(timeout=20)
    before, *said = ours.read_text().splitlines()
    assert before == "before" and "the server speaks" in said
    with running("launch/sglang.sh", "m", port, **environment, LOG=str(log)) as script:
        wait_for(lambda: "speaks" in log.read_text())
        script.terminate()
        script.communicate(timeout=20)
    assert log.read_text() == "before\nthe server speaks\n" and log.stat().st_mode & 0o077 == 0


def test_keys_come_to_the_server_whatever_is_in_them_and_leave_the_disk(tmp_path, served):
    folder, environment, port = served
    keys = {"SGLANG_API_KEY": 'a"b\\c:#d\n', "SGLANG_ADMIN_KEY": "it's"}
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with running("launch/sglang.sh", "m", port, **environment, **keys, TMPDIR=str(temporary)) as script:
        wait_for(lambda: listens(port))
        wait_for(lambda: not list(temporary.iterdir()))
        script.terminate()
        script.communicate(timeout=20)
    assert yaml.safe_load((folder / "keys").read_text()) == {
        "api-key": 'a"b\\c:#d', "admin-api-key": "it's",
    }  # fmt: skip
    assert "it's" not in (folder / "calls").read_text() and "SGLANG_A" not in (folder / "variables").read_text()
    for key in ("-x", "two words"):
        refused = run("launch/sglang.sh", "m", port, **environment, SGLANG_API_KEY=key)
        assert refused.returncode == 2 and "SGLANG_API_KEY begins with -" in refused.stderr


def test_a_taken_port_and_a_server_that_does_not_come_are_told(served):
    folder, environment, port = served
    with socket.create_server(("127.0.0.1", int(port))):
        taken = run("launch/sglang.sh", "m", port, **environment)
    assert taken.returncode == 2 and f"something listens on port {port}" in taken.stderr and not called(folder)
    slow = run("launch/sglang.sh", "m", port, **environment | {"STATUSES": "/ready=503", "READY_SECONDS": "1"})
    assert slow.returncode == 1 and "not ready after 1 s; see above" in slow.stderr and not listens(port)
    (folder / "dies").write_text("0.2")
    dead = run("launch/sglang.sh", "m", port, **environment)
    assert dead.returncode == 1 and "the server ended while it started" in dead.stderr


def test_a_further_node_of_a_server_is_ready_by_its_health(tmp_path, served):
    """It takes no requests: SGLang has no /ready there."""
    _, environment, port = served
    with telling(tmp_path, served, STATUSES="/health=200") as (script, told):
        wait_for(lambda: "ready: " in told.read_text())
        script.terminate()
        script.communicate(timeout=20)
    assert script.returncode == 143
    sick = run("launch/sglang.sh", "m", port, **environment | {"STATUSES": "/health=503", "READY_SECONDS": "1"})
    assert sick.returncode == 1 and "not ready" in sick.stderr


@pytest.mark.parametrize("restarts", ["0", "1", "3"])
def test_a_server_that_dies_is_started_again_as_often_as_was_said(tmp_path, served, restarts):
    """One that dies while it starts again too: a GPU's memory may not be free yet. Of three, it does so once."""
    folder, _, port = served
    with telling(tmp_path, served, RESTARTS=restarts) as (script, told):
        for start in range(1 + min(int(restarts), 2)):
            wait_for(lambda: told.read_text().count("ready: ") == start + 1)  # noqa: B023
            if (restarts, start) == ("3", 1):
                (folder / "dies").write_text("0.2")
            kill_server(port)
        script.communicate(timeout=60)
    said = told.read_text()
    assert script.returncode == 137 and len(called(folder)) == 1 + int(restarts)
    assert ("starting it again, 0 further times" in said) == (restarts != "0")
    assert ("the server ended while it started; starting it again" in said) == (restarts == "3")


def test_asked_to_stop_between_two_starts_it_stops(tmp_path, served):
    folder, _, port = served
    with telling(tmp_path, served, RESTARTS="9") as (script, told):
        wait_for(lambda: "ready: " in told.read_text())
        kill_server(port)
        wait_for(lambda: "starting it again, 8 further times" in told.read_text())
        script.terminate()
        script.communicate(timeout=30)
    assert script.returncode == 143 and len(called(folder)) == 1 and not listens(port)


def kill_server(port: str) -> None:
    pid = max(int(p.name) for p in Path("/proc").glob("[0-9]*") if _serves(p, port))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not _serves(Path("/proc", str(pid)), port))


def _serves(process: Path, port: str) -> bool:
    try:
        return process.joinpath("cmdline").read_bytes().endswith(f"server.py\0{port}\0".encode())
    except OSError:  # it ended meanwhile
        return False


@pytest.fixture
def together(tmp_path, served):
    """What launch/local_sglang.sh needs: an export that is there, and a trainer that saves when it is asked to stop."""
    folder, environment, port = served
    (tmp_path / "w.served").mkdir()
    (tmp_path / "w.served.from").write_text("runs/sft\n")
    stub(tmp_path / "bin", "python", f"""trap 'echo saved >>{tmp_path}/bin/calls; exit 130' INT
trap 'echo saved >>{tmp_path}/bin/calls; exit 75' TERM
echo "up $$" >>{tmp_path}/bin/calls; for _ in $(seq 300); do /bin/sleep 0.1; done""")  # fmt: skip
    asked = ("launch/local_sglang.sh", "configs/c.py", str(tmp_path / "w"), "runs/sft", "--config.seed=1")
    return asked, environment | {"VENV": str(tmp_path), "PORT": port, "HOST": "0.0.0.0"}, tmp_path / "bin" / "calls"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
@pytest.mark.parametrize("whole_group", [True, False])
def test_server_and_trainer_end_together_and_the_trainer_saves_once(together, served, name, code, whole_group):
    """Ctrl-C on a terminal comes to the whole group of the script; a second one would end the trainer unsaved."""
    asked, environment, calls = together
    _, _, port = served
    with running(*asked, **environment) as script:
        wait_for(lambda: calls.exists() and "up " in calls.read_text() and listens(port))
        (os.killpg if whole_group else os.kill)(script.pid, getattr(signal, name))
        _, said = script.communicate(timeout=30)
    assert script.returncode == code, said
    assert calls.read_text().splitlines().count("saved") == 1 and not listens(port)
    (call,) = [line for line in calls.read_text().splitlines() if line.startswith("python ")]
    assert call.endswith(f"--init_from=runs/sft --config.servers.urls=http://127.0.0.1:{port} --config.seed=1")
    assert "--host 127.0.0.1" in (Path(environment["SGLANG_VENV"]) / "bin" / "calls").read_text()


def test_an_export_of_another_model_is_not_served(tmp_path, together):
    asked, environment, calls = together
    (tmp_path / "w.served.from").write_text("runs/other\n")
    done = run(*asked, **environment)
    assert done.returncode == 2 and "is not an export of runs/sft" in done.stderr and not calls.exists()


def test_the_end_of_the_server_is_told_and_the_trainer_waits(tmp_path, together, served):
    asked, environment, calls = together
    folder, *_ = served
    (folder / "dies").write_text("4")  # after the script has seen that its port is free
    log = tmp_path / "log"
    with running("bash", "-c", f'exec "$@" 2>{log}', "-", *asked, **environment) as script:
        wait_for(lambda: log.exists() and "the server ended, see " in log.read_text())
        assert script.poll() is None and "up " in calls.read_text() and "saved" not in calls.read_text()
        script.terminate()
        script.communicate(timeout=30)
    assert script.returncode == 75
