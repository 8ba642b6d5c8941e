"""Whole runs that take a second: a decoder of two layers, a tokenizer of 20 tokens, sums of two digits.

`bigram` makes parameters that mostly write `<think></think><answer>7</answer>` with a random digit, so that rewards
differ within groups and every update has something to learn from.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from m1jax.data.tokenizer import SPECIAL_TOKENS

TOKENS = (*SPECIAL_TOKENS, *"\n0123456789+=")

MODEL = dict(
    vocab_size=20, num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=4, num_experts=2,
    experts_per_token=2, expert_dim=8, lightning_alpha=1.4, softmax_alpha=1.4, mlp_alpha=1.4, init_std=0.1,
    layer_pattern=("lightning", "softmax"), lightning_chunk=16, attention_block=16,
)  # fmt: skip

ONE_LAYER = MODEL | dict(num_layers=1, layer_pattern=("softmax",), num_experts=0, experts_per_token=0)


def parity(answer: str, row: dict[str, Any]) -> float:
    """A verifier of a user's own: 1 where the answer's last digit is as even, or as odd, as the reference."""
    return float(answer[-1:].isdigit() and int(answer[-1]) % 2 == int(row["answer"]) % 2)


def threes(answer: str, row: dict[str, Any]) -> float:
    """A verifier that a few updates learn to please: 1 for 0, 3, 6 and 9, whatever the question."""
    return float(answer in ("0", "3", "6", "9"))


def sums(folder: Path) -> str:
    """A JSONL task of the hundred sums of two digits, scored by `parity`."""
    path = folder / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(10) for b in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{path}@tests.runs:parity"


def tokenizer(folder: Path) -> str:
    """The special tokens, digits, `+`, `=` and the line feed."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, "<pad>"))
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[^<]"), "isolated")
    made.decoder = decoders.Fuse()
    path = folder / "tokenizer.json"
    made.save(str(path))
    return str(path)


def rl_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Plain values of an RL config; `section__key=value` changes one, as `--config.section.key` would."""
    return _changed(dict(
        seed=0, steps=3, tasks=sums(folder), model=dict(MODEL), tokenizer=dict(path=tokenizer(folder)),
        problems=dict(per_task=100, heldout_share=0.3, max_prompt_tokens=6),
        rollout=dict(prompts=4, responses=8, engine_rows=16), sampling=dict(max_tokens=12),
        reward=dict(format_weight=0.1, workers=1, cpu_seconds=20.0), loss=dict(weight_cap=5.0),
        update=dict(updates_per_batch=2, micro_batch_rows=8),
        optimizer=dict(learning_rate=1e-2),
        evaluation=dict(every=2, problems=16, sampling=dict(max_tokens=12)), checkpoint=dict(every=1, keep=2),
    ), changes)  # fmt: skip


def sft_values(**changes: Any) -> dict[str, Any]:
    """Plain values of an SFT config: worked solutions of small numbers in bytes."""
    return _changed(dict(
        seed=0, steps=6, tasks="count_bits(min_n=1, max_n=63)", model=dict(MODEL, vocab_size=263),
        tokenizer=dict(path=""), problems=dict(per_task=100, heldout_share=0.3, max_prompt_tokens=128),
        reflection=0.2,
        rows=dict(per_update=4, tokens=160, micro_batch_rows=2), optimizer=dict(learning_rate=1e-2, warmup_updates=2),
        checkpoint=dict(every=3, keep=2),
    ), changes)  # fmt: skip


@functools.cache
def trace_once() -> None:
    """From now on, runs of this process share the programs of runs with equal settings: tracing is most of their time.

    Not for a test that puts other code in place of what is traced.
    """
    from m1jax.rl import engine_local, run
    from m1jax.train import sft

    for module, name in (
        (run, "make_optimizer"), (run, "make_update"), (run, "make_frozen_logprobs"), (engine_local, "make_sampler"),
        (sft, "make_optimizer"), (sft, "make_supervised_update"),
    ):  # fmt: skip
        setattr(module, name, functools.cache(getattr(module, name)))


def rl_config(folder: Path, **changes: Any):
    from m1jax.config import build
    from m1jax.rl.settings import RLConfig

    trace_once()
    return build(RLConfig, rl_values(folder, **changes))


def sft_config(**changes: Any):
    from m1jax.config import build
    from m1jax.train.sft import SFTConfig

    trace_once()
    return build(SFTConfig, sft_values(**changes))


def bigram(**changes: Any):
    """Parameters of `MODEL` with `changes`, whose next token hangs on the last one: a row's favourite has ~0.85.

    The embedding is one-hot, so the final norm gives sqrt(32) times a unit vector (layers add a little to it), and the
    head's row of a token holds the logits of what follows it.
    """
    import jax
    import numpy as np

    from m1jax.config import build
    from m1jax.model import transformer
    from m1jax.model.config import ModelConfig

    model = build(ModelConfig, MODEL | changes)
    params = jax.tree.map(np.asarray, jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), model))
    digits, follows = list("0123456789"), {"\n": ["<think>"], "<think>": ["</think>"], "</think>": ["<answer>"]}
    follows |= {"<answer>": digits, "</answer>": ["<eos>"]} | {digit: ["</answer>"] for digit in digits}
    head = np.zeros_like(params["head"])
    for before, after in follows.items():
        for token in after:
            head[TOKENS.index(before), TOKENS.index(token)] = (4.5 - np.log(len(after))) / np.sqrt(32)
    return params | {"embedding": np.eye(20, 32, dtype=np.float32), "head": head}


def save_bigram(folder: Path, **changes: Any) -> str:
    """The checkpoint folder to name as `init_from`."""
    from m1jax.train.checkpoint import Checkpoints

    with Checkpoints(folder / "bigram") as checkpoints:
        checkpoints.save(0, {"params": bigram(**changes)}, {"config": {"model": MODEL | changes}}, wait=True)
    return str(folder / "bigram")


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return values


class ScriptedEngine:
    """An engine without a model: `<think></think><answer>D</answer><eos>` with a digit drawn from (prompt, sample).

    Every token is said to have had log-probability `logprob`.
    """

    def __init__(self, logprob: float = -0.7):
        self.logprob, self.versions, self.asked = logprob, [], []

    def set_weights(self, params, version):
        self.versions.append(version)

    def generate(self, prompts, responses, sampling, seed):
        self.asked.append((len(prompts), responses))
        return [[self._answer(prompt.index, sample) for sample in range(responses)] for prompt in prompts]

    def _answer(self, index, sample):
        import numpy as np

        from m1jax.types import Rollout

        text = ("<think>", "</think>", "<answer>", str((7 * index + 3 * sample) % 10), "</answer>", "<eos>")
        ids = np.array([TOKENS.index(token) for token in text], np.int32)
        return Rollout(index, sample, ids, np.full(len(ids), self.logprob, np.float32), "stop", self.versions[-1])
