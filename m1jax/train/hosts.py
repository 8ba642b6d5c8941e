"""The processes of one job, usually one for each host: how they agree, and how they notice that one of them is gone.

All of them run the same program on the same numbers; arrays are shared through JAX's own distributed runtime. What only
one may do (ask servers, write files) the first does, and the others are told. With one process nothing here waits.

    hosts/00002.json     beside a run: what process 2 is doing, written every second by a thread of its own

A process whose file stands still is gone; one that is busy with another stage than those that wait for it, and too
long, is stuck. Both end the job with one line that names the host, and an exit code (75) that asks to be started again.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import socket
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np

from m1jax.errors import HostLost, UserError
from m1jax.train.clock import Clock

T = TypeVar("T")
FOLDER = "hosts"
LOST = ("gloo", "nccl", "connection", "unavailable", "deadline", "coordination", "socket", "barrier")
"""Words of the errors by which a message between hosts fails; backends differ in them."""
GRACE_S = 5.0
"""Seconds from the conclusion that a host is lost to the end of a process whose main thread has not come to it."""


@dataclass(frozen=True)
class HostsConfig:
    """When a job of several processes gives up.

    Attributes:
        lost_s: seconds without a sign of life after which a process counts as gone.
        stall_s: seconds after which a stage that nobody leaves counts as stuck; longer than the longest compilation and
            the longest batch of rollouts take.
    """

    lost_s: float = 30.0
    stall_s: float = 7200.0

    def __post_init__(self):
        for name in ("lost_s", "stall_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0")


# -- agreeing ----------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def exchange(value: T) -> list[T]:
    """The values of all processes, in their order. Everybody has to ask, here and below."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = pickle.dumps(value)
    sizes = _sizes(multihost_utils.process_allgather(_split(len(data))))
    parts: list[list[bytes]] = [[] for _ in sizes]
    for piece in _pieces(data, max(sizes)):
        for part, row in zip(
            parts, np.asarray(multihost_utils.process_allgather(piece)).reshape(len(sizes), -1), strict=True
        ):
            part.append(row.tobytes())
    return [pickle.loads(b"".join(part)[:size]) for part, size in zip(parts, sizes, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, which alone calls it; what it raises there is raised everywhere."""
    if jax.process_count() == 1:
        return make()
    from jax.experimental import multihost_utils

    value: Any = None
    error: Exception | None = None
    data = b""
    if is_first():
        try:
            value = make()
            data = pickle.dumps((value, None))
        except Exception as raised:
            error, data = raised, pickle.dumps((None, _portable(raised)))
    (size,) = _sizes(multihost_utils.broadcast_one_to_all(_split(len(data))))
    sent = [np.asarray(multihost_utils.broadcast_one_to_all(p)).astype(np.uint8) for p in _pieces(data, size)]
    if not is_first():
        value, error = pickle.loads(b"".join(piece.tobytes() for piece in sent)[:size])
    if error is not None:
        raise error
    return value


PIECE = 1 << 26
"""Bytes of a message that go at once: all processes hold as many of each, beside everything else."""


def _pieces(data: bytes, size: int) -> Iterator[np.ndarray]:
    """`data` in pieces for messages of `size` bytes, zeros behind its end; of few lengths, each is compiled once."""
    for start in range(0, max(size, 1), PIECE):
        left = min(size - start, PIECE)
        piece = np.zeros(1 << max(left - 1, 255).bit_length(), np.uint8)
        mine = np.frombuffer(data[start : start + PIECE], np.uint8)
        piece[: mine.size] = mine
        yield piece


def _split(size: int) -> np.ndarray:
    """A number of bytes as two int32, since JAX knows no int64 by default."""
    return np.array([size >> 30, size & ((1 << 30) - 1)], np.int32)


def _sizes(pairs: Any) -> list[int]:
    return [(int(high) << 30) + int(low) for high, low in np.asarray(pairs).reshape(-1, 2)]


def together(make: Callable[[], T]) -> T:
    """What `make` returns in this process; a UserError of one process ends all, with its host's name before it."""
    value, problem = None, None
    try:
        value = make()
    except UserError as error:
        problem = error
    told = exchange(None if problem is None else (socket.gethostname(), str(problem)))
    if problem is not None:
        raise problem
    for number, said in enumerate(told):
        if said is not None:
            raise UserError(f"host {said[0]} (process {number}): {said[1]}")
    return cast(T, value)


def anywhere(flag: bool) -> bool:
    """Whether it holds in any process."""
    return flag if jax.process_count() == 1 else any(exchange(bool(flag)))


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the way, else a RuntimeError that says the same."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


# -- before a run ------------------------------------------------------------------------------------------------

PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "reasoning-gym",
    "math-verify",
)


def preflight(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a job whose hosts differ in what has to be alike, or do not see the same run folder.

    Raises:
        UserError: the first difference, with both hosts' names and values.
    """
    if jax.process_count() == 1:
        return
    facts = {
        "Python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "the commit": _commit(),
        "the code of m1jax": f"{_code():08x}",
        "the config": f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}",
        "devices of a process": f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}",
    }
    everybody = exchange((socket.gethostname(), facts))
    first, wanted = everybody[0]
    for number, (host, found) in enumerate(everybody):
        for name, value in found.items():
            if value != wanted[name]:
                raise UserError(
                    f"host {host} (process {number}): {name} is {value}, on {first} (process 0) it is {wanted[name]}; "
                    f"install and check out the same on all hosts"
                )
    _check_shared(folder, [host for host, _ in everybody])


def _check_shared(folder: Path, names: list[str]) -> None:
    """Every process writes a file, and the first looks for all of them."""
    token = from_first(lambda: uuid.uuid4().hex[:12])
    mark = folder / FOLDER / f".{token}-{jax.process_index():05d}"
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(token)
        problem = ""
    except OSError as error:
        problem = f"cannot write there ({error.strerror})"
    problems = exchange(problem)
    marks = [folder / FOLDER / f".{token}-{n:05d}" for n in range(len(names))]
    missing = from_first(lambda: _absent(marks))
    with suppress(OSError):  # it could not be written, then
        mark.unlink()
    for number, (host, problem) in enumerate(zip(names, problems, strict=True)):
        if not problem and number in missing:
            problem = "writes into another folder of that name"
        if problem:
            raise UserError(
                f"{folder}: host {host} (process {number}) {problem}; give a --workdir that all hosts share"
            )


def _absent(paths: list[Path], seconds: float = 10.0) -> list[int]:
    """Which of some files do not come to be there soon: a network file system takes a moment."""
    deadline = time.monotonic() + seconds
    while missing := [n for n, path in enumerate(paths) if not path.exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return missing


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout that this runs from; "unknown" where it is none."""
    command = ["git", "-C", str(Path(__file__).parents[2]), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _code() -> int:
    """CRC-32 over the sources of the package."""
    root, crc = Path(__file__).parents[1], 0
    for file in sorted(root.rglob("*.py")):
        crc = zlib.crc32(file.read_bytes(), zlib.crc32(str(file.relative_to(root)).encode(), crc))
    return crc


# -- while it runs -----------------------------------------------------------------------------------------------


@dataclass
class _Sign:
    """What was last heard of a process, by the clock of who listens."""

    host: str = "?"
    beat: int = -1
    heard: float = 0.0
    stage: str = "starting"
    step: int = 0
    since: float = 0.0
    asked: bool = False

    def __str__(self) -> str:
        return f"{self.host} in {self.stage} of step {self.step}"


class Watchdog:
    """A thread that shows what this process does, and watches the others.

    Args:
        folder: the run's.
        config: when to give up.
        clock: says which stage runs.
        leave: ends the process where the main thread cannot: it may wait for a host that is gone, for ever.

    Attributes:
        stopped: whether this process was asked to stop, which the others are shown.
    """

    def __init__(
        self,
        folder: Path,
        config: HostsConfig,
        clock: Clock,
        leave: Callable[[int], None] = os._exit,
        beat_s: float = 1.0,
    ):
        self.config, self.clock, self.leave, self.beat_s = config, clock, leave, beat_s
        self.folder, self.index, self.count = folder / FOLDER, jax.process_index(), jax.process_count()
        self.found, self._explaining = "", False
        self.stopped: Callable[[], bool] = lambda: False
        self._signs = {n: _Sign(heard=time.monotonic(), since=time.monotonic()) for n in range(self.count)}
        self._over, self._beat, self._deaf, self._listened = threading.Event(), 0, False, time.monotonic()
        self._run = from_first(lambda: uuid.uuid4().hex[:8])  # files of an earlier start say nothing of this one
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the file says that this process left of itself."""
        self._over.set()
        self._thread.join()
        self._show("gone")

    @property
    def asked(self) -> bool:
        """Whether a process of the job was asked to stop, as far as was heard: for who waits for no message."""
        return self.stopped() or any(sign.asked for sign in self._signs.values())

    def explain(self, seconds: float) -> str:
        """Which process is gone, once that is clear; "" where none turns out to be within `seconds`."""
        self._explaining, deadline = True, time.monotonic() + seconds
        while not self.found and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.found

    def _watch(self) -> None:
        while not self._over.wait(self.beat_s):
            self._show(self.clock.running)
            self._listen()
            if self.found:
                # The main thread gets a moment to come to the same end by an error of its own, and to say more.
                # The first leaves last: with it goes the service without which JAX aborts the others.
                grace = GRACE_S if self.index else 2 * GRACE_S
                if not self._over.wait(grace) and not self._explaining:
                    sys.stdout.flush()
                    print(f"error: {self.found}; start again with the same command", file=sys.stderr, flush=True)
                    self.leave(75)
                return

    def _show(self, stage: str) -> None:
        self._beat += 1
        sign = {"run": self._run, "host": socket.gethostname(), "pid": os.getpid(), "beat": self._beat, "stage": stage}
        path = self.folder / f"{self.index:05d}.json"
        staging = path.with_suffix(".new")
        try:
            staging.write_text(json.dumps(sign | {"step": self.clock.step, "asked": self.stopped()}))
            staging.replace(path)
            self._deaf = False
        except OSError:
            self._deaf = True  # a disk that is full or gone is no reason to end a run: nothing is concluded from it

    def _listen(self) -> None:
        now, before = time.monotonic(), self._listened
        self._listened = now
        # While nobody can write, or a read hangs with the file system, silence says nothing of the others.
        if self._deaf or now - before > max(5 * self.beat_s, self.config.lost_s / 3):
            for sign in self._signs.values():
                sign.heard += now - before
                sign.since += now - before
        for number, sign in self._signs.items():
            try:
                heard = json.loads((self.folder / f"{number:05d}.json").read_text())
            except (OSError, ValueError):
                continue
            if heard.get("run") != self._run or heard["beat"] == sign.beat:
                continue
            if (heard["stage"], heard["step"]) != (sign.stage, sign.step):
                sign.since = now
            sign.host, sign.beat, sign.stage, sign.step = heard["host"], heard["beat"], heard["stage"], heard["step"]
            sign.heard, sign.asked = now, heard.get("asked", False)
        self.found = self._lost(now) or self._stuck(now)

    def _lost(self, now: float) -> str:
        for number, sign in self._signs.items():
            if number != self.index and now - sign.heard > self.config.lost_s:
                where = "it had left" if sign.stage == "gone" else f"last seen in {sign.stage} of step {sign.step}"
                return (
                    f"host {sign.host} (process {number} of {self.count}) gave no sign of life for "
                    f"{now - sign.heard:.0f} s, {where}; the last checkpoint stays"
                )
        return ""

    def _stuck(self, now: float) -> str:
        """Nobody has left its stage for too long: the one that entered its own before the others entered theirs."""
        if min(now - sign.since for sign in self._signs.values()) < self.config.stall_s:
            return ""
        number, behind = min(self._signs.items(), key=lambda item: (item[1].step, item[1].since))
        told = "; ".join(f"process {number} {sign}" for number, sign in self._signs.items())
        alike = len({(sign.step, sign.stage) for sign in self._signs.values()}) == 1
        who = "all hosts stall, none before the others," if alike else f"host {behind.host} (process {number}) stalls"
        return (
            f"{who} in {behind.stage} of step {behind.step}: no process has left its stage for "
            f"{self.config.stall_s:.0f} s ({told}); the last checkpoint stays"
        )


@contextmanager
def watched(folder: Path, config: HostsConfig, clock: Clock) -> Iterator[Watchdog | None]:
    """A run among whose processes one may be lost; None where there is one process.

    Raises:
        HostLost: one was.
    """
    if jax.process_count() == 1:
        yield None
        return
    watchdog = Watchdog(folder, config, clock)
    try:
        yield watchdog
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not _may_be_lost(error):
            raise
        if told := watchdog.explain(config.lost_s + 5):
            raise HostLost(told) from error
        raise  # `lost_is_told` judges by its words
    finally:
        watchdog.close()


@contextmanager
def lost_is_told() -> Iterator[None]:
    """A message between hosts that failed is HostLost, also where nothing watches them yet."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0][:160]
        if jax.process_count() > 1 and _may_be_lost(error) and any(word in first.lower() for word in LOST):
            raise HostLost(f"the hosts lost each other ({first}); the last checkpoint stays") from error
        raise


def _may_be_lost(error: Exception) -> bool:
    """Whether an error may be that of a message: Gloo's come as JAX's or as ValueError, a user's mistake as one too."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" not in str(error)
    return not isinstance(error, UserError) and "gloo" in str(error).lower()
