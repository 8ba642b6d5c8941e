r"""CISPO on MiniMax-M1 itself, 456B parameters, with SGLang servers as the samplers (arXiv 2506.13585).

    python -m experiments.convert_weights --from=MiniMax-M1-40k --to=/shared/m1
    PLATFORM=cuda HOST=0.0.0.0 launch/sglang.sh /shared/MiniMax-M1-40k 30000 --tp-size 8 --context-length 45056
    python -m experiments.train_rl --config=configs/rl_m1_sglang.py --workdir=/shared/rl_m1 --init_from=/shared/m1

The second line on every rollout host, in an environment with the package `m1jax.serving` (BUILD.md, "Serving
MiniMax-M1 with SGLang"). Never run, and not yet to be run: the trainer needs its parameters sharded over many hosts.
The paper gives neither batch nor group sizes nor learning rate of its RL: they are DAPO's (arXiv 2503.14476); the cap
is ours. Data: rl_qwen2_5_32b_cispo.py says how the file is made.
"""

from ml_collections import ConfigDict

from configs import algorithms, models
from configs.rl_qwen2_5_32b_cispo import shrink


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            seed=0,
            steps=1000,
            tasks="dapo_math_17k.jsonl",
            model=models.m1(),
            tokenizer=dict(path="/shared/m1/huggingface/tokenizer.json"),
            problems=dict(per_task=100_000, heldout_share=0.0, max_prompt_tokens=2048),
            rollout=dict(
                prompts=512,
                responses=16,
                engine_rows=512,
                dynamic_sampling=True,  # section 3.1
                max_prompts=1536,
                staleness=1,
                router_replay="off",  # "use" needs servers with --enable-return-routed-experts
            ),
            sampling=dict(
                max_tokens=40_960,  # the first window, section 4.2; then 48K to 80K
                temperature=1.0,
                repetition_run=3000,  # section 4.2: ends what repeats itself
                repetition_probability=0.99,
            ),
            reward=dict(format_weight=0.1, workers=16),
            loss=algorithms.cispo(),
            update=dict(updates_per_batch=16, passes=1, micro_batch_rows=8, row_tokens=0),  # section 3.1: 16 rounds
            optimizer=dict(
                learning_rate=1e-6,
                warmup_updates=320,
                b1=0.9,  # section 3.2, as b2 and eps
                b2=0.95,
                eps=1e-15,
                weight_decay=0.0,
                max_grad_norm=1.0,
            ),
            evaluation=dict(
                every=10,
                tasks="aime_2024.jsonl",
                problems=30,
                sampling=dict(max_tokens=40_960, temperature=1.0, top_p=0.95),  # section 5
            ),
            checkpoint=dict(every=5, keep=2),
        )
    )
    servers = dict(
        urls=tuple(f"http://rollout-{host}:30000" for host in range(16)),
        weights_dtype="bfloat16",  # 912 GB a version; three are kept
        in_flight=64,
        stream_interval=64,
        update_s=3600.0,
    )
    if not argument:
        config.update(dict(servers=servers))  # shrunk, it samples in this process
    elif argument == "smoke":
        shrink(config)
        small = dict(num_kv_heads=1, layer_pattern=("lightning", "softmax"), rotary_dim=8, num_experts=4)
        config.update(dict(model=small, rollout=dict(max_prompts=12), sampling=dict(repetition_run=8)))
    else:
        raise ValueError(f"unknown argument {argument!r}; there is smoke")
    return config
