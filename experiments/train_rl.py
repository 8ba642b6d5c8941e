"""CISPO from the command line.

python -m experiments.train_rl --config=configs/rl_tiny_cpu.py[:smoke] --workdir=DIR [--init_from=CHECKPOINT]
                               [--config.loss.weight_cap=5] [--overfit_one_batch] [--replay=RUN]

--overfit_one_batch asks the same prompts in every step: the reward has to go to its maximum, or something is wrong.
--replay trains on the rollouts that another run saved (--config.rollout.save=true), without an engine.
"""

from __future__ import annotations

import argparse

from experiments import cli
from m1jax.config import build
from m1jax.rl.loop import RLConfig, train
from m1jax.train.hosts import together


def main(arguments: cli.Arguments) -> None:
    if arguments.init_from:
        arguments.config["init_from"] = str(arguments.init_from)
    if arguments.more.overfit_one_batch:
        arguments.config["rollout"]["overfit_one_batch"] = True
    if arguments.more.replay:
        arguments.config["rollout"]["replay"] = arguments.more.replay
    train(together(lambda: build(RLConfig, arguments.config)), arguments.workdir)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overfit_one_batch", action="store_true", help="ask the same prompts in every step")
    parser.add_argument("--replay", metavar="RUN", help="train on the rollouts that this run saved, without an engine")


if __name__ == "__main__":
    memory = "config.update.micro_batch_rows (or, in the rollout, config.rollout.engine_rows)"
    cli.run(main, memory, add_flags)
