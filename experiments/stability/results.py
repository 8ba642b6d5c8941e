"""What figure and tables compute from the logged runs. NumPy only.

results = load(RESULTS)
results["head_large_logits_bfloat16"][seed].curve("reward/mean")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from m1jax.train.logged import Logged, read_logged

RESULTS = Path(__file__).parent / "results"


class LoggedRun(Logged):
    """One run of the study."""

    def mean(self, name: str) -> float:
        """Over the steps."""
        return float(self.curve(name)[1].mean())

    @property
    def heldout(self) -> tuple[float, float]:
        """Held-out accuracy before and after."""
        values = self.curve("heldout/count_bits/mean")[1]
        return float(values[0]), float(values[-1])


def load(folder: Path) -> dict[str, list[LoggedRun]]:
    """All runs by name, those of one name by seed."""
    runs: dict[str, list[LoggedRun]] = {}
    for path in sorted(folder.glob("*_seed*.jsonl")):
        about, rows = read_logged(path)
        runs.setdefault(f"{about['study']}_{about['name']}", []).append(LoggedRun(about, rows))
    return runs


def load_sweep(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """By dtype of the head, arrays over the sizes of the common logit."""
    _, rows = read_logged(folder / "sweep.jsonl")
    heads = dict.fromkeys(row["head"] for row in rows)
    return {h: {k: np.array([r[k] for r in rows if r["head"] == h]) for k in rows[0] if k != "head"} for h in heads}


def histogram(run: LoggedRun) -> dict[float, float]:
    """Share of nonzero gradient entries at the first step, as they reach AdamW, by the log10 where their decade starts.

    The run logs whole decades before the clip, which multiplies all entries by one factor: it moves the decades.
    Empty where no update had anything to learn from.
    """
    row = next((row for row in run.rows if any("log10" in name for name in row)), None)
    if row is None:
        return {}
    norm, clip = row["train/grad_norm"], run.about["config"]["optimizer"]["max_grad_norm"]
    shift, prefix = float(np.log10(min(clip / norm, 1.0))), "gradient/log10_"
    return {int(k.removeprefix(prefix)) + shift: v for k, v in row.items() if k.startswith(prefix)}


def share_below(shares: Mapping[float, float], log10: float) -> float:
    """Share of entries under 10^log10; inside a decade they are taken as spread evenly over the logarithm."""
    return sum(share * float(np.clip(log10 - start, 0, 1)) for start, share in shares.items())
