"""A run in a process of its own, to be killed: python -m tests.rl.resume_child FOLDER RUN [section__key=int ...]

Prints the name of every stage as it begins, so that the parent can choose its moment.
"""

import sys
from pathlib import Path

from experiments import cli
from m1jax.train.clock import Clock
from tests import runs


def main() -> None:
    folder, run = Path(sys.argv[1]), sys.argv[2]
    changes = {key: int(value) for key, value in (word.split("=") for word in sys.argv[3:])}
    stage = Clock.stage

    def announced(self, name):
        print(f"stage {name}", flush=True)
        return stage(self, name)

    Clock.stage = announced
    print("stage start", flush=True)
    from m1jax.rl.loop import train

    train(runs.rl_config(folder, init_from=str(folder / "bigram"), **changes), folder / run)


if __name__ == "__main__":
    sys.exit(cli.guard(main, resume="THE COMMAND"))
