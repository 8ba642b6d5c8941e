"""m1jax beside Transformers and TRL on this machine, interleaved in one run.

    python3.11 -m venv PEERS && PEERS/bin/pip install torch==2.13.0 transformers==5.24.0 trl==1.16.0    # a CPU torch
    python -m experiments.bench.peers --peer_python=PEERS/bin/python [--workdir=DIR] [--rounds=5] [--smoke]
                                      [--only=forward,backward,decode,rl,parity]

Each side is one process that lives through the run, builds and compiles first and then measures when it is asked;
the sides take turns, so that a busy moment of the machine falls on both. Passes and decoding may use every core, RL
runs on one. Prints the tables and writes results.json and results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.bench.peers import page
from experiments.bench.peers.protocol import Side, SideFailed
from experiments.bench.peers.workloads import RL, WORKLOADS
from m1jax.errors import UserError

PEERS = ("torch", "transformers", "trl")
PARITY = "parity"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", required=True, help="the Python of an environment with the peers")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench_peers"))
    parser.add_argument("--only", default="", help="beginnings of names, with commas between: forward,rl,parity")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes of everything, to see that it runs")
    arguments = parser.parse_args(argv)
    return cli.guard(lambda: bench(arguments))


def bench(arguments: argparse.Namespace) -> None:
    """Measure what is asked for, print it, write it down."""
    names = chosen(arguments.only)
    require_peers(arguments.peer_python)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "versions": {}, "workloads": {}}
    cores = sorted(os.sched_getaffinity(0))
    passes, rl = ([n for n in names if n != PARITY and isinstance(WORKLOADS[n], RL) is kind] for kind in (False, True))
    try:
        if passes:
            with ExitStack() as stack:
                sides = start(stack, arguments, "transformers", cores)
                results["versions"] |= {side.name: side.ask("versions") for side in sides}
                results["workloads"] |= compare(passes, sides, arguments.rounds)
        if rl or PARITY in names:
            with ExitStack() as stack:
                sides = start(stack, arguments, "trl", cores[-1:])
                results["versions"] |= {side.name: side.ask("versions") for side in sides}
                if PARITY in names:
                    results["parity"] = parity(sides)
                results["workloads"] |= compare(rl, sides, arguments.rounds)
    except SideFailed as error:
        raise UserError(str(error)) from error
    lines = page.lines(results)
    (arguments.workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (arguments.workdir / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines, "", f"written: {arguments.workdir}/results.json, results.md"]))


def chosen(only: str) -> list[str]:
    """The workloads whose names begin as asked, in their order; all of them where nothing is asked.

    Raises:
        UserError: a beginning that no name has.
    """
    names, beginnings = [*WORKLOADS, PARITY], [part.strip() for part in only.split(",") if part.strip()]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            raise UserError(f"--only: nothing begins with {beginning!r}; there are: {', '.join(names)}")
    return [name for name in names if not beginnings or name.startswith(tuple(beginnings))]


def require_peers(python: str) -> None:
    """Raise UserError where there is no such Python, or one without the peers."""
    code = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    how = f"the first lines of {Path(__file__).parent.name}/__main__.py say how to make one"
    try:
        found = subprocess.run([python, "-c", code, *PEERS], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--peer_python: {python} is no Python that runs; {how}") from error
    if missing := found.stdout.split():
        raise UserError(f"--peer_python: {python} lacks {', '.join(missing)}; {how}")


def start(stack: ExitStack, arguments: argparse.Namespace, peer: str, cores: Sequence[int]) -> list[Side]:
    """Our process and the peer's, on the same cores."""
    sides = []
    for name, python, module in (("m1jax", sys.executable, "ours"), (peer, arguments.peer_python, f"{peer}_side")):
        folder = (arguments.workdir / name).absolute()
        folder.mkdir(exist_ok=True)
        settings = json.dumps({"smoke": arguments.smoke, "folder": str(folder)})
        command = [python, "-m", f"{__package__}.{module}", settings]
        side = Side(name, command, cores, folder / f"{module}_{len(cores)}_cores.log")
        stack.callback(side.close)
        sides.append(side)
    return sides


def compare(names: Sequence[str], sides: Sequence[Side], rounds: int) -> dict[str, Any]:
    """Prepare every workload on every side, then measure all in turn, the first side changing from round to round.

    Returns:
        {workload: {side: {"prepare": reply, "rounds": [reply of every round]}}}

    Raises:
        UserError: the sides count different numbers of parameters: they would not do the same work.
    """
    results: dict[str, Any] = {}
    for name in names:
        results[name] = {side.name: {"prepare": side.ask("prepare", name=name), "rounds": []} for side in sides}
        counts = {side: values["prepare"]["parameters"] for side, values in results[name].items()}
        print(f"{name}: {', '.join(f'{side} {n:,} parameters' for side, n in counts.items())}", flush=True)
        if len(set(counts.values())) > 1:
            raise UserError(f"{name}: the sides differ in their parameters: {counts}")
    for number in range(rounds):
        for name in names:
            for side in sides if number % 2 == 0 else reversed(sides):
                results[name][side.name]["rounds"].append(side.ask("measure", name=name))
        if names:
            print(f"round {number + 1} of {rounds}", flush=True)
    return results


def parity(sides: Sequence[Side], rows: int = 32, tokens: int = 32) -> dict[str, float]:
    """Largest differences of the sides' CISPO for the same numbers, with ratios on both sides of the cap."""
    draw = random.Random(0)
    table = lambda one: [[one() for _ in range(tokens)] for _ in range(rows)]  # noqa: E731
    policy = table(lambda: -draw.expovariate(0.5))
    arrays = {
        "policy": policy,
        "anchor": [[p - draw.gauss(0, 1.5) for p in row] for row in policy],
        "advantages": [draw.gauss(0, 1) for _ in range(rows)],
        "mask": [[int(t < length) for t in range(tokens)] for length in (draw.randint(1, tokens) for _ in range(rows))],
        "weight_cap": 5.0,
    }
    ours, theirs = (side.ask("parity", **arrays) for side in sides)
    pairs = [p for a, b in zip(ours["gradient"], theirs["gradient"], strict=True) for p in zip(a, b, strict=True)]
    return {
        "loss": ours["loss"],
        "loss_difference": abs(ours["loss"] - theirs["loss"]),
        "largest_gradient": max(abs(b) for _, b in pairs),
        "largest_gradient_difference": max(abs(a - b) for a, b in pairs),
    }


def machine() -> Mapping[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in (cpuinfo.read_text() if cpuinfo.exists() else "").splitlines()
              if line.startswith("model name")]  # fmt: skip
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
    }


if __name__ == "__main__":
    raise SystemExit(main())
