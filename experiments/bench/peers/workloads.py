"""What is measured, in plain numbers that every side reads: shapes, prompts, reward. It imports nothing but Python.

The side files build their own model from these numbers; the driver then compares the parameter counts that they report.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Hybrid:
    """One period of MiniMax-M1 with its mixture of experts: seven lightning layers, then one softmax layer."""

    vocab: int = 4096
    layers: int = 8
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    experts_per_token: int = 2
    expert_dim: int = 512
    alpha: float = 2.0  # (2 * layers) ** (1/4), DeepNorm


@dataclass(frozen=True)
class Dense:
    """Qwen2: softmax layers, biases on queries, keys and values, one SwiGLU, untied head."""

    vocab: int = 64
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 512


@dataclass(frozen=True)
class Pass:
    """Log-probabilities of all tokens, or the gradient of their mean for every weight."""

    rows: int
    tokens: int
    backward: bool
    model: Hybrid = Hybrid()


@dataclass(frozen=True)
class Decode:
    """Greedy tokens with a cache, no end token."""

    rows: int = 8
    prompt: int = 128
    new: int = 128
    model: Hybrid = Hybrid()


@dataclass(frozen=True)
class RL:
    """CISPO: the updates of one window, from the same initial policy every time, generation included.

    Attributes:
        updates_per_batch: updates made of one generation batch.
        window: updates that are timed together.
        prompts: prompts of an update.
        group: responses to each of them.
    """

    updates_per_batch: int
    window: int = 16
    prompts: int = 4
    group: int = 8
    prompt_tokens: int = 4
    new_tokens: int = 32
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    max_grad_norm: float = 1.0
    weight_cap: float = 5.0  # absolute: eps_high = 4
    model: Dense = Dense()


LARGER = Dense(layers=6, hidden=384, heads=12, kv_heads=6, mlp_dim=1024)
"""About 10 million parameters, so that fixed costs do not decide."""

WORKLOADS: dict[str, Pass | Decode | RL] = {
    "forward 4x1024": Pass(4, 1024, backward=False),
    "forward 1x4096": Pass(1, 4096, backward=False),
    "backward 4x1024": Pass(4, 1024, backward=True),
    "backward 1x4096": Pass(1, 4096, backward=True),
    "decode 8x128+128": Decode(),
    "rl 1": RL(updates_per_batch=1),
    "rl 16": RL(updates_per_batch=16),
    "rl 16 larger": RL(updates_per_batch=16, model=LARGER),
}
"""By the name that is asked for; `--only` takes the beginning of names."""


def workload(name: str, smoke: bool) -> Pass | Decode | RL:
    """The workload `name`, or the same at its smallest, to see that it runs."""
    full = WORKLOADS[name]
    if not smoke:
        return full
    if isinstance(full, RL):
        return replace(full, window=full.updates_per_batch)
    model = Hybrid(vocab=64, hidden=32, heads=2, kv_heads=1, head_dim=16, experts=2, expert_dim=32)
    if isinstance(full, Pass):
        return replace(full, tokens=full.tokens // 32, model=model)
    return replace(full, prompt=8, new=8, model=model)


CHARACTERS = string.digits + string.ascii_letters
TOKENS = ("<pad>", "<eos>", *CHARACTERS)
"""The 64 tokens of the RL workloads, in order of their ids."""


def reward(text: str) -> float:
    """What a response is worth: something that a random policy does now and then, and that costs no time to judge."""
    return text.count("7") / 8


def prompts(count: int, length: int) -> list[str]:
    """Random strings of characters, the same at every call."""
    generator = random.Random(0)
    return ["".join(generator.choices(CHARACTERS, k=length)) for _ in range(count)]


def tokenizer_json() -> str:
    """A Hugging Face tokenizers file of `TOKENS`: one character, one token."""
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(TOKENS[:2])],
            "normalizer": None,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(TOKENS)}, "unk_token": "<pad>"},
        }
    )
