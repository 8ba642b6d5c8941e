"""Supervised fine-tuning from the command line.

python -m experiments.train_sft --config=configs/sft_tiny_cpu.py[:smoke] --workdir=DIR [--init_from=CHECKPOINT]
"""

from __future__ import annotations

from experiments import cli
from m1jax.config import build
from m1jax.train import sft
from m1jax.train.hosts import together


def main(arguments: cli.Arguments) -> None:
    if arguments.init_from:
        arguments.config["init_from"] = str(arguments.init_from)
    sft.train(together(lambda: build(sft.SFTConfig, arguments.config)), arguments.workdir)


if __name__ == "__main__":
    cli.run(main, memory="config.rows.micro_batch_rows")
