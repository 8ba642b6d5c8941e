"""Interrupted at any moment and resumed: bit for bit the run that was never interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from m1jax.rl.loop import train
from m1jax.train import sft
from m1jax.train.checkpoint import restore_params, steps
from m1jax.train.interrupt import Interrupted
from m1jax.train.report import load_run
from tests import runs
from tests.rl import resume_child

CONSTANT = (
    "reward/", "rollout/", "sampling/", "train/", "ratio/", "rare/", "mismatch/", "gradient/", "optimizer/", "heldout/",
)  # fmt: skip
"""Metrics that do not measure time."""


FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.rl.resume_child"])  # imports take longer than the run


@dataclass
class Child:
    """A run in a process of its own (`tests.rl.resume_child`)."""

    process: BaseProcess
    stages: Connection
    errors: Path

    def reaches(self, stage: str, occurrence: int = 1) -> bool:
        """Return when it enters the stage for that time; False where it ended first."""
        while occurrence:
            try:
                occurrence -= self.stages.recv() == stage
            except EOFError:
                return False
        return True

    def end(self) -> tuple[int | None, str]:
        """Its exit code, once it has ended, and what it said on stderr."""
        self.reaches("its end")  # no stage of this name: until it has closed its end of the pipe
        self.process.join(120)
        return self.process.exitcode, self.errors.read_text()


def start(folder: Path, run: str, **changes: Any) -> Child:
    stages, its_end = FORKED.Pipe(duplex=False)
    errors = folder / f"{run}.stderr"
    process = FORKED.Process(target=resume_child.run, args=(folder, run, its_end, errors, changes))
    process.start()
    its_end.close()
    return Child(process, stages, errors)


def assert_same_run(found: Path, wanted: Path) -> None:
    """Parameters bit for bit, every step once and with the same numbers, a summary with the same results."""
    jax.tree.map(np.testing.assert_array_equal, restore_params(found)[0], restore_params(wanted)[0])
    ours, theirs = load_run(found), load_run(wanted)
    timeless = lambda row: {k: v for k, v in row.items() if k == "step" or k.startswith(CONSTANT)}  # noqa: E731
    assert [timeless(row) for row in ours.metrics] == [timeless(row) for row in theirs.metrics]
    assert [row["step"] for row in ours.metrics] == list(range(ours.config["steps"] + 1))
    for key in ("heldout", "steps", "updates"):
        assert ours.summary[key] == theirs.summary[key]
    assert timeless(ours.summary["final"]) == timeless(theirs.summary["final"])
    assert (found / "samples.md").read_text() == (wanted / "samples.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds the parameters to start from, and `whole`, a run of three steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("resume")
    runs.save_bigram(folder, **runs.ONE_LAYER)
    train(resume_child.config(folder), folder / "whole", log=lambda _: None)
    first, last = restore_params(folder / "bigram")[0], restore_params(folder / "whole")[0]
    assert np.abs(first["head"] - last["head"]).max() > 1e-3, "the run learns, so that equality says something"
    return folder


def test_killed_before_the_first_checkpoint_and_after_it(folder):
    """The first kill leaves a claimed folder without a checkpoint: the second start must take `init_from` again."""
    for stage, occurrence in (("evaluate", 1), ("update", 2)):
        child = start(folder, "killed")
        assert child.reaches(stage, occurrence)
        child.process.kill()
        assert child.end()[0] == -signal.SIGKILL
    assert steps(folder / "killed" / "checkpoints"), "the second process got beyond a batch boundary"
    result = train(resume_child.config(folder), folder / "killed", log=lambda _: None)
    assert_same_run(result.folder, folder / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_the_step_and_prints_the_line_that_resumes(folder, number, code):
    """With checkpoint.every = 100 nothing but the signal saves after step 0."""
    child = start(folder, number.name, checkpoint__every=100)
    assert child.reaches("update")
    os.kill(child.process.pid, number)
    assert child.end() == (code, "stopped and saved; resume with: THE COMMAND\n")
    run = folder / number.name
    assert steps(run / "checkpoints")[-1] == 1 and not (run / "summary.json").exists()
    lines: list[str] = []
    train(resume_child.config(folder, checkpoint__every=100), run, log=lines.append)
    assert f"resumed {run} after step 1 of 3" in lines
    assert_same_run(run, folder / "whole")


def test_a_finished_run_does_nothing_again(folder):
    files = [folder / "whole" / name for name in ("metrics.jsonl", "summary.json", "samples.md", "config.json")]
    before = [file.read_bytes() for file in files]
    saved = {p: p.stat().st_mtime_ns for p in (folder / "whole" / "checkpoints").rglob("*")}
    train(resume_child.config(folder), folder / "whole", log=lambda _: None)
    assert [file.read_bytes() for file in files] == before
    assert {p: p.stat().st_mtime_ns for p in (folder / "whole" / "checkpoints").rglob("*")} == saved


def test_supervised_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Six updates at once, against SIGTERM after the third (or fourth: the signal comes between two) and the rest."""
    whole = sft.train(runs.sft_config(), tmp_path / "whole", log=lambda _: None)

    write = sft.JsonlSink.write
    monkeypatch.setattr(
        sft.JsonlSink,
        "write",
        lambda s, step, m: (write(s, step, m), step == 3 and signal.raise_signal(signal.SIGTERM)),
    )
    with pytest.raises(Interrupted) as caught:
        sft.train(runs.sft_config(), tmp_path / "halves", log=lambda _: None)
    assert caught.value.exit_code == 75 and steps(tmp_path / "halves" / "checkpoints") == [3]
    monkeypatch.undo()
    halves = sft.train(runs.sft_config(), tmp_path / "halves", log=lambda _: None)
    jax.tree.map(np.testing.assert_array_equal, halves.params, whole.params)
    losses = [[(row["step"], row["train/loss"]) for row in run.metrics] for run in (halves, whole)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]
    assert losses[0][-1][1] < losses[0][0][1], "it learns, so that equality says something"
    assert halves.summary["steps"] == whole.summary["steps"] == 6


KILLS = 20
STAGES = {"start": 3.0, "evaluate": 3.0, "rollout": 3.0, "reward": 0.1, "update": 4.0, "sync": 0.05, "save": 0.3}
"""Where a kill may fall, and the seconds after which at most: those of start, evaluate, rollout and update are longer
than the stage, so that they reach into compilation (the first time) and into what comes next."""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(folder):
    """SIGKILL at 20 random moments, run after run; each run that got to its end is the uninterrupted one."""
    rng, killed, finished, current = random.Random(0), [], 0, 0
    while len(killed) < KILLS or finished < 2:
        run = f"random{current}"
        child = start(folder, run)
        if len(killed) < KILLS:
            stage = [*STAGES][len(killed) % len(STAGES)]
            if child.reaches(stage, rng.choice((1, 1, 2))):
                time.sleep(rng.uniform(0, STAGES[stage]))
            child.process.kill()
        code, said = child.end()
        if code == -signal.SIGKILL:
            killed.append(stage)
        else:
            assert code == 0, said
        if (folder / run / "summary.json").exists():
            json.loads((folder / run / "summary.json").read_text())  # whole, whenever the kill came
        if code == 0:
            assert_same_run(folder / run, folder / "whole")
            finished, current = finished + 1, current + 1
    assert set(killed) == set(STAGES)
