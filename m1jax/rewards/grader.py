"""A pool of processes that score answers and can be killed: every job gets exactly one verdict, in order.

A verifier is somebody else's code run on a model's text: it may hang, crash, raise, eat memory or return nonsense.
Threads cannot be stopped and `concurrent.futures` cannot cancel a running job, so each worker is a child process on
two pipes. Two clocks bound a job: CPU time, kept by the worker itself (fair on a loaded machine), and wall time, kept
here (for sleepers). Whoever overruns is killed, counted, and a fresh worker goes on with the jobs behind it.

Workers are started as new interpreters, never forked: this process runs the threads of JAX, and a fork of it could
hang on a lock that one of them held. They see our `sys.path` and folder, so a user's module loads there too.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from m1jax.types import Verdict


class Job(NamedTuple):
    """One answer to score: the verifier as "module:function", the answer's text, the problem's row (JSON values)."""

    verifier: str
    answer: str
    row: Mapping[str, Any]


@dataclass(eq=False)
class _Worker:
    """A child process and what we know of it: jobs it owes us (oldest first), bytes read so far, when it last spoke."""

    process: subprocess.Popen
    stdin: IO[bytes]
    stdout: IO[bytes]
    owes: collections.deque[int] = field(default_factory=collections.deque)
    buffer: bytes = b""
    heard: float = 0.0


class Grader:
    """Scores jobs in `workers` processes, which start when first needed.

    Args:
        workers: number of processes.
        cpu_seconds: CPU time that a job may use.
        wall_seconds: time that it may take at all; also bounds a worker's start and imports.
        memory_bytes: address space of a worker (0: no bound); past it a job ends in MemoryError, hence "error".

    `counts` holds how many verdicts of each outcome were given so far. Use as a context manager, or call `close`.
    """

    def __init__(
        self, workers: int = 2, cpu_seconds: float = 5.0, wall_seconds: float = 30.0, memory_bytes: int = 4 << 30
    ):
        for name, value in (("workers", workers), ("cpu_seconds", cpu_seconds), ("wall_seconds", wall_seconds)):
            if value <= 0:
                raise ValueError(f"{name}: {value} must be above 0")
        self._count, self._wall = workers, wall_seconds
        self._arguments = [str(cpu_seconds), str(memory_bytes)]
        self._workers: list[_Worker] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def warm_up(self, verifiers: Sequence[str] = ()) -> None:
        """Start all workers now and let them import these verifiers ("module:function") while we do other things."""
        self._fill(self._count)
        for worker in self._workers:
            self._send(worker, [[-1, verifier, "", None] for verifier in verifiers])

    def score(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Return the verdict of each job, in their order. Never raises for what a verifier does."""
        wire = [[index, *job] for index, job in enumerate(jobs)]
        verdicts: dict[int, Verdict] = {}
        waiting = collections.deque(range(len(jobs)))
        # Small enough that the workers finish together, large enough that a pipe is seldom waited for.
        chunk = max(1, min(32, len(jobs) // (4 * self._count)))
        self._fill(min(self._count, len(jobs)))
        try:
            while len(verdicts) < len(jobs):
                for worker in self._workers:
                    if not worker.owes and waiting:
                        share = [waiting.popleft() for _ in range(min(chunk, len(waiting)))]
                        worker.owes.extend(share)
                        worker.heard = time.monotonic()
                        self._send(worker, [wire[index] for index in share])
                self._listen(verdicts, waiting)
        except BaseException:  # Ctrl-C in the middle: what the workers still owe must not reach the next call
            self.close()
            raise
        self.counts.update(verdict.outcome for verdict in verdicts.values())
        return [verdicts[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Kill the workers. The grader may be used again: they start anew."""
        while self._workers:
            self._kill(self._workers.pop())

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ------------------------------------------------------------ one worker

    def _fill(self, count: int) -> None:
        """Have `count` living workers: one that was killed while idle must not cost the next job its verdict."""
        for dead in [worker for worker in self._workers if worker.process.poll() is not None]:
            self._workers.remove(dead)
            self._kill(dead)
        while len(self._workers) < count:
            self._workers.append(self._start())

    def _start(self) -> _Worker:
        # A verifier is a user's code over a model's text: the keys of rollout servers are none of its business.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        for library in ("OMP", "OPENBLAS", "MKL"):  # one job, one thread: the machine is busy with the model
            environment[f"{library}_NUM_THREADS"] = "1"
        process = subprocess.Popen(
            [sys.executable, "-m", "m1jax.rewards.worker", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us to handle
        )
        assert process.stdin and process.stdout
        return _Worker(process, process.stdin, process.stdout, heard=time.monotonic())

    def _send(self, worker: _Worker, jobs: list) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead, which `_listen` finds out and deals with
            worker.stdin.write(json.dumps(jobs).encode() + b"\n")
            worker.stdin.flush()

    def _listen(self, verdicts: dict[int, Verdict], waiting: collections.deque[int]) -> None:
        """Wait until some worker speaks, dies or is late; record what it said, and replace it if it is gone."""
        busy = [worker for worker in self._workers if worker.owes]
        late_at = min(worker.heard for worker in busy) + self._wall
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            ready = [key.data for key, _ in selector.select(max(0.0, late_at - time.monotonic()))]
        for worker in busy:
            well = worker not in ready or self._read(worker, verdicts)
            late = bool(worker.owes) and time.monotonic() - worker.heard > self._wall
            if well and not late:
                continue
            death = self._kill(worker)
            if worker.owes:  # the oldest unanswered job is the one it was at; the others were never begun
                overran = late or death == -signal.SIGPROF
                verdicts[worker.owes.popleft()] = Verdict(0.0, "timeout" if overran else "error")
                waiting.extendleft(reversed(worker.owes))
            self._workers[self._workers.index(worker)] = self._start()

    def _read(self, worker: _Worker, verdicts: dict[int, Verdict]) -> bool:
        """Take what the worker has written; False where it has closed its end or writes what no worker writes."""
        data = os.read(worker.stdout.fileno(), 1 << 16)
        *lines, worker.buffer = (worker.buffer + data).split(b"\n")
        worker.heard = time.monotonic()
        for line in lines:
            try:
                index, score = json.loads(line)
            except (ValueError, TypeError):
                return False
            if not worker.owes or index != worker.owes[0]:
                return False
            worker.owes.popleft()
            outcome = "error" if score is None else "unscored" if score != score else "scored"
            verdicts[index] = Verdict(score or 0.0, outcome)
        return bool(data)

    def _kill(self, worker: _Worker) -> int:
        """End the worker and return how it ended: what it died of itself, if it was dead already."""
        worker.process.kill()
        code = worker.process.wait()
        worker.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # a job that was never read
            worker.stdin.close()
        return code
