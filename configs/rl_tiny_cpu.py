"""CISPO on the tiny model, from the SFT cold start: the demo's reinforcement learning.

python -m experiments.train_rl --config=configs/rl_tiny_cpu.py --workdir=runs/rl_tiny --init_from=runs/sft_tiny
"""

from ml_collections import ConfigDict

from configs import models
from configs.sft_tiny_cpu import BITS, SUMS


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            seed=0,
            steps=100,
            tasks=f"{BITS}, 5 * {SUMS}",  # sums have more left to learn
            model=models.tiny(),
            tokenizer=dict(path="configs/tokenizers/reasoning_512.json"),
            problems=dict(per_task=100_000, heldout_share=0.3, max_prompt_tokens=32),
            # Many prompts, few responses: an update should see more than a handful of the facts that it moves.
            rollout=dict(prompts=64, responses=8, engine_rows=512),
            sampling=dict(max_tokens=96, temperature=1.0),
            reward=dict(format_weight=0.1, workers=2),
            loss=dict(
                weight_cap=5.0,
                aggregation="group_tokens",  # equation 4
                ratio_anchor="rollout",
            ),
            update=dict(updates_per_batch=2, passes=1, micro_batch_rows=16, row_tokens=128),
            optimizer=dict(
                learning_rate=3e-4,
                warmup_updates=4,
                schedule="linear",  # the end of the decay is where sampling noise of the gradient stops hurting
                decay_updates=196,
                final_fraction=0.02,
                max_grad_norm=1.0,
            ),
            evaluation=dict(every=20, problems=600, sampling=dict(max_tokens=96, temperature=1.0)),
            checkpoint=dict(every=20, keep=2),
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
