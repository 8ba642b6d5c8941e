"""Programs of a group of cases, ours and the peers', that take turns; the times that come out, beside the roofline."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.core import log_log_slope, seconds_of, take_turns
from experiments.bench.kernels import roofline
from experiments.bench.kernels.cases import Case, Sizes
from experiments.bench.kernels.ops import CROSSOVER, GROWTH, OPS, Inputs, Shape, refusal, starter
from experiments.bench.peers.protocol import Side, SideFailed
from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.shapes import Experts, expert_ids, segment_ids
from m1jax.pallas_kernels.softmax_attention.api import BEST

TORCH_PEERS = {
    "lightning": ("transformers", "fla"),
    GROWTH: ("transformers", "fla"),
    "softmax": ("torch SDPA",),
    "experts": ("Transformers' grouped", "Transformers' loop"),
}
PEER_TOKENS = 8_192
"""Growth is ours to show: peers of another process join up to this length."""


@dataclass(frozen=True)
class Timed:
    """A program that is ready.

    Attributes:
        clock: runs it and tells the seconds of one call.
        rms: root mean square of all its results.
        forget: lets go of what it holds.
    """

    clock: Callable[[], float]
    rms: float
    forget: Callable[[], Any] = lambda: None


class Torch:
    """The process of the peers that need torch, or nothing where there is none.

    Attributes:
        peers: those that it can run here.
        versions: of their packages.
        notes: the others, each with the reason.
    """

    def __init__(self, stack: ExitStack, python: str, log: Path):
        names = list(dict.fromkeys(name for peers in TORCH_PEERS.values() for name in peers))
        self.peers: list[str] = []
        self.versions: dict[str, str] = {}
        if not python and importlib.util.find_spec("torch") is None:
            why = "torch is not installed here; --peers_python names a Python that has it"
            self.notes = [f"peer {name}: {why}" for name in names]
            return
        try:
            command = [python or sys.executable, "-m", f"{__package__}.torch_side"]
            self.side, self.folder = Side("torch", command, os.sched_getaffinity(0), log), log.parent
            stack.callback(self.side.close)
            versions, missing = self.side.ask("versions"), self.side.ask("missing")
        except SideFailed as error:
            self.notes = [f"peer {name}: {error}" for name in names]
            return
        device = versions.pop("device")
        if device != {"gpu": "cuda"}.get(compat.platform(), compat.platform()):
            missing = dict.fromkeys(names, f"torch computes on {device}, JAX on {compat.platform()}")
        self.versions = versions
        self.peers = [name for name in names if name not in missing]
        self.notes = [f"peer {name}: {why}" for name, why in missing.items()]

    def of(self, case: Case) -> Iterator[str]:
        """The peers of a case."""
        shape: Any = case.shape
        for name in TORCH_PEERS.get(case.name, ()):
            takes_it = not case.packed or (name == "fla" and shape.B == 1)
            if name in self.peers and takes_it and (case.name != GROWTH or shape.T <= PEER_TOKENS):
                yield name

    def timed(self, peer: str, case: Case, dtype: str, inputs: Inputs) -> Timed:
        """A peer's program, which its process times itself."""
        shape: Any = case.shape
        work = {"peer": peer, "way": case.way, "dtype": dtype, "shape": asdict(shape), "segments": []}
        work["decay"] = np.asarray(inputs["slopes_N"]).tolist() if "slopes_N" in inputs else []
        if isinstance(shape, Experts):
            path = self.folder / "expert_ids.npy"  # written anew for each case, and read at once
            np.save(path, expert_ids(shape))
            work["expert_ids"] = str(path)
        elif (ids_BT := segment_ids(shape.B, shape.T, shape.segments)) is not None:
            edges = [0, *(np.flatnonzero(np.diff(ids_BT[0])) + 1), shape.T]  # padding makes up segments of its own
            work["segments"] = np.diff(edges).tolist()
        name = json.dumps(work)
        prepared = self.side.ask("prepare", name=name)

        def clock() -> float:
            reply = self.side.ask("measure", name=name)
            return reply["wall"] / reply["repeats"]

        return Timed(clock, prepared["rms"], lambda: self.side.ask("forget", name=name))


@jax.jit
def _root_mean_square(results: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in results) / sum(x.size for x in results))


def ours(start: Callable[[], Any], seconds: float) -> Timed:
    """Compile and run what `start` starts; as many calls make a measurement as fill `seconds`."""
    rms = float(_root_mean_square(jax.tree.leaves(start())))
    repeats = max(1, min(100, round(seconds / seconds_of(lambda: jax.block_until_ready(start())))))

    def run() -> None:
        for _ in range(repeats):
            outputs = start()
        jax.block_until_ready(outputs)

    return Timed(lambda: seconds_of(run) / repeats, rms)


def programs(
    case: Case, inputs: Inputs, wanted: Sequence[str], here: Sizes, torch: Torch, notes: list[str]
) -> Iterator[tuple[str, Callable[[], Timed]]]:
    """`(name, what prepares it)` of our implementations and the peers of a case; what refuses is noted."""
    for name in case.op.implementations:
        if wanted and name not in wanted:
            continue
        if not wanted and name in case.op.slow.get(compat.platform(), ()):
            notes.append(f"{case.name} by {name!r} is slow here: it runs where --implementations names it")
        elif reason := refusal(case.op, case.shape, here.dtype, name):
            notes.append(reason)
        else:
            yield name, lambda name=name: ours(starter(case.op, inputs, name, case.way), here.seconds)
    if case.op is OPS[GROWTH] and not case.packed and here.allow(here.work(CROSSOVER, case.shape, case.way)):
        name = BEST.get(compat.platform(), "blocked")
        if reason := refusal(CROSSOVER, case.shape, here.dtype, name):
            notes.append(f"peer of lightning: {reason}")
        else:
            yield f"softmax {name}", lambda: ours(starter(CROSSOVER, inputs, name, case.way), here.seconds)
    for name in torch.of(case):
        yield name, partial(torch.timed, name, case, here.dtype, inputs)


def measure(
    cases: Sequence[Case], wanted: Sequence[str], rounds: int, here: Sizes, torch: Torch, notes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Prepare all programs of the cases and the two ceilings, and let them take turns.

    Returns:
        A row for each case and program; and for cases of several lengths, {program and pass: log-log slope}.
    """
    amounts: dict[str, float] = {}
    ready: dict[tuple[Case | None, str], Timed] = {}
    for name, (amount, start) in roofline.ceilings(here.dtype, here.product, here.copied).items():
        amounts[name], ready[None, name] = amount, ours(start, here.seconds)
    inputs: dict[Shape, Inputs] = {c.shape: c.op.draw(c.shape, here.dtype) for c in cases}
    for case in cases:
        for name, prepare in programs(case, inputs[case.shape], wanted, here, torch, notes):
            try:
                ready[case, name] = prepare()
            except (RuntimeError, SideFailed) as error:  # of XLA's too, out of memory for one
                notes.append(f"{case}: {name} failed: {str(error).strip().splitlines()[0]}")
    medians = take_turns({key: program.clock for key, program in ready.items()}, rounds, here.rest)
    for program in ready.values():
        program.forget()

    rates = {f"{name}_per_second": amount / medians[None, name] for name, amount in amounts.items()}
    rows, points = [], {}
    for case in cases:
        found = {name: seconds for (of, name), seconds in medians.items() if of == case}
        peers = {name: seconds for name, seconds in found.items() if name not in case.op.implementations}
        work = here.work(case.op, case.shape, case.way)
        floor = roofline.floor(work, **rates)
        for name, seconds in found.items():
            peer, ratios = name in peers, {}
            if not peer:
                ratios = {other: theirs / seconds for other, theirs in peers.items()}
                if case.name == GROWTH:
                    points.setdefault(f"{name} {case.way}", []).append((case.shape.T, seconds))  # pyright: ignore
            rows.append(
                {"op": case.name, "shape": str(case.shape), "dims": asdict(case.shape), "pass": case.way}
                | {"program": name, "peer": peer}
                | {"seconds": seconds, "floor": floor, "fraction": floor / seconds, "ratios": ratios}
                | work._asdict() | rates
            )  # fmt: skip
        notes += unlike(case, {name: program.rms for (of, name), program in ready.items() if of == case})
    return rows, {name: log_log_slope(each) for name, each in points.items() if len(each) > 1}


def unlike(case: Case, rms: Mapping[str, float]) -> list[str]:
    """Peers whose results are of another size than ours: other decays or another scale, on inputs of the same kind."""
    if case.packed:
        return []
    mine = [name for name in rms if name in case.op.implementations]
    return [
        f"{case}: {peer} computes something else than {name}: root mean square {rms[peer]:.3g}, not {rms[name]:.3g}"
        for peer in TORCH_PEERS.get(case.name, ())
        for name in mine
        if peer in rms and not 0.9 < rms[peer] / rms[name] < 1.1
    ]
