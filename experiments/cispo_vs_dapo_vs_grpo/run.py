"""All runs of the study, two at a time on a core of their own: base model, tuning, then the runs that count.

    python -m experiments.cispo_vs_dapo_vs_grpo.run --phase=tune      rates, on seeds of their own
    python -m experiments.cispo_vs_dapo_vs_grpo.run                   the study with the rates that won
    ... [--workdir=runs/cispo_vs_dapo_vs_grpo] [--results=WORKDIR/results] [--workers=2]
    ... --smoke                            two steps of small batches, one seed, in a work folder of its own

Each run is one `experiments.train_rl` command and leaves one file of results: a line about the run, then a line of
metrics a step. A file that is there is not run again, so the command goes on where it was stopped; a run that was cut
is started anew, so that its CPU seconds are those of the whole.
`python -m experiments.cispo_vs_dapo_vs_grpo.table --results=FOLDER` reads the files; those of `results/` here are ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from configs.sft_tiny_cpu import BITS, SUMS
from experiments import cli, train_rl
from experiments.cispo_vs_dapo_vs_grpo.results import ALGORITHMS, best_rates, load
from m1jax.config import build, changed_keys, to_dict
from m1jax.errors import UserError
from m1jax.rl.settings import RLConfig
from m1jax.train import report
from m1jax.train.logged import read_logged, write_logged

TASKS = {"count_bits": BITS, "basic_arithmetic": SUMS}
RATES = (1e-4, 2e-4, 4e-4)
TUNING_SEEDS, SEEDS = (100,), (0, 1, 2, 3, 4)
CONFIG, BASE_CONFIG = "configs/zero_rl_tiny_cpu.py", "configs/base_tiny_cpu.py"
KEPT = ("reward/", "rollout/", "train/", "mismatch/", "ratio/", "rare/", "gradient/", "optimizer/", "heldout/", "time/")
"""Metrics that a result keeps; histograms by decade are left out."""


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    phase: str
    task: str
    algorithm: str
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """File name of its result."""
        rate = f"_lr{self.learning_rate:g}" if self.phase == "tune" else ""
        return f"{self.task}_{self.algorithm}{rate}_seed{self.seed}"

    def command(self, base: Path, folder: Path, smoke: bool) -> list[str]:
        """What a reader would type."""
        return [
            sys.executable, "-m", "experiments.train_rl", f"--config={CONFIG}{':smoke' * smoke}",
            f"--workdir={folder}", f"--init_from={base}", f"--config.seed={self.seed}",
            f"--config.tasks={TASKS[self.task]}", f"--config.loss={self.algorithm}",
            f"--config.optimizer.learning_rate={self.learning_rate:g}",
        ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("tune", "study"), default="study")
    parser.add_argument("--workdir", default="")
    parser.add_argument("--results", default="", help="folder of the results; by default one in the workdir")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="two steps of small batches, one seed")
    arguments = parser.parse_args()
    workdir = Path(arguments.workdir or "runs/cispo_vs_dapo_vs_grpo" + "_smoke" * arguments.smoke)
    results = Path(arguments.results) if arguments.results else workdir / "results"
    command = " ".join([sys.executable, "-m", "experiments.cispo_vs_dapo_vs_grpo.run", *sys.argv[1:]])
    raise SystemExit(
        cli.guard(lambda: study(arguments.phase, workdir, results, arguments.workers, arguments.smoke), command)
    )


def jobs(phase: str, results: Path, smoke: bool) -> list[Job]:
    """The runs of a phase. Seeds come outermost: what is there after a stop is paired.

    Raises:
        UserError: the study is asked for before its rates are tuned.
    """
    if phase == "tune":
        seeds, rates = (TUNING_SEEDS[:1], RATES[:1]) if smoke else (TUNING_SEEDS, RATES)
        return [Job(phase, t, a, s, r) for s in seeds for r in rates for t, a in itertools.product(TASKS, ALGORITHMS)]
    if missing := [job.name for job in jobs("tune", results, smoke) if not result_file(results, job).exists()]:
        raise UserError(
            f"{results}/tune: {len(missing)} runs are missing, {missing[0]} the first; run with --phase=tune first"
        )
    best = best_rates(load(results / "tune"))
    return [
        Job(phase, t, a, s, best[t, a])
        for s in (SEEDS[:1] if smoke else SEEDS)
        for t, a in itertools.product(TASKS, ALGORITHMS)
    ]


def study(phase: str, workdir: Path, results: Path, workers: int, smoke: bool) -> None:
    """Run what is not there yet."""
    base = make_base(workdir, smoke)
    wanted = jobs(phase, results, smoke)
    for job in wanted:
        refuse_other_config(job, result_file(results, job), base, smoke)
    todo = [job for job in wanted if not result_file(results, job).exists()]
    total = len(wanted)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    free = [cores[i % len(cores)] for i in range(workers)]
    running: dict[int, tuple[Job, Path, int | None, subprocess.Popen]] = {}
    with tqdm(total=total, initial=total - len(todo), desc=phase, unit="run") as bar, ended_with_us(running):
        while todo or running:
            while todo and free:
                job, core = todo.pop(0), free.pop()
                folder = workdir / phase / job.name
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                process = start(job.command(base, folder, smoke), folder / "log.txt", core)
                running[process.pid] = (job, folder, core, process)
            time.sleep(0.5)
            for pid, (job, folder, core, process) in list(running.items()):
                found, status, usage = os.wait4(pid, os.WNOHANG)
                if not found:
                    continue
                process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
                del running[pid]
                free.append(core)
                if process.returncode:
                    raise UserError(f"{job.name} ended with code {process.returncode}; its output: {folder}/log.txt")
                keep(job, folder, usage.ru_utime + usage.ru_stime, result_file(results, job))
                bar.update()
                bar.set_postfix_str(job.name)


@contextmanager
def ended_with_us(running: Mapping[int, tuple[Job, Path, int | None, subprocess.Popen]]) -> Iterator[None]:
    """Leave no run behind: not after a failure of one, Ctrl-C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for *_, process in running.values():
            process.kill()  # a cut run starts anew, so there is nothing to save
            process.wait()


def result_file(results: Path, job: Job) -> Path:
    """Where the result of a run lies."""
    return results / job.phase / f"{job.name}.jsonl"


def refuse_other_config(job: Job, result: Path, base: Path, smoke: bool) -> None:
    """Raise UserError where a result is there that was made with other settings than the job's."""
    if result.exists():
        wanted = to_dict(build(RLConfig, cli.parse(job.command(base, base, smoke)[3:], train_rl.add_flags).config))
        there = read_logged(result)[0]["config"]
        changed = changed_keys(there, json.loads(json.dumps(wanted)))
        if odd := [change for change in changed if change[0] != "init_from"]:
            key, old, new = odd[0]
            raise UserError(
                f"{result}: made with {key} = {old!r}, now it is {new!r}; delete it, or use another workdir"
            )


def make_base(workdir: Path, smoke: bool) -> Path:
    """The base model's run folder, trained where it is not."""
    base = workdir / "base"
    if not (base / report.SUMMARY).exists():
        config = BASE_CONFIG + ":smoke" * smoke
        subprocess.run(
            [sys.executable, "-m", "experiments.train_sft", f"--config={config}", f"--workdir={base}"], check=True
        )
    return base


def start(command: list[str], log: Path, core: int | None) -> subprocess.Popen:
    """The command on one core, one device with one thread, its output in `log`."""

    def pin() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with log.open("a") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, preexec_fn=pin)


def keep(job: Job, folder: Path, cpu_seconds: float, path: Path) -> None:
    """Write the result of a finished run."""
    run = report.load_run(folder)
    about = asdict(job) | {"cpu_seconds": round(cpu_seconds, 1), "config": run.config}
    rows = [
        {"step": row["step"]} | {k: v for k, v in row.items() if k.startswith(KEPT) and "log10" not in k}
        for row in run.metrics
    ]
    write_logged(path, about, rows)


if __name__ == "__main__":
    main()
