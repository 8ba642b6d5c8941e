"""The process that runs verifiers: reads jobs, writes verdicts, and may be killed at any time.

Started by grader.py as `python -m m1jax.rewards.worker CPU_SECONDS MEMORY_BYTES`. A line in is a JSON list of jobs
`[id, "module:function", answer, row]`; a line out is `[id, score]`, one for each job as soon as it is done: null where
the verifier raised or left [0, 1], NaN where it gave no score (None or NaN).
A job of id -1 only imports its verifier and is not answered.

Before each job the process arms a timer of CPU time whose signal it leaves at its default action, death: no verifier
can catch it, whatever it does with exceptions and alarms. The pipe of verdicts is a private descriptor, so that
what verifiers print goes to standard error. Imports neither jax nor the program that started it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Score jobs until the parent closes the pipe."""
    cpu_seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    out = os.dup(1)
    os.dup2(2, 1)
    if memory_bytes and sys.platform == "linux":  # a verifier's memory must not end the training run
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    jobs: queue.SimpleQueue[list] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    while True:
        for identity, verifier, answer, row in jobs.get():
            try:
                function = load(verifier)  # an import is not the answer's fault: it runs before the clock does
                if identity < 0:
                    continue
                signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
                score = function(answer, row)
                signal.setitimer(signal.ITIMER_PROF, 0)
                score = float("nan") if score is None else float(score)
                score = None if score < 0 or score > 1 else score
            except BaseException:  # SystemExit and KeyboardInterrupt included: one verdict for each job
                signal.setitimer(signal.ITIMER_PROF, 0)
                score = None
            if identity >= 0:
                os.write(out, json.dumps([identity, score]).encode() + b"\n")


def _read(jobs: queue.SimpleQueue[list]) -> None:
    """Hand on what the parent sends; when it closes the pipe or dies, so do we, in the middle of a job if need be."""
    for line in sys.stdin.buffer:
        jobs.put(json.loads(line))
    os._exit(0)


@functools.cache
def load(verifier: str) -> Callable[[str, Any], Any]:
    """Return the function that "module:function" names. Raises ImportError or AttributeError."""
    module, _, name = verifier.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    main()
