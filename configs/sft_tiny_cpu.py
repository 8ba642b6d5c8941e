"""SFT cold start of the tiny model: worked solutions of two reasoning_gym tasks, with slips that get corrected.

    python -m experiments.train_sft --config=configs/sft_tiny_cpu.py --workdir=runs/sft_tiny

Two laptop cores, about 3 minutes. Stop early on purpose: reinforcement learning needs room above.
"""

from ml_collections import ConfigDict

from configs import models

BITS = "count_bits(min_n=1, max_n=2047)"
SUMS = (
    "basic_arithmetic(min_terms=3, max_terms=4, min_digits=1, max_digits=1, operators=('+',), "
    "allow_parentheses=False, allow_negation=False)"
)


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            seed=0,
            steps=600,
            tasks=f"{BITS}, 2 * {SUMS}",  # solutions of sums are short, and their arithmetic comes late
            reflection=0.15,  # a slip and its correction in one of seven steps
            model=models.tiny(),
            tokenizer=dict(path="configs/tokenizers/reasoning_512.json"),
            problems=dict(per_task=100_000, heldout_share=0.3, max_prompt_tokens=32),
            # Small batches: at this size the number of updates decides, not the number of tokens.
            rows=dict(per_update=12, tokens=128, micro_batch_rows=12),
            router=dict(balance_coefficient=1e-3),
            optimizer=dict(
                learning_rate=5e-3,
                warmup_updates=20,
                schedule="cosine",
                decay_updates=580,
                final_fraction=0.02,
                max_grad_norm=1.0,
            ),
            checkpoint=dict(every=200, keep=2),
        )
    )
    if argument == "smoke":
        config.update(dict(steps=3, rows=dict(per_update=4, tokens=128, micro_batch_rows=2), checkpoint=dict(every=2)))
    elif argument:
        raise ValueError(f"unknown argument {argument!r}; there is smoke")
    return config
