r"""CISPO on Qwen2.5-32B-base as rl_qwen2_5_32b_cispo.py has it, with SGLang servers as the samplers.

    python -m experiments.convert_weights --from=Qwen2.5-32B --to=runs/qwen2_5_32b
    PLATFORM=cuda HOST=0.0.0.0 launch/sglang.sh /shared/Qwen2.5-32B 30000 --tp-size 4 --context-length 32768
    python -m experiments.train_rl --config=configs/rl_qwen2_5_32b_sglang.py --workdir=/shared/qwen2_5_32b_sglang \
        --init_from=runs/qwen2_5_32b --config.servers.urls='("http://rollout-0:30000","http://rollout-1:30000")'

The second line on every rollout host. The run folder has to be on a disk that the servers see under the same path:
weights go through it, 66 GB in bfloat16 for each of the three versions that are kept. Never run here; for the trainer's
side see the config that this one changes.
"""

from ml_collections import ConfigDict

from configs import algorithms
from configs.rl_qwen2_5_32b_cispo import DYNAMIC_SAMPLING, OVERLONG, figure_2

AHEAD = dict(staleness=1)  # our choice: the next batch is sampled during the updates, one batch old at most
SERVERS = dict(
    urls=tuple(f"http://rollout-{host}:30000" for host in range(8)),  # our choice: 8 hosts of 4 GPUs
    weights_dtype="bfloat16",  # what a server computes in; the trainer keeps float32
    in_flight=128,  # with 8 hosts a thousand answers at a time
    stream_interval=64,  # at some ten thousand tokens a second the client takes a few percent of a core
)


def get_config(argument: str = "") -> ConfigDict:
    config = figure_2(argument, algorithms.cispo(), DYNAMIC_SAMPLING | AHEAD, OVERLONG)
    if not argument:  # shrunk, it samples in this process
        config.update(dict(servers=SERVERS))
    return config
