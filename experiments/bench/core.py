"""Attention cores against length: the lightning recurrence is linear in it, softmax attention quadratic.

Random normal q, k and v in float32, one row, no padding. Every program is compiled and run once; then all of them
run in turn, round after round, so that a busy moment of the machine falls on all alike, and the median is kept.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.pallas_kernels.lightning_attention import lightning_attention, slopes
from m1jax.pallas_kernels.softmax_attention import softmax_attention

KINDS, PASSES = ("lightning", "softmax"), ("forward", "forward+backward")

Name = TypeVar("Name", bound=Hashable)


def measure(
    lengths: Sequence[int], softmax_longest: int, heads: int, head_dim: int, block: int, rounds: int
) -> dict[str, Any]:
    """Seconds of both cores at every length (softmax up to `softmax_longest`), and how they grow.

    Returns:
        {"shape": {...}, "compile_seconds": [], "rows": [{"kind", "pass", "tokens", "seconds"}],
        "slopes": {"lightning forward": log-log slope, ...}}
    """
    programs = {
        (kind, way, tokens): program(kind, way, tokens, heads, head_dim, block)
        for kind in KINDS
        for way in PASSES
        for tokens in lengths
        if kind == "lightning" or tokens <= softmax_longest
    }
    medians, compile_seconds = interleaved_medians(programs, rounds)
    rows = [{"kind": k, "pass": w, "tokens": t, "seconds": s} for (k, w, t), s in medians.items()]
    growth = {}
    for kind in KINDS:
        for way in PASSES:
            points = [(row["tokens"], row["seconds"]) for row in rows if (row["kind"], row["pass"]) == (kind, way)]
            if len(points) > 1:
                growth[f"{kind} {way}"] = log_log_slope(points)
    shape = {"rows": 1, "heads": heads, "head_dim": head_dim, "block": block, "dtype": "float32", "rounds": rounds}
    return {"shape": shape, "compile_seconds": compile_seconds, "rows": rows, "slopes": growth}


def program(kind: str, way: str, tokens: int, heads: int, head_dim: int, block: int) -> Callable[[], Any]:
    """A call without arguments that runs one core once, to its end."""
    q, k, v, cotangent = jax.random.normal(jax.random.key(tokens), (4, 1, tokens, heads, head_dim))
    if kind == "lightning":
        slopes_N = jnp.asarray(slopes(heads, 0, 8))
        core = lambda q, k, v: lightning_attention(q, k, v, slopes_N, chunk=block)[0]  # noqa: E731
    else:
        positions, segment_ids = jnp.arange(tokens)[None], jnp.ones((1, tokens), jnp.int32)
        core = lambda q, k, v: softmax_attention(  # noqa: E731
            q, k, v, q_positions_BT=positions, k_positions_BS=positions,
            q_segment_ids_BT=segment_ids, k_segment_ids_BS=segment_ids, block=block,
        )  # fmt: skip
    if way == "forward":
        run = jax.jit(core)
    else:
        run = jax.jit(jax.value_and_grad(lambda q, k, v: jnp.vdot(core(q, k, v), cotangent), argnums=(0, 1, 2)))
    return lambda: jax.block_until_ready(run(q, k, v))


def interleaved_medians(programs: Mapping[Name, Callable[[], Any]], rounds: int) -> tuple[dict[Name, float], float]:
    """Median seconds of each program over `rounds` rounds of all, and the seconds of their first calls together."""
    first = sum(seconds_of(run) for run in programs.values())
    return take_turns({name: partial(seconds_of, run) for name, run in programs.items()}, rounds), first


def take_turns(clocks: Mapping[Name, Callable[[], float]], rounds: int, rest: float = 0.0) -> dict[Name, float]:
    """Median of the seconds that each clock tells, over `rounds` rounds of all.

    Args:
        clocks: each runs something and tells its seconds.
        rounds: times that each is asked.
        rest: pause after each, in its own seconds.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            seconds[name].append(clock())
            time.sleep(rest * seconds[name][-1])
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def log_log_slope(points: Sequence[tuple[float, float]]) -> float:
    """Exponent p of seconds ~ tokens^p by least squares on the logarithms: 1 is linear, 2 quadratic."""
    tokens, seconds = np.log(np.array(points, float)).T
    return float(np.polyfit(tokens, seconds, 1)[0])


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in (cpuinfo.read_text() if cpuinfo.exists() else "").splitlines()
              if line.startswith("model name")]  # fmt: skip
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("jax", "jaxlib", "flax", "numpy")},
    }
