r"""CISPO on MiniMax-M1 itself, 456B parameters, as its trainer on 512 TPU v5p chips runs it (arXiv 2506.13585).

    python -m experiments.plan --aot=v5p:8x8x8 --config=configs/rl_m1.py         # memory, FLOPs, messages, dollars
    python -m experiments.plan --aot=v5p:8x8x8 --config=configs/rl_m1.py:80k     # the last window of the run

The answers come from rollout servers: rl_m1_sglang.py is this config with them. Compiled for those chips, never run.
The paper gives neither batch nor group sizes nor learning rate of its RL: they are DAPO's (arXiv 2503.14476); the cap
is ours, and so is the layout, since the paper's 512 GPUs were laid out in a way that it does not tell. Data:
rl_qwen2_5_32b_cispo.py says how the file is made.
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
                engine_rows=2048,  # in this process; 16 answers of a prompt on each of 128 groups of 4 chips
                dynamic_sampling=True,  # section 3.1
                max_prompts=1536,
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
            update=dict(
                updates_per_batch=16,  # section 3.1: 16 rounds
                passes=1,
                micro_batch_rows=128,  # one answer of each of 128 groups of 4 chips
                row_tokens=0,
            ),
            mesh=dict(data=1, fsdp=16, expert=8, tensor=4),
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
    # Steps of 1e-6 are lost on bfloat16; and what 40K tokens leave behind in 80 layers fits only as their inputs.
    config.update(dict(model=dict(param_dtype="float32", remat="layer")))
    if argument == "80k":
        config.update(
            dict(
                sampling=dict(max_tokens=81_920),
                evaluation=dict(sampling=dict(max_tokens=81_920)),
                update=dict(micro_batch_rows=64),
                mesh=dict(fsdp=8, context=2),  # twice the tokens of a row on twice the chips
            )
        )
    elif argument == "smoke":
        shrink(config)
        small = dict(num_kv_heads=1, layer_pattern=("lightning", "softmax"), rotary_dim=8, num_experts=4)
        config.update(dict(model=small, rollout=dict(max_prompts=12), sampling=dict(repetition_run=8)))
        config.mesh = dict()
    elif argument:
        raise ValueError(f"unknown argument {argument!r}; there are 80k and smoke")
    return config
