"""Settings of text: which tokenizer and template, which problems, which part of them is held out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids.

    Attributes:
        path: a Hugging Face `tokenizers` JSON file; "" is the built-in byte tokenizer.
        chat_template: a Jinja chat template file; "" is the built-in plain form.
        system_prompt: system message, for a chat template only.
        stop_tokens: tokens that end a response, by their text; () takes the tokenizer's own end token.
    """

    path: str = ""
    chat_template: str = ""
    system_prompt: str = ""
    stop_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProblemsConfig:
    """Which problems a run draws from.

    Attributes:
        per_task: training problems that each task offers before the order repeats.
        heldout_share: share of the question space, by hash of the text, that no run ever trains on.
        max_prompt_tokens: window of a prompt, template included.
    """

    per_task: int = 10_000
    heldout_share: float = 0.2
    max_prompt_tokens: int = 64

    def __post_init__(self):
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"heldout_share: {self.heldout_share} must be at least 0 and below 1")
        for name in ("per_task", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
