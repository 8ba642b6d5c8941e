"""The whole story in one command: SFT cold start, then CISPO, then the table of what it changed.

    make demo                                               # this, into runs/demo
    python -m experiments.demo.run --workdir=DIR [--seed=1] [--smoke]

Run again, it goes on where it was stopped; on a finished run it prints the table.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Two CPU devices, to which the rows of a batch are dealt out, run 1.3 times as fast on two cores as one device with
# two threads. Has to be said before JAX starts.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

from experiments import cli
from m1jax.config import build
from m1jax.rl import loop
from m1jax.train import sft

SFT_CONFIG, RL_CONFIG = "configs/sft_tiny_cpu.py", "configs/rl_tiny_cpu.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/demo", help="run folder; the cold start goes to its sft/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    arguments = parser.parse_args()
    command = f"python -m experiments.demo.run --workdir={arguments.workdir} --seed={arguments.seed}"
    command += " --smoke" * arguments.smoke
    raise SystemExit(cli.guard(lambda: demo(Path(arguments.workdir), arguments.seed, arguments.smoke), command))


def demo(workdir: Path, seed: int, smoke: bool) -> None:
    """Run (or resume) both trainings and print the outcome."""
    start = time.monotonic()
    print(f"1 of 2: supervised cold start on worked solutions, into {workdir / 'sft'}")
    cold = sft.train(build(sft.SFTConfig, configured(SFT_CONFIG, seed, smoke)), workdir / "sft")
    print(f"2 of 2: CISPO from there, into {workdir}")
    values = configured(RL_CONFIG, seed, smoke) | {"init_from": str(workdir / "sft")}
    result = loop.train(build(loop.RLConfig, values), workdir)
    print()
    print(table(result.summary["heldout"]))
    seconds = {
        stage: cold.summary["seconds"].get(stage, 0.0) + result.summary["seconds"].get(stage, 0.0)
        for stage in cold.summary["seconds"] | result.summary["seconds"]
    }
    compiling = seconds.pop("compile")
    spent = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items() if value >= 0.5)
    print(f"\nseconds by stage: {spent}; compiling {compiling:.0f} apart; this process {time.monotonic() - start:.0f}")
    print(f"curves: {workdir / 'curves.png'}   answers before and after: {workdir / 'samples.md'}")


def configured(path: str, seed: int, smoke: bool) -> dict[str, Any]:
    return cli.load_config(f"{path}:smoke" if smoke else path) | {"seed": seed}


def table(heldout: Mapping[str, Mapping[str, Any]]) -> str:
    """Held-out accuracy by task: majority answer, after SFT, after RL, with 95% intervals."""
    show = lambda a: f"{a['mean']:.3f} [{a['low']:.3f}, {a['high']:.3f}]"  # noqa: E731
    lines = [
        f"{'held-out accuracy':<20}{'n':>6}{'majority':>10}   {'before (SFT)':<24}{'after (CISPO)':<24}{'lift':>7}"
    ]
    for task, row in heldout.items():
        before, after = row["before"], row["after"]
        lift = after["mean"] - before["mean"]
        lines.append(
            f"{task:<20}{after['n']:>6}{row['majority']:>10.3f}   {show(before):<24}{show(after):<24}{lift:>+7.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
