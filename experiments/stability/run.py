"""All runs of the study, one after another: base model, large-logit copy of it, sweep, then E1 and E2.

    python -m experiments.stability.run [--workdir=runs/stability] [--smoke]

Each run is one command as a reader would type it and leaves one file of `results/` (with --smoke, of WORKDIR/results,
where WORKDIR is runs/stability_smoke if not given):
a line about the run, then a line of metrics a step. A file that is there is not run again, so the command goes on where
it was stopped. `python -m experiments.stability.draw` makes figure and tables of the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")  # sums over two devices round otherwise, which E1 would see

from tqdm import tqdm

from experiments import cli
from experiments.stability.results import RESULTS
from m1jax.config import build
from m1jax.errors import UserError
from m1jax.rl.settings import RLConfig
from m1jax.train import report
from m1jax.train.logged import write_logged

CONFIG, BASE_CONFIG = "configs/zero_rl_tiny_cpu.py", "configs/base_tiny_cpu.py"
SEEDS = {"head": (0,), "adam": (0,)}
"""By study. Seeds come outermost: what is there after a stop can be compared."""
SIZES = (0, 16, 32, 64, 128, 192, 256)
"""Common logits of the sweep."""
COMMON_LOGIT = 192
"""The one that training is done with: the correlation falls a little below the 0.987 of the paper's Figure 3."""
OPTIMIZERS = {
    "paper": dict(b1=0.9, b2=0.95, eps=1e-15),
    "paper_eps_1e-8": dict(b1=0.9, b2=0.95, eps=1e-8),
    "defaults": dict(b1=0.9, b2=0.999, eps=1e-8),
}
GRADIENT_NORMS = {"ordinary": 1.0, "tiny": 1e-11}
"""Clips of the global gradient norm. The second one makes gradients as small as the paper reports them: entries of
814,592 parameters are then 1e-14 in the root mean square. It acts on every update, the first one rarely."""
KEPT = (
    "reward/mean", "rollout/entropy", "rollout/length_mean", "mismatch/", "ratio/abs_log", "ratio/capped_share_pos",
    "train/grad_norm", "train/update_norm", "gradient/", "optimizer/", "heldout/", "time/cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        study: "head" (E1) or "adam" (E2).
        name: of its result, seed left out.
        seed: of prompts, their order and sampling noise.
        start: which base model, "base" or "base_large_logits".
        head: dtype of the LM head.
        overrides: `--config.` values.
    """

    study: str
    name: str
    seed: int
    start: str
    head: str
    overrides: dict[str, Any]

    @property
    def file(self) -> str:
        return f"{self.study}_{self.name}_seed{self.seed}.jsonl"

    def command(self, workdir: Path, smoke: bool) -> list[str]:
        """What a reader would type."""
        entry = "experiments.stability.bfloat16_head" if self.head == "bfloat16" else "experiments.train_rl"
        overrides = self.overrides if smoke else SIZE_OF_RUN | self.overrides
        return [
            sys.executable, "-m", entry, f"--config={CONFIG}{':smoke' * smoke}",
            f"--workdir={workdir / self.file.removesuffix('.jsonl')}", f"--init_from={workdir / self.start}",
            f"--config.seed={self.seed}", *(f"--config.{key}={value}" for key, value in overrides.items()),
        ]  # fmt: skip


SIZE_OF_RUN = {
    "steps": 8, "rollout.prompts": 32, "rollout.engine_rows": 256, "update.updates_per_batch": 8,
    "optimizer.warmup_updates": 8, "evaluation.every": 8, "evaluation.problems": 512, "checkpoint.every": 8,
}  # fmt: skip
"""Half a generation batch of the config with half its updates, so that an update sees as many groups."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="")
    parser.add_argument("--smoke", action="store_true", help="two steps of small batches, one seed; into the workdir")
    arguments = parser.parse_args()
    workdir = Path(arguments.workdir or "runs/stability" + "_smoke" * arguments.smoke)
    results = workdir / "results" if arguments.smoke else RESULTS
    command = " ".join(["python", "-m", "experiments.stability.run", *sys.argv[1:]])
    raise SystemExit(cli.guard(lambda: study(workdir, results, arguments.smoke), command))


def jobs() -> list[Job]:
    """Every run, in order."""
    bfloat16, head, adam = {"model.dtype": "bfloat16"}, [], []
    for start, logits in (("base", "ordinary"), ("base_large_logits", "large")):
        for dtype in ("float32", "bfloat16"):
            head.append(Job("head", f"{logits}_logits_{dtype}", 0, start, dtype, bfloat16))
    for size, norm in GRADIENT_NORMS.items():
        for name, values in OPTIMIZERS.items():
            overrides = {f"optimizer.{k}": v for k, v in values.items()} | {"optimizer.max_grad_norm": norm}
            adam.append(Job("adam", f"{size}_gradients_{name}", 0, "base", "float32", overrides))
    seeds = sorted({seed for found in SEEDS.values() for seed in found})
    return [dataclasses.replace(job, seed=s) for s in seeds for job in [*head, *adam] if s in SEEDS[job.study]]


def study(workdir: Path, results: Path, smoke: bool) -> None:
    """Make what is not there yet."""
    results.mkdir(parents=True, exist_ok=True)
    make_base(workdir, smoke)
    make_sweep(workdir, results / "sweep.jsonl", smoke)
    wanted = [job for job in jobs() if job.seed == 0 or not smoke]
    todo = [job for job in wanted if not (results / job.file).exists()]
    with tqdm(todo, total=len(wanted), initial=len(wanted) - len(todo), unit="run") as bar:
        for job in bar:
            bar.set_postfix_str(job.file)
            ended = subprocess.run(job.command(workdir, smoke), stdout=subprocess.DEVNULL)
            if ended.returncode:
                raise UserError(f"{job.file}: its run ended with code {ended.returncode}, see above")
            keep(job, report.load_run(workdir / job.file.removesuffix(".jsonl")), results / job.file)


def make_base(workdir: Path, smoke: bool) -> None:
    """The base model's run folder, trained where it is not."""
    if not (workdir / "base" / report.SUMMARY).exists():
        config = f"--config={BASE_CONFIG}{':smoke' * smoke}"
        command = [sys.executable, "-m", "experiments.train_sft", config, f"--workdir={workdir / 'base'}"]
        subprocess.run(command, check=True)


def make_sweep(workdir: Path, path: Path, smoke: bool) -> None:
    """Correlations before training by size of the logits, and the base model with large ones."""
    if path.exists() and (workdir / "base_large_logits").exists():
        return
    from experiments.stability import common_logit

    config = sweep_config(smoke)
    params = report.load_run(workdir / "base").params
    direction_D = common_logit.mean_head_input(params, config)
    large = common_logit.add_common_logit(params, direction_D, COMMON_LOGIT)
    common_logit.save(large, config, workdir / "base_large_logits")
    rows = [
        row for head in ("float32", "bfloat16") for row in common_logit.sweep(params, direction_D, config, SIZES, head)
    ]
    write_logged(path, {"sizes": SIZES}, rows)


def sweep_config(smoke: bool) -> RLConfig:
    """64 held-out prompts, the body in bfloat16."""
    values = cli.load_config(CONFIG + ":smoke" * smoke)
    values["model"]["dtype"] = "bfloat16"
    if not smoke:
        values["rollout"]["engine_rows"], values["evaluation"]["problems"] = 256, 64
    return build(RLConfig, values)


def keep(job: Job, run: report.RunResult, path: Path) -> None:
    """Write a finished run's result. The histogram of gradients is kept of the first step only."""
    rows = [
        {"step": row["step"]} | {k: v for k, v in row.items() if k.startswith(KEPT) and ("log10" not in k or i == 1)}
        for i, row in enumerate(run.metrics)
    ]
    config = run.config | {"init_from": job.start}  # not where it lay on this machine
    write_logged(path, asdict(job) | {"config": config}, rows)


if __name__ == "__main__":
    main()
