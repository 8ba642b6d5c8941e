"""Where the demo's time goes: a short run of its own two configs, read back from the metrics that every run leaves.

The cold start is cut to a few updates, enough for answers that differ, so that reinforcement learning has groups with
variance to learn from; then come a few generation batches. The run folders are temporary.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.demo.run import RL_CONFIG, SFT_CONFIG
from m1jax.config import build
from m1jax.rl import loop
from m1jax.train import sft


def measure(sft_updates: int, rl_steps: int, init_from: str = "", smoke: bool = False) -> dict[str, Any]:
    """Seconds by stage of one generation batch, of one evaluation and of one SFT update, and tokens per second.

    Args:
        sft_updates: length of the cold start.
        rl_steps: generation batches; the first one, which starts the verifiers, is left out of the medians where
            there are more.
        init_from: a run folder to start reinforcement learning from, in place of a cold start.
        smoke: the smoke form of both configs.
    """
    values, suffix = {}, ":smoke" if smoke else ""
    with tempfile.TemporaryDirectory() as folder:
        if not init_from:
            init_from = str(Path(folder) / "sft")
            config = cli.load_config(SFT_CONFIG + suffix) | {"steps": sft_updates}
            cold = sft.train(build(sft.SFTConfig, config), init_from)
            values["sft"] = {
                "updates": sft_updates,
                "seconds_per_update": _median(cold.metrics, "time/update"),
                "tokens_per_second": _median(cold.metrics, "time/tokens_per_second"),
                "compile_seconds": cold.summary["seconds"]["compile"],
            }
        config = cli.load_config(RL_CONFIG + suffix) | {"steps": rl_steps, "init_from": init_from}
        config["evaluation"] |= {"every": rl_steps}  # one before, one after
        result = loop.train(build(loop.RLConfig, config), Path(folder) / "rl")
    batches = [row for row in result.metrics if row["step"] > 0]
    settled = batches[1:] or batches
    stages = [stage for stage in result.summary["seconds"] if stage not in ("compile", "evaluate", "save")]
    values["rl"] = {
        "batches": rl_steps,
        "seconds_per_batch": {stage: _median(settled, f"time/{stage}") for stage in stages},
        "seconds_per_evaluation": _median(result.metrics, "time/evaluate"),
        "compile_seconds": result.summary["seconds"]["compile"],
        "rollout_tokens": _median(settled, "rollout/tokens"),
        "response_tokens": _median(settled, "rollout/length_mean"),
        "update_tokens": _median(settled, "train/tokens"),
        "rollout_tokens_per_second": _rate(settled, "rollout/tokens", "time/rollout"),
        "update_tokens_per_second": _rate(settled, "train/tokens", "time/update"),
    }
    return values


def _rate(rows: Sequence[Mapping[str, float]], amount: str, seconds: str) -> float | None:
    return _median([{"rate": row[amount] / row[seconds]} for row in rows if amount in row], "rate")


def _median(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Median of a metric over the rows that have it; None where none has."""
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else None
