"""How many seconds this machine takes for attention by length, and for the demo by stage. One run, some minutes.

    make bench                                             # this, into runs/bench
    python -m experiments.bench [--workdir=DIR] [--smoke] [--only=core|stages] [--lengths 1024 4096 16384] ...

Prints a table and writes bench.json and bench.png.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo, before JAX starts

from experiments import cli
from experiments.bench import core, page, stages


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--only", choices=("core", "stages"), help="one part instead of both")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes of everything, to see that it runs")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], metavar="TOKENS")
    parser.add_argument("--softmax_longest", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=128, help="MiniMax-M1's by default")
    parser.add_argument("--block", type=int, default=128, help="lightning chunk and block of softmax queries")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sft_updates", type=int, default=50, help="cold start before the generation batches")
    parser.add_argument("--rl_steps", type=int, default=3, help="generation batches")
    parser.add_argument("--init_from", default="", help="run folder to start the generation batches from instead")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.__dict__ |= dict(
            lengths=[64, 128], softmax_longest=128, heads=2, head_dim=8, block=32, rounds=2, sft_updates=2, rl_steps=2
        )
    return cli.guard(lambda: bench(arguments))


def bench(arguments: argparse.Namespace) -> None:
    """Measure what is asked for, print it, write it down."""
    a, results = arguments, {"machine": core.machine()}
    if a.only != "stages":
        results["core"] = core.measure(a.lengths, a.softmax_longest, a.heads, a.head_dim, a.block, a.rounds)
    if a.only != "core":
        results["stages"] = stages.measure(a.sft_updates, a.rl_steps, a.init_from, a.smoke)
    a.workdir.mkdir(parents=True, exist_ok=True)
    (a.workdir / "bench.json").write_text(json.dumps(results, indent=2) + "\n")
    page.draw(a.workdir / "bench.png", results)
    print("\n".join(["", *page.lines(results), "", f"written: {a.workdir / 'bench.json'}, {a.workdir / 'bench.png'}"]))


if __name__ == "__main__":
    raise SystemExit(main())
