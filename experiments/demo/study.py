"""The demo over several seeds, each with a control: the same cold start, SFT continued for as long as RL took.

    python -m experiments.demo.study --workdir=runs/demo_study [--seeds=3] [--smoke]

Both use the same cores, so equal time is equal CPU time as long as nothing else runs on them. Resumable like every run.
Writes WORKDIR/results.json and prints the table of experiments/demo/README.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as experiments.demo.run, before JAX starts

import numpy as np

from experiments import cli
from experiments.demo.run import RL_CONFIG, SFT_CONFIG, configured, demo
from m1jax.config import build
from m1jax.rl import loop
from m1jax.train import report, sft

TRAINING_STAGES = ("prompts", "rollout", "reward", "batch", "update", "sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/demo_study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    command = f"python -m experiments.demo.study --workdir={arguments.workdir} --seeds={arguments.seeds}"
    command += " --smoke" * arguments.smoke
    raise SystemExit(cli.guard(lambda: study(Path(arguments.workdir), arguments.seeds, arguments.smoke), command))


def study(workdir: Path, seeds: int, smoke: bool) -> None:
    folders = {seed: workdir / f"seed{seed}" for seed in range(seeds)}
    for seed, folder in folders.items():
        demo(folder, seed, smoke)
    results = []
    for seed, folder in folders.items():
        rl, cold = report.load_run(folder).summary, report.load_run(folder / "sft").summary
        seconds = sum(rl["seconds"].get(stage, 0.0) for stage in TRAINING_STAGES)
        per_update = (cold["seconds"]["update"] + cold["seconds"]["batch"]) / cold["steps"]
        control = continued_sft(folder, seed, smoke, steps=max(round(seconds / per_update), 1))
        results.append(
            {
                "seed": seed,
                "seconds": {"sft": per_update * cold["steps"], "rl": seconds},
                "updates": {"sft": cold["steps"], "rl": rl["updates"], "control": control["steps"]},
                "tasks": {
                    task: {**row, "control": control["heldout"][task]["before"]} for task, row in rl["heldout"].items()
                },
            }
        )
        report.write_json(workdir / "results.json", results)
    print()
    print(markdown(results))


def continued_sft(folder: Path, seed: int, smoke: bool, steps: int) -> dict[str, Any]:
    """Held-out accuracy of the cold start trained on for `steps` updates, on other draws of its problems."""
    config = configured(SFT_CONFIG, seed, smoke)
    peak = config["optimizer"]["learning_rate"]
    # A second cosine from a third of the peak: from the peak itself the first updates undo the cold start.
    config["optimizer"] |= {"learning_rate": peak / 3, "decay_updates": max(steps - 20, 1)}
    config |= {"steps": steps, "seed": seed + 1000, "init_from": str(folder / "sft")}
    sft.train(build(sft.SFTConfig, config), folder / "control")
    # An RL run of no steps is an evaluation.
    values = configured(RL_CONFIG, seed, smoke) | {"steps": 0, "init_from": str(folder / "control")}
    summary = loop.train(build(loop.RLConfig, values), folder / "control_evaluated").summary
    return {"steps": steps, "heldout": summary["heldout"]}


def markdown(results: list[dict[str, Any]]) -> str:
    """The table by seed and task, and the means."""
    show = lambda a: f"{a['mean']:.3f} [{a['low']:.3f}, {a['high']:.3f}]"  # noqa: E731
    lines = [
        "| task | seed | n | majority | before (SFT) | after (CISPO) | lift | control (SFT continued) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in results[0]["tasks"]:
        for result in results:
            row = result["tasks"][task]
            lift = row["after"]["mean"] - row["before"]["mean"]
            cells = [task, result["seed"], row["after"]["n"], f"{row['majority']:.3f}", show(row["before"]),
                     show(row["after"]), f"{lift:+.3f}", show(row["control"])]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        mean = lambda key, task=task: np.mean([r["tasks"][task][key]["mean"] for r in results])  # noqa: E731
        lines.append(
            f"| {task} | mean | | | {mean('before'):.3f} | {mean('after'):.3f} "
            f"| {mean('after') - mean('before'):+.3f} | {mean('control'):.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
