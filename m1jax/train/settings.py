"""Settings that every kind of training run has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Attributes:
        every: generation batches (RL) or updates (SFT) between checkpoints; the last one is always saved.
        keep: how many are kept.
    """

    every: int = 10
    keep: int = 2

    def __post_init__(self):
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
