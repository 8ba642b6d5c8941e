r"""CISPO on MiniMax-M1 as rl_m1.py has it, with SGLang servers as the samplers (arXiv 2506.13585).

    python -m experiments.convert_weights --from=MiniMax-M1-40k --to=/shared/m1
    PLATFORM=cuda HOST=0.0.0.0 READY_SECONDS=3600 launch/sglang.sh /shared/MiniMax-M1-40k 30000 \
        --tp-size 8 --context-length 45056
    python -m experiments.train_rl --config=configs/rl_m1_sglang.py --workdir=/shared/rl_m1 --init_from=/shared/m1

The second command on every rollout host, 8 GPUs of 141 GB, in an environment with the package `m1jax.serving`
(BUILD.md, "Serving MiniMax-M1 with SGLang"), with --context-length 86016 for `:80k`; the third on every host of the
trainer. launch/gke.yaml has both. Never run.
"""

from ml_collections import ConfigDict

from configs import rl_m1


def get_config(argument: str = "") -> ConfigDict:
    config = rl_m1.get_config(argument)
    if argument != "smoke":  # shrunk, it samples in this process
        servers = dict(
            urls=tuple(f"http://rollout-{host}:30000" for host in range(16)),
            weights_dtype="bfloat16",  # 912 GB a version; three are kept
            in_flight=64,
            stream_interval=64,
            update_s=3600.0,
        )
        config.update(dict(servers=servers, rollout=dict(staleness=1)))
    return config
