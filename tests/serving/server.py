"""A real SGLang server for tests: started by launch/sglang.sh on a free port of this machine, talked to in JSON.

server = Server(folder, log, "--weight-version", "0")
server.start()
answer = server.generate([5, 6, 7], max_new_tokens=8)
server.kill()      # as a crash would end it
server.start()     # at the same port, with the folder that it was made with
server.stop()
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECONDS, REQUEST_SECONDS = 300, 120


def environment() -> Path:
    """The folder of the servers' virtual environment; it need not be there."""
    return ROOT / os.environ.get("SGLANG_VENV", ".venv-sglang")


def installed() -> bool:
    """Whether `make sglang-env` has come to its end."""
    return (environment() / ".m1jax-setup").is_file()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """One server and its processes.

    Attributes:
        url: its address, the same after every start.
        pid: leader of the process group that the server is; None while it is not running.
        log: what SGLang has written.
    """

    def __init__(self, folder: Path, log: Path, *flags: str, port: int = 0, **variables: str):
        """Name the model folder, further flags of SGLang and environment variables of launch/sglang.sh."""
        self.folder, self.log, self.flags, self.variables = folder, log, flags, variables
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.pid: int | None = None
        self._script: subprocess.Popen[str] | None = None

    def start(self) -> Server:
        """Start it and wait until it takes requests.

        Raises:
            RuntimeError: it did not come up; with the end of its log.
        """
        variables = {"PLATFORM": "cpu", "SGLANG_VENV": str(environment()), "READY_SECONDS": str(START_SECONDS)}
        self._script = subprocess.Popen(
            [ROOT / "launch" / "sglang.sh", self.folder, str(self.port), *self.flags],
            env=os.environ | variables | {"LOG": str(self.log)} | self.variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self._script.stdout is not None
        told = self._script.stdout.readline()  # the script's own deadline bounds this
        if not (ready := re.match(r"ready: .* pid (\d+)", told)):
            self._script.wait(30)
            raise RuntimeError(f"{told}{self.log.read_text(errors='replace')[-3000:] if self.log.exists() else ''}")
        self.pid = int(ready[1])
        return self

    def stop(self) -> None:
        """End it as Ctrl-C does; nothing of it is left afterwards."""
        if self._script is not None:
            self._script.terminate()
            self._script.wait(60)
            assert self._script.stdout is not None
            self._script.stdout.close()
        self._script = self.pid = None

    def kill(self) -> None:
        """SIGKILL to all its processes at once, as the machine's out-of-memory killer or a crash."""
        assert self.pid is not None and self._script is not None
        os.killpg(self.pid, signal.SIGKILL)
        self._script.wait(60)
        self.pid = None

    def alive(self) -> bool:
        """Whether any process of the group is left."""
        return self.pid is not None and group_alive(self.pid)

    def get(self, path: str) -> Any:
        """The JSON of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=REQUEST_SECONDS) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """`(status, JSON or text)` of a POST, errors too."""
        try:
            with self._open(path, body) as answer:
                return answer.status, _json(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _json(error.read())

    def generate(self, input_ids: list[int], *, temperature: float = 1.0, **options: Any) -> dict[str, Any]:
        """One answer of POST /generate with log-probabilities; unknown `options` go beside the sampling parameters.

        Raises:
            AssertionError: the server refused.
        """
        status, answer = self.post("/generate", _body(input_ids, temperature, options))
        assert status == 200, answer
        return answer

    def stream(self, input_ids: list[int], *, temperature: float = 1.0, **options: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer; each holds what is new."""
        with self._open("/generate", _body(input_ids, temperature, options | {"stream": True})) as answer:
            for line in answer:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])

    def update(self, folder: Path, version: str) -> tuple[int, Any]:
        """Swap the weights for those of `folder`; prefixes of the old ones are forgotten."""
        body = {"model_path": str(folder), "weight_version": version, "flush_cache": True}
        return self.post("/update_weights_from_disk", body)

    def _open(self, path: str, body: dict[str, Any]):
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=REQUEST_SECONDS)


def group_alive(pid: int, patience: float = 0.0) -> bool:
    """Whether a process of the group `pid` still runs; waits up to `patience` seconds for their end."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 0)
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            return True
        return False


SAMPLING = ("max_new_tokens", "stop_token_ids", "ignore_eos", "top_p", "top_k")


def _body(input_ids: list[int], temperature: float, options: dict[str, Any]) -> dict[str, Any]:
    sampling = {key: options.pop(key) for key in SAMPLING if key in options}
    sampling = {"temperature": temperature, "ignore_eos": True} | sampling
    return {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True} | options


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")
