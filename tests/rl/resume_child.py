"""A run in a process of its own, to be killed. Such processes are forked from one that has imported everything."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments import cli
from m1jax.rl.loop import train
from m1jax.train.clock import Clock
from tests import runs


def config(folder: Path, **changes: Any):
    """One layer, since what is saved and restored hangs on no kind of it."""
    return runs.rl_config(folder, model=dict(runs.ONE_LAYER), init_from=str(folder / "bigram"), **changes)


def run(folder: Path, name: str, stages: Connection, errors: Path, changes: dict[str, Any]) -> None:
    """Train in `folder / name`; sends the name of every stage as it begins, so that the parent can choose its moment.

    As an entry point it exits with a code, and says on stderr, here a file, why.
    """
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    stage = Clock.stage

    def announced(self, name):
        stages.send(name)
        return stage(self, name)

    Clock.stage = announced
    stages.send("start")
    made = config(folder, **changes)
    sys.exit(cli.guard(lambda: train(made, folder / name, log=lambda _: None), resume="THE COMMAND"))
