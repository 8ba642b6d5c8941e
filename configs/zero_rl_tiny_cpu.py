"""Zero-RL of the tiny base model, 16 updates per generation batch: the setting in which algorithms differ.

    python -m experiments.train_rl --config=configs/zero_rl_tiny_cpu.py --workdir=runs/zero_rl --init_from=runs/base

With --config.loss=dapo or grpo instead.
"""

from ml_collections import ConfigDict

from configs import algorithms, models
from configs.sft_tiny_cpu import BITS


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            seed=0,
            steps=16,
            tasks=BITS,
            model=models.tiny(),
            tokenizer=dict(path="configs/tokenizers/reasoning_512.json"),
            problems=dict(per_task=100_000, heldout_share=0.3, max_prompt_tokens=32),
            rollout=dict(prompts=64, responses=8, engine_rows=512),
            sampling=dict(max_tokens=96, temperature=1.0),
            reward=dict(format_weight=0.0, workers=1),
            loss=algorithms.cispo(),
            update=dict(updates_per_batch=16, passes=1, micro_batch_rows=16, row_tokens=128),  # the paper: 16
            optimizer=dict(learning_rate=3e-4, warmup_updates=16, max_grad_norm=1.0),
            evaluation=dict(every=1, problems=512, sampling=dict(max_tokens=96, temperature=1.0)),
            checkpoint=dict(every=8, keep=1),
        )
    )
    if argument == "smoke":
        config.update(
            dict(
                steps=2,
                rollout=dict(prompts=4, responses=4, engine_rows=16),
                sampling=dict(max_tokens=16),
                update=dict(updates_per_batch=2, micro_batch_rows=4, row_tokens=0),
                evaluation=dict(every=1, problems=8, sampling=dict(max_tokens=16)),
                checkpoint=dict(every=1),
            )
        )
    elif argument:
        raise ValueError(f"unknown argument {argument!r}; there is smoke")
    return config
