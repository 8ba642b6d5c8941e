"""SFT, then RL from it, as a library: what the run folder holds, and which parts a user may replace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from m1jax.rl.loop import train
from m1jax.train import sft
from m1jax.train.report import load_run
from m1jax.types import ENDINGS, Engine
from tests import runs

QUIET = {"log": lambda _: None}

PROMISED = (
    "reward/mean", "reward/accuracy", "reward/accuracy/sums", "reward/zero_variance_share", "rollout/length_stop",
    "rollout/entropy", "mismatch/probability_correlation", "mismatch/largest_logprob_gap", "gradient/share_below_1e-14",
    "ratio/capped_share_positive", "ratio/capped_share_negative", "ratio/mean", "ratio/capped_mean", "ratio/largest",
    "time/tokens_per_second", "time/rollout", "time/reward", "time/update", *(f"rollout/share_{e}" for e in ENDINGS),
)  # fmt: skip
"""What every step with a live group has, besides the gradient's histogram."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def cold(folder):
    """A supervised run in the RL task's tokenizer whose problems happen to be others: RL starts from its parameters."""
    values = dict(tasks="gcd(min_numbers=2, max_numbers=2, max_value=9)", tokenizer__path=runs.tokenizer(folder))
    return sft.train(runs.sft_config(model__vocab_size=20, steps=2, **values), folder / "sft", **QUIET)


@pytest.fixture(scope="module")
def result(folder, cold):
    """An RL run from it; its own custom reward comes through the task's spec, `rows.jsonl@module:function`."""
    return train(runs.rl_config(folder, init_from=str(cold.folder), evaluation__every=1), folder / "rl", **QUIET)


@pytest.fixture(scope="module")
def taught(folder):
    """A run that starts from parameters that know the form, handed over as a tree."""
    config = runs.rl_config(folder)
    return train(config, folder / "taught", params=runs.bigram(), **QUIET)


def test_rl_starts_from_the_parameters_of_the_supervised_run(cold, result, folder):
    assert cold.summary["steps"] == 2 and len(cold.metrics) == 2 and cold.metrics[1]["train/loss"] > 0
    assert result.config["init_from"] == str(cold.folder)
    # Its first checkpoint is gone (keep = 2), but without a live group no update changes a parameter.
    moved = any((a != b).any() for a, b in zip(*map(_leaves, (result.params, cold.params)), strict=True))
    assert moved == any(row.get("train/updates_applied") for row in result.metrics)


def test_the_run_folder_holds_everything(taught):
    folder = taught.folder
    assert json.loads((folder / "config.json").read_text())["loss"]["weight_cap"] == 5.0
    assert [row["step"] for row in taught.metrics] == [0, 1, 2, 3]
    for row in taught.metrics[1:]:
        assert not [name for name in PROMISED if not isinstance(row.get(name), int | float)], row["step"]
        histogram = [value for name, value in row.items() if name.startswith("gradient/log10_")]
        assert len(histogram) == 21 and sum(histogram) == pytest.approx(1)
        assert sum(row[f"rollout/share_{ending}"] for ending in ENDINGS) == pytest.approx(1)
    assert any("time/compile" in row for row in taught.metrics)
    assert Image.open(folder / "curves.png").size[0] > 500
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["00000002", "00000003"]
    assert _scalars(folder / "tensorboard", "reward/mean") == [1, 2, 3]


def test_summary_has_the_table_before_and_after(taught):
    table = taught.summary["heldout"]["sums"]
    assert set(table) == {"majority", "before", "after"}
    # `parity` is right half the time where the form is kept; the most frequent sum is 9, 10 of 100.
    assert 0 < table["majority"] < 0.4
    for when in ("before", "after"):
        entry = table[when]
        assert set(entry) == {"mean", "low", "high", "n"} and entry["n"] == 16
        assert 0 <= entry["low"] <= entry["mean"] <= entry["high"] <= 1
    assert table["before"]["mean"] == taught.metrics[0]["heldout/sums/mean"] > 0
    assert table["after"]["mean"] == taught.metrics[3]["heldout/sums/mean"]
    seconds = taught.summary["seconds"]
    assert {"compile", "rollout", "reward", "batch", "update", "sync", "evaluate", "save"} <= set(seconds)
    assert taught.summary["updates"] == 6 and taught.summary["final"]["reward/mean"] == taught.metrics[3]["reward/mean"]


def test_samples_show_ten_answers_before_and_after(taught):
    text = (taught.folder / "samples.md").read_text()
    assert text.count("\nBefore, score ") == text.count("\nAfter, score ") == 10
    assert text.count("Reference answer: `") == 10 and "<think></think><answer>" in text


def test_load_run_gives_it_back(taught):
    again = load_run(taught.folder)
    assert (again.config, again.metrics, again.summary) == (taught.config, taught.metrics, taught.summary)
    assert again.params["embedding"].shape == (20, 32)


def test_another_engine_takes_the_place_of_the_local_one(folder):
    """The protocol is all that the loop knows: whole groups of 8, held-out answers singly, weights after every step."""
    engine = runs.ScriptedEngine()
    assert isinstance(engine, Engine)
    result = train(runs.rl_config(folder), folder / "scripted", engine=engine, **QUIET)
    assert engine.versions == [0, 1, 2, 3]
    assert engine.asked == [(16, 1), (4, 8), (4, 8), (16, 1), (4, 8), (16, 1)]
    assert result.metrics[1]["rollout/share_stop"] == 1 and result.metrics[1]["reward/format"] == 1
    assert result.metrics[1]["rollout/tokens"] == 4 * 8 * 6


def test_rows_without_a_function_are_judged_as_mathematics(folder):
    """1+1, 2+2, ... with the reference of 3+4 in another form: "7.0" is 7. The script's digits are right one in ten."""
    path = folder / "maths.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": f"{(a + b) % 10}.0"}) + "\n"
                            for a in range(10) for b in range(10)))  # fmt: skip
    config = runs.rl_config(folder, tasks=str(path), steps=1)
    result = train(config, folder / "maths", engine=runs.ScriptedEngine(), **QUIET)
    assert 0 < result.metrics[1]["reward/accuracy/maths"] < 0.5
    assert result.metrics[1]["reward/error"] == result.metrics[1]["reward/timeout"] == 0


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def _scalars(folder: Path, tag: str) -> list[int]:
    """Steps at which TensorBoard's own reader finds the tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]
