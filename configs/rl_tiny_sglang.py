"""CISPO on the tiny model with an SGLang server of this machine as the sampler: the demo's run, shorter.

    python -m experiments.train_sft --config=configs/sft_tiny_cpu.py --workdir=runs/sft
    launch/local_sglang.sh configs/rl_tiny_sglang.py runs/rl_sglang runs/sft

The script exports the model, starts the server, trains, and ends the server. Where a server runs already:

    python -m experiments.train_rl --config=configs/rl_tiny_sglang.py --workdir=runs/rl_sglang --init_from=runs/sft

On a CPU the server computes a token at a time in plain torch: what this shows is the whole way, not speed.
"""

from ml_collections import ConfigDict

from configs.rl_tiny_cpu import get_config as rl_tiny_cpu


def get_config(argument: str = "") -> ConfigDict:
    config = rl_tiny_cpu(argument)
    if not argument:
        config.update(
            dict(
                steps=20,
                rollout=dict(prompts=16, responses=8, engine_rows=128),
                optimizer=dict(decay_updates=36),
                evaluation=dict(every=10, problems=100),
                checkpoint=dict(every=5),
                servers=dict(
                    urls=("http://127.0.0.1:30000",),  # launch/sglang.sh takes the port
                    in_flight=16,  # what that server computes at a time on a CPU
                    patience_s=300.0,
                ),
            )
        )
    return config  # shrunk, it samples in this process: no server is needed to try it
