r"""CISPO on Qwen2.5-32B-base: the set-up of MiniMax-M1's Figure 2 (arXiv 2506.13585, section 3.1), for many GPUs.

    python -m experiments.convert_weights --from=Qwen2.5-32B --to=runs/qwen2_5_32b
    python -m experiments.train_rl --config=configs/rl_qwen2_5_32b_cispo.py --workdir=runs/qwen2_5_32b_cispo \
        --init_from=runs/qwen2_5_32b

Its rivals: rl_qwen2_5_32b_dapo.py and rl_qwen2_5_32b_grpo.py. Claim to check: CISPO reaches DAPO's score in half the
steps. Never run here: float32 parameters, their gradients and AdamW's moments are 524 GB, which --config.mesh.data=1
--config.mesh.fsdp=0 deals out to all devices. DAPO took 128 H20 GPUs (its project page).

The paper names model, data, zero-RL, AIME 2024 as the test and 16 updates for each generation batch, no more. What it
does not say is taken from DAPO (arXiv 2503.14476, section 4.1), whose data and base model these are. "Our choice" marks
what neither gives.

Data, `dapo_math_17k.jsonl`: {"prompt": question, "answer": integer} a line, compared by m1jax.rewards.math. The
published rows wrap the question in an instruction of their own and repeat it a hundred times:

    import json
    from datasets import load_dataset
    rows = load_dataset("BytedTsinghua-SIA/DAPO-Math-17k", split="train")
    bare = lambda row: row["prompt"][0]["content"].split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
    pairs = {bare(row): row["reward_model"]["ground_truth"] for row in rows}
    with open("dapo_math_17k.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs.items())

The test, `aime_2024.jsonl`, has the same form and 30 problems. For the mean of 32 answers that is reported, ask an
export with seeds 0 to 31:

    python -m experiments.convert_weights --from=runs/qwen2_5_32b_cispo --to=exported
    python -m experiments.evaluate --model=exported --config=configs/rl_qwen2_5_32b_cispo.py --config.seed=0
"""

from ml_collections import ConfigDict

from configs import algorithms, models
from configs.sft_tiny_cpu import BITS

DYNAMIC_SAMPLING = dict(dynamic_sampling=True, max_prompts=1536)  # DAPO; the bound, three batches, is our choice
OVERLONG = dict(
    overlong_buffer=4096,  # DAPO: 16,384 tokens expected and 4,096 more in which the penalty grows
    overlong_penalty=0.5,  # DAPO: 1, between rewards of -1 and 1; ours are 0 and 1
)


def get_config(argument: str = "") -> ConfigDict:
    # Section 3.1: CISPO keeps the dynamic sampling and the length penalty of DAPO.
    return figure_2(argument, algorithms.cispo(), DYNAMIC_SAMPLING, OVERLONG)


def figure_2(argument: str, loss: dict, rollout: dict, reward: dict) -> ConfigDict:
    """The run that the three algorithms share.

    Args:
        argument: of get_config.
        loss: a block of `algorithms`.
        rollout, reward: what the algorithm adds to these sections.
    """
    config = ConfigDict(
        dict(
            seed=0,
            steps=625,  # generation batches: the 10,000 updates that DAPO's Figure 1 spans
            tasks="dapo_math_17k.jsonl",
            model=models.qwen2_5_32b(),
            tokenizer=dict(
                path="runs/qwen2_5_32b/huggingface/tokenizer.json",
                # Our choice. A base model has to be told of the form, without which no answer is found.
                system_prompt="Solve the problem below. Think first, between <think> and </think>. Then give the final "
                "answer alone, between <answer> and </answer>.",
            ),
            # Nothing is held out, for AIME is the test. Room for all but the longest questions: our choice.
            problems=dict(per_task=100_000, heldout_share=0.0, max_prompt_tokens=2048),
            rollout=dict(prompts=512, responses=16, engine_rows=512) | rollout,  # DAPO; engine_rows is our choice
            sampling=dict(max_tokens=20_480, temperature=1.0),  # DAPO
            reward=dict(format_weight=0.0, workers=16) | reward,  # zero-RL: the right answer and nothing else
            loss=loss,
            # The paper: 16 updates; of 512 responses each, which is DAPO's mini-batch too. Rows: our choice.
            update=dict(updates_per_batch=16, passes=1, micro_batch_rows=8, row_tokens=0),
            optimizer=dict(
                learning_rate=1e-6,  # DAPO, constant
                warmup_updates=320,  # DAPO: 20 generation batches
                b1=0.9,  # MiniMax-M1, section 3.2, of all three so that only the algorithm differs
                b2=0.95,
                eps=1e-15,
                weight_decay=0.0,  # our choice
                max_grad_norm=1.0,  # our choice
            ),
            # DAPO samples AIME at temperature 1 with top-p 0.7. How often: our choice.
            evaluation=dict(
                every=10,
                tasks="aime_2024.jsonl",
                problems=30,
                sampling=dict(max_tokens=20_480, temperature=1.0, top_p=0.7),
            ),
            checkpoint=dict(every=10, keep=2),  # our choice
        )
    )
    # A step of 1e-6 is below the rounding of bfloat16 parameters.
    config.update(dict(model=dict(param_dtype="float32", remat="layer")))
    if argument == "smoke":
        shrink(config)
        config.update(dict(rollout=dict(max_prompts=12)) if rollout else {})
        config.update(dict(reward=dict(overlong_buffer=4)) if reward else {})
    elif argument:
        raise ValueError(f"unknown argument {argument!r}; there is smoke")
    return config


def shrink(config: ConfigDict) -> None:
    """The same form at a size, and with a task and a tokenizer, that are all here."""
    small = dict(
        num_layers=2, hidden_size=48, num_heads=3, num_kv_heads=1, head_dim=16, rotary_dim=16, expert_dim=96,
        vocab_size=512, dtype="float32",
    )  # fmt: skip
    config.update(
        dict(
            steps=2,
            tasks=BITS,
            model=small,
            tokenizer=dict(path="configs/tokenizers/reasoning_512.json"),
            problems=dict(heldout_share=0.3, max_prompt_tokens=128),
            rollout=dict(prompts=4, responses=4, engine_rows=16),
            sampling=dict(max_tokens=16),
            reward=dict(workers=2),
            update=dict(updates_per_batch=2, micro_batch_rows=4),
            evaluation=dict(every=1, tasks="", problems=8, sampling=dict(max_tokens=16)),
            checkpoint=dict(every=1),
        )
    )
