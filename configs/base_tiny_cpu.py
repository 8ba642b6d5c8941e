"""A tiny base model: next-token pre-training on pages about two tasks, for reinforcement learning without SFT.

    python -m experiments.train_sft --config=configs/base_tiny_cpu.py --workdir=runs/base

What the pages look like: m1jax/data/base_pages.py.
"""

from ml_collections import ConfigDict

from configs import models
from configs.sft_tiny_cpu import BITS, SUMS


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            seed=0,
            steps=1200,
            tasks=f"{BITS}, 2 * {SUMS}",
            text="m1jax.data.base_pages:page",
            loss_on="all",  # a base model: questions are learnt as well as what follows them
            reflection=0.05,
            model=models.tiny(),
            tokenizer=dict(path="configs/tokenizers/reasoning_512.json"),
            problems=dict(per_task=100_000, heldout_share=0.3, max_prompt_tokens=32),
            rows=dict(per_update=12, tokens=128, micro_batch_rows=12),
            router=dict(balance_coefficient=1e-3),
            optimizer=dict(
                learning_rate=5e-3,
                warmup_updates=20,
                schedule="cosine",
                decay_updates=1180,
                final_fraction=0.02,
                max_grad_norm=1.0,
            ),
            checkpoint=dict(every=400, keep=1),
        )
    )
    if argument == "smoke":
        config.update(dict(steps=3, rows=dict(per_update=4, tokens=128, micro_batch_rows=2), checkpoint=dict(every=2)))
    elif argument:
        raise ValueError(f"unknown argument {argument!r}; there is smoke")
    return config
