"""The driver's conversation with the process of one side: a JSON line each way, one request at a time.

    {"do": "prepare", "name": "forward 4x1024"}   build, compile, warm up   {"wall": s, "cpu": s, "parameters": n, ...}
    {"do": "measure", "name": "forward 4x1024"}   run it once               {"wall": s, "cpu": s, ...}
    {"do": "forget", "name": "forward 4x1024"}    let go of its memory      {}
    {"do": NAME, ...}                             the side's own function   its result

A reply {"error": line} says what went wrong. Python's standard library only: this file runs under every interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Prepared:
    """A workload ready to be timed.

    Attributes:
        run: does it once, to its end; what it returns goes into the reply.
        about: what was chosen, and the number of parameters.
        reset: brings back the state that every run starts from; it is not timed.
    """

    run: Callable[[], Mapping[str, Any] | None]
    about: Mapping[str, Any]
    reset: Callable[[], None] = field(default=lambda: None)


def timed(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of a call by the wall and by the processor, all threads of this process counted; and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def fastest(candidates: Mapping[str, Callable[[], Any]]) -> str:
    """The candidate with the shortest call, of two after a first one. Every side may choose its settings so."""
    if len(candidates) == 1:
        return next(iter(candidates))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(3):
        for name, run in candidates.items():
            seconds[name].append(timed(run)[0]["wall"])
    return min(candidates, key=lambda name: min(seconds[name][1:]))


def serve(
    prepare: Callable[[str], Prepared],
    versions: Mapping[str, str],
    others: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Answer requests from standard input until it ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ready: dict[str, Prepared] = {}

    def prepared(name: str) -> Mapping[str, Any]:
        def build() -> None:
            ready[name] = prepare(name)
            ready[name].run()

        seconds, _ = timed(build)
        return seconds | dict(ready[name].about)

    def measure(name: str) -> Mapping[str, Any]:
        ready[name].reset()
        seconds, values = timed(ready[name].run)
        return seconds | dict(values or {})

    def forget(name: str) -> Mapping[str, Any]:
        del ready[name]
        return {}

    functions = {"versions": lambda: versions, "prepare": prepared, "measure": measure, "forget": forget}
    functions |= others or {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = functions[request.pop("do")](**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(json.dumps(reply), file=answers, flush=True)


class SideFailed(Exception):
    """A side's process could not be started, ended, or reported an error; the message is one line."""


class Side:
    """The process of one side.

    Args:
        name: in messages and tables.
        command: what to start, in the root of the repository.
        cores: processors that it may run on; also its number of threads.
        log: file that takes its standard error.
    """

    def __init__(self, name: str, command: Sequence[str], cores: Iterable[int], log: Path):
        self.name, self.log = name, log
        cores = sorted(cores)
        threads = {f"{library}_NUM_THREADS": str(len(cores)) for library in ("OMP", "MKL", "OPENBLAS")}
        environment = {**os.environ, **threads, "JAX_NUM_CPU_DEVICES": str(len(cores)), "JAX_PLATFORMS": "cpu"}
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, cores)  # the child inherits it, its libraries count processors when they load
            with log.open("wb") as errors:
                self._process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
                )
        except OSError as error:
            raise SideFailed(f"{name}: cannot start {command[0]}: {error.strerror}") from error
        finally:
            os.sched_setaffinity(0, before)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            SideFailed: the process is gone or reports an error.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code, lines = self._process.wait(), self.log.read_text(errors="replace").strip().splitlines()
            raise SideFailed(
                f"{self.name}: ended with code {code} ({lines[-1] if lines else 'no message'}; {self.log})"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise SideFailed(f"{self.name}: {do} {arguments.get('name', '')}: {reply['error']} (see {self.log})")
        return reply

    def close(self) -> None:
        """End the process: its input ends, and where that does not help it is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
