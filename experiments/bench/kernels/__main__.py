"""Our kernels against the roofline of the device that they run on, and beside every peer that is installed.

    make bench-kernels                                       # this, into runs/bench_kernels
    python -m experiments.bench.kernels [--ops=lightning,decode,gated_norm,softmax,experts,growth] [--shapes=TEXT]
                                        [--implementations=xla,mosaic_gpu,...] [--rounds=20] [--workdir=DIR] [--smoke]
                                        [--peers_python=PYTHON]

Operation by shape by implementation, forward and forward + backward: milliseconds, the share of them that the roofline
(roofline.py) asks for, and how many times faster than each peer. bfloat16 on GPU and TPU, float32 on CPU; random normal
inputs; medians. What is compared is measured in turn, round after round, in one run: a shape's implementations, its
peers, and the dense product and the copy that the roofline is made of. `growth` is lightning attention against length.

Peers: softmax attention of equal shape by the library of the platform; and in a process of their own, where
--peers_python (or this Python) has them, Transformers' lightning attention (CPU), fla's simple_gla (GPU) and torch's
scaled_dot_product_attention. The rest is named, and so is what refuses to run here or is too large for this machine.

Prints a table and writes kernels.json and kernels.png.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX starts: torch shares the GPU with it

from experiments import cli
from experiments.bench.core import machine
from experiments.bench.kernels import page
from experiments.bench.kernels.cases import groups, sizes
from experiments.bench.kernels.measure import Torch, measure
from experiments.bench.kernels.ops import OPS
from experiments.bench.peers.protocol import SideFailed
from m1jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench_kernels"))
    parser.add_argument("--ops", default=",".join(OPS), help="with commas between; all by default")
    parser.add_argument("--implementations", default="", help="with commas between; all but slow ones by default")
    parser.add_argument("--shapes", default="", metavar="TEXT", help="those whose line in the table holds this text")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peers_python", default="", metavar="PYTHON", help="of an environment with torch and peers")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes of everything, to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.rounds = 2
    return cli.guard(lambda: bench(arguments), memory="--ops or --shapes to fewer")


def bench(arguments: argparse.Namespace) -> None:
    """Measure what is asked for, print it, write it down; kernels.json grows with every group of cases.

    Raises:
        UserError: an unknown name, or nothing to measure.
    """
    a, here, notes = arguments, sizes(arguments.smoke), []
    wanted = chosen(
        "--implementations", a.implementations, {name for op in OPS.values() for name in op.implementations}
    )
    a.workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "dtype": here.dtype, "rounds": a.rounds}
    results |= {"rows": [], "growth": {}}
    with ExitStack() as stack:
        torch = Torch(stack, a.peers_python, a.workdir.absolute() / "torch.log")
        results["machine"]["versions"] |= torch.versions
        notes += torch.notes
        for cases in groups(chosen("--ops", a.ops, {*OPS}), a.shapes, here, notes):
            try:
                rows, growth = measure(cases, wanted, a.rounds, here, torch, notes)
            except SideFailed as error:
                raise UserError(str(error)) from error
            results["rows"] += rows
            results["growth"] |= growth
            results["notes"] = list(dict.fromkeys(notes))
            (a.workdir / "kernels.json").write_text(json.dumps(results, indent=2) + "\n")
            print(f"measured: {cases[0]}" + f", and {len(cases) - 1} more" * (len(cases) > 1), flush=True)
    if not results["rows"]:
        raise UserError(f"--ops={a.ops} --shapes={a.shapes}: nothing to measure here; {'; '.join(notes)}")
    page.draw(a.workdir / "kernels.png", results)
    where = f"written: {a.workdir / 'kernels.json'}, {a.workdir / 'kernels.png'}"
    print("\n".join(["", *page.lines(results), "", where]))


def chosen(flag: str, text: str, known: set[str]) -> list[str]:
    """The names in `text`, which commas separate.

    Raises:
        UserError: one of them is not known.
    """
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{flag}: there is no {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
