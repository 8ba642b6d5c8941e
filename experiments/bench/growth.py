"""What grows with what: step time with length, compile time with depth, host memory with the size of a checkpoint.

    python -m experiments.bench.growth [--workdir=runs/growth] [--smoke] [--only=length|depth|memory]

A supervised update of the tiny model, one row; programs of all lengths take turns. Compilations are without the cache.
Memory is that of a process of its own that converts a Hugging Face folder into a checkpoint, or that back. Prints
tables and writes growth.json. Some twenty minutes on two cores, two of them for memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from configs import models
from experiments import cli
from experiments.bench.core import interleaved_medians, log_log_slope, machine
from m1jax.config import build
from m1jax.mesh import MeshConfig
from m1jax.model.config import ModelConfig
from m1jax.sharding import deal, make_mesh
from m1jax.train.next_token import TokenBatch, make_supervised_update
from m1jax.train.router import RouterConfig
from m1jax.train.state import init_state
from m1jax.weights.hf_config import to_hf
from m1jax.weights.hf_folder import hf_bytes, write_hf
from m1jax.weights.hf_names import hf_tensors

K = 1024
PATTERNS = {"lightning": ("lightning",) * 8, "hybrid": ("lightning",) * 7 + ("softmax",), "softmax": ("softmax",) * 8}


WATCHED = """
import re, sys, threading
from pathlib import Path
from experiments import convert_weights
peak, over = [0], threading.Event()
def watch():
    while not over.wait(0.01):
        own = re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
        peak[0] = max(peak[0], int(own[1]))
thread = threading.Thread(target=watch, daemon=True)
thread.start()
convert_weights.main(sys.argv[1:])
over.set()
thread.join()
print("PEAK", peak[0])
"""
"""Memory of its own: pages of the files that it reads are the system's, which takes them back as it likes."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/growth"))
    parser.add_argument("--only", choices=("length", "depth", "memory"), help="one part instead of all")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes of everything, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    return cli.guard(lambda: bench(parser.parse_args(argv)))


def bench(arguments: argparse.Namespace) -> None:
    """Measure what is asked for, print it, write it down."""
    a = arguments
    results: dict[str, Any] = {"machine": machine()}
    jax.config.update("jax_enable_compilation_cache", False)  # what is measured is compiling
    small = a.smoke
    if a.only in (None, "length"):
        results["length"] = length((128, 256) if small else (2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K), a.rounds)
    if a.only in (None, "depth"):
        results["depth"] = depth((8, 16) if small else (8, 16, 40, 80), 1 if small else a.rounds)
    if a.only in (None, "memory"):
        results["memory"] = memory((1, 2) if small else (4, 8, 16, 32))
    a.workdir.mkdir(parents=True, exist_ok=True)
    (a.workdir / "growth.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(["", *lines(results), "", f"written: {a.workdir / 'growth.json'}"]))


def tiny(**changes: Any) -> ModelConfig:
    """The tiny model, layers computed again: what long rows are trained with."""
    return build(ModelConfig, models.tiny().to_dict() | dict(remat="layer") | changes, "models.tiny")


def update_of(model: ModelConfig, tokens: int) -> tuple[Any, tuple[Any, Any]]:
    """A supervised update, and the state and batch of one row that it takes."""
    mesh, sgd = make_mesh(MeshConfig(data=1), jax.devices()[:1]), optax.sgd(1e-3)
    update = make_supervised_update(model, sgd, mesh, router=RouterConfig())
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, 1, tokens)).astype(np.int32)
    weights = np.full(ids.shape, 1 / tokens, np.float32)
    batch = deal(TokenBatch(ids, np.ones_like(ids), weights), mesh)
    return update, (init_state(0, model, sgd, mesh), batch)


def length(lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Seconds of an update by layers and tokens; with softmax layers up to a half, or an eighth, of the longest."""

    def run(update: Any, held: list[Any], batch: Any) -> None:
        held[0], metrics = update(held[0], batch)
        jax.block_until_ready(metrics)

    programs: dict[tuple[str, int], Callable[[], Any]] = {}
    for name, pattern in PATTERNS.items():
        for tokens in lengths:
            if tokens > lengths[-1] // {"lightning": 1, "hybrid": 2, "softmax": 8}[name]:
                continue
            update, (state, batch) = update_of(tiny(layer_pattern=pattern), tokens)
            programs[name, tokens] = partial(run, update, [state], batch)
    medians, _ = interleaved_medians(programs, rounds)
    rows = [{"layers": name, "tokens": tokens, "seconds": s} for (name, tokens), s in medians.items()]
    of = lambda name: [(row["tokens"], row["seconds"]) for row in rows if row["layers"] == name]  # noqa: E731
    slopes = {name: log_log_slope(of(name)) if len(of(name)) > 1 else float("nan") for name in PATTERNS}
    return {"rows": rows, "slopes": slopes}


def depth(layers: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds of tracing and compiling an update, the least of some rounds, by layers."""
    seconds: dict[int, list[float]] = {n: [] for n in layers}
    for _ in range(rounds):
        for n in layers:
            jax.clear_caches()
            update, arguments = update_of(tiny(num_layers=n), 64)
            start = time.perf_counter()
            update.lower(*arguments).compile()
            seconds[n].append(time.perf_counter() - start)
    return [{"layers": n, "seconds": min(values)} for n, values in seconds.items()]


def memory(periods: Sequence[int]) -> list[dict[str, Any]]:
    """Most bytes of its own of a process that converts a folder into a checkpoint, or that back, by the folder's bytes.

    Args:
        periods: of eight layers; the folders' sizes.
    """
    rows, values = [], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        for n in periods:
            folder, checkpoint, back = (Path(place) / f"{name}{n}" for name in ("folder", "checkpoint", "back"))
            model = tiny(num_layers=8 * n, hidden_size=256, num_heads=8, head_dim=32, expert_dim=512, scan_layers=True)
            tensors = hf_tensors(model)
            write_hf(folder, model, to_hf(model), lambda tensor: values.standard_normal(tensor.shape, np.float32))
            peaks = {"to_checkpoint": peak(folder, checkpoint), "to_folder": peak(checkpoint, back)}
            rows.append({"bytes": hf_bytes(tensors, model.param_dtype), "tensors": len(tensors)} | peaks)
            for done in (folder, checkpoint, back):
                shutil.rmtree(done)
    return rows


def peak(source: Path, target: Path) -> int:
    """Most bytes of its own of a process that converts one into the other."""
    command = [sys.executable, "-c", WATCHED, f"--from={source}", f"--to={target}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source} to {target} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return int(done.stdout.rpartition("PEAK ")[2]) * 1024


def lines(results: dict[str, Any]) -> list[str]:
    """The tables."""
    where = results["machine"]
    out = [f"{where['cpu']}, {where['cores']} cores to run on, jax {where['versions']['jax']}"]
    if found := results.get("length"):
        lengths = sorted({row["tokens"] for row in found["rows"]})
        out += ["", "seconds of an update of one row; tokens:" + "".join(f"{n:>9,}" for n in lengths) + f"{'slope':>9}"]
        for name in PATTERNS:
            seconds = {row["tokens"]: row["seconds"] for row in found["rows"] if row["layers"] == name}
            cells = "".join(f"{seconds[n]:>9.2f}" if n in seconds else f"{'-':>9}" for n in lengths)
            out.append(f"  8 layers, {name:<30}{cells}{found['slopes'][name]:>9.2f}")
            cells = "".join(f"{seconds[n] / n * 1e6:>9.1f}" if n in seconds else f"{'-':>9}" for n in lengths)
            out.append(f"    {'microseconds a token':<38}{cells}")
    if found := results.get("depth"):
        out += ["", "seconds of compiling an update, by layers"]
        out += [
            f"  {row['layers']:>3}{row['seconds']:>9.2f}{row['seconds'] / found[0]['seconds']:>7.2f}x" for row in found
        ]
    if found := results.get("memory"):
        out += ["", "tensors and MB of a folder, and the most MB that a process which converts it has of its own"]
        out.append(f"  {'tensors':>7}{'folder':>10}{'to checkpoint':>16}{'and back':>12}")
        for row in found:
            sizes = "".join(
                f"{row[key] / 1e6:>{width},.0f}"
                for key, width in (("bytes", 10), ("to_checkpoint", 16), ("to_folder", 12))
            )
            out.append(f"  {row['tensors']:>7,}{sizes}")
    return out


if __name__ == "__main__":
    raise SystemExit(main())
