r"""CISPO on a real language model without a GPU: SmolLM2-135M-Instruct on sums of three or four numbers.

    (weights and warm-up: configs/sft_smollm2_cpu.py)
    python -m experiments.train_rl --config=configs/rl_smollm2_cpu.py --workdir=runs/smollm2_rl \
        --init_from=runs/smollm2_sft
"""

from ml_collections import ConfigDict

from configs import models
from configs.sft_smollm2_cpu import SUMS, TOKENIZER, shrink


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            seed=0,
            steps=12,
            tasks=SUMS,
            model=models.smollm2_135m(),
            tokenizer=TOKENIZER,
            problems=dict(per_task=100_000, heldout_share=0.3, max_prompt_tokens=80),
            rollout=dict(prompts=16, responses=8, engine_rows=128),
            sampling=dict(max_tokens=64, temperature=1.0),
            reward=dict(format_weight=0.1, workers=2),
            loss=dict(
                weight_cap=5.0,
                aggregation="group_tokens",  # equation 4
                ratio_anchor="rollout",
            ),
            update=dict(updates_per_batch=4, passes=1, micro_batch_rows=4, row_tokens=256),
            optimizer=dict(
                learning_rate=2e-5,
                warmup_updates=2,
                schedule="linear",
                decay_updates=46,
                final_fraction=0.1,
                max_grad_norm=1.0,
            ),
            evaluation=dict(every=6, problems=300, sampling=dict(max_tokens=64, temperature=1.0)),
            checkpoint=dict(every=4, keep=1),
        )
    )
    if argument == "smoke":
        shrink(config)
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
