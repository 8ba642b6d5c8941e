"""CISPO from the command line.

python -m experiments.train_rl --config=configs/rl_tiny_cpu.py[:smoke] --workdir=DIR [--init_from=CHECKPOINT]
                               [--config.loss.weight_cap=5]
"""

from __future__ import annotations

from experiments import cli
from m1jax.config import build
from m1jax.rl.loop import RLConfig, train


def main(arguments: cli.Arguments) -> None:
    if arguments.init_from:
        arguments.config["init_from"] = str(arguments.init_from)
    train(build(RLConfig, arguments.config), arguments.workdir)


if __name__ == "__main__":
    cli.run(main, memory="config.update.micro_batch_rows (or, in the rollout, config.rollout.engine_rows)")
