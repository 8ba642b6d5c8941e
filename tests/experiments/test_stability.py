"""The study of stability: its bfloat16 head rounds, its large logits change nothing else, its numbers are logged."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.stability import common_logit, draw, run
from experiments.stability.bfloat16_head import bfloat16_head, rounded_product
from experiments.stability.results import RESULTS, LoggedRun, histogram, load, load_sweep, share_below
from m1jax.model import logprobs, transformer
from m1jax.model.observe import logits
from m1jax.rl import engine_local
from m1jax.train.logged import read_logged
from m1jax.types import Problem, Prompt, Rollout

RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(24, 32)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 20, 24), jnp.int32)
PARAMS = {"head": jnp.asarray(RNG.normal(size=(32, 20)), jnp.float32)}


def test_a_rounded_product_by_hand():
    """257 is no bfloat16: of 256 and 258 it rounds to the even one, before the product and after it."""
    x, y = jnp.array([[257.0]]), jnp.array([[1.0]])
    assert rounded_product(x, y, 1, 0) == 256
    assert rounded_product(jnp.array([[16.0, 1.0]]), jnp.array([[16.0], [3.0]]), 1, 0) == 260  # 259 in float32
    assert rounded_product(x, y, 1, 0).dtype == jnp.float32


def test_the_head_is_that_of_observe():
    """Sampler's and trainer's head are the bfloat16 one that compare_layers looks at, and only inside the block."""
    wanted = np.asarray(logits(PARAMS, HIDDEN[None], "bfloat16"))[0]
    exact = np.asarray(engine_local.head(PARAMS, HIDDEN))
    with bfloat16_head():
        sampled = np.asarray(engine_local.head(PARAMS, HIDDEN))
        trained = np.asarray(logprobs._logits(HIDDEN, PARAMS["head"], 0, 1.0))
        assert transformer.head is engine_local.head
    np.testing.assert_allclose(sampled, wanted, rtol=2**-7, atol=1e-2)  # one last digit, where sums differ in order
    np.testing.assert_array_equal(trained, sampled)
    assert 1e-3 < np.abs(sampled - exact).max() < 0.2
    np.testing.assert_array_equal(engine_local.head(PARAMS, HIDDEN), exact)
    assert transformer.head is engine_local.head


def test_the_trainer_rounds_forward_and_backward():
    def loss(weight) -> Any:
        per_token: Any = logprobs._logprobs_and_entropy(HIDDEN, weight, TOKENS, 0, 1.0, 24)
        return per_token[0].sum()

    exact, slope = jax.value_and_grad(loss)(PARAMS["head"])
    with bfloat16_head():
        rounded, rounded_slope = jax.value_and_grad(loss)(PARAMS["head"])
    assert 0 < abs(float(exact - rounded)) < 0.01 * abs(float(exact))
    as_bfloat16 = rounded_slope.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(rounded_slope, as_bfloat16)
    assert 0 < jnp.abs(rounded_slope - slope).max() < 0.02 * jnp.abs(slope).max()


def test_large_logits_change_nothing_but_the_logits():
    large = common_logit.add_common_logit(PARAMS, np.asarray(HIDDEN.mean(axis=0)), 64.0)
    before, after = (np.asarray(transformer.head(p, HIDDEN), np.float64) for p in (PARAMS, large))
    added = after - before
    np.testing.assert_allclose(added.mean(), 64, rtol=1e-5)
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1], added.shape), atol=1e-3)


def test_rows_of_responses():
    problem = Problem("t", "q", "a", {})
    prompts = [Prompt(0, problem, (5, 6)), Prompt(1, problem, (7,))]
    rollouts = [
        [Rollout(p, 0, np.array(ids), np.array(logs, np.float32), "stop", 0)]
        for p, ids, logs in ((0, [8], [-1.0]), (1, [9, 2], [-2.0, -3.0]))
    ]
    tokens_BT, segment_ids_BT, rollout_BT = common_logit.as_rows(prompts, rollouts, 4)
    assert tokens_BT.tolist() == [[5, 6, 8, 0], [7, 9, 2, 0]]
    assert segment_ids_BT.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(rollout_BT, [[np.nan, np.nan, -1, np.nan], [np.nan, -2, -3, np.nan]])


def test_histogram_moves_with_the_clip():
    """A norm of 0.1 clipped to 1e-11: ten decades down; one below the clip stays."""
    row = {"step": 1, "train/grad_norm": 0.1, "gradient/log10_-1": 0.25, "gradient/log10_-4": 0.75}
    logged = lambda clip: LoggedRun({"config": {"optimizer": {"max_grad_norm": clip}}}, [{"step": 0}, row])  # noqa: E731
    shares = histogram(logged(1e-11))
    assert list(shares) == pytest.approx([-11, -14]) and list(shares.values()) == [0.25, 0.75]
    assert list(histogram(logged(1.0))) == [-1, -4]
    found = [share_below(shares, x) for x in (-14, -13.5, -13, -10)]
    assert found == pytest.approx([0, 0.375, 0.75, 1])  # half of a decade holds half of its entries


def test_every_job_differs_in_one_thing():
    found = run.jobs()
    assert len({job.file for job in found}) == len(found)
    assert {job.head for job in found if job.study == "adam"} == {"float32"}
    command = next(job for job in found if job.head == "bfloat16").command(Path("w"), smoke=False)
    assert command[2] == "experiments.stability.bfloat16_head" and "--config.model.dtype=bfloat16" in command
    tiny = next(job for job in found if job.name.startswith("tiny")).command(Path("w"), smoke=True)
    assert "--config.optimizer.max_grad_norm=1e-11" in tiny and tiny[2] == "experiments.train_rl"


def test_readme_says_what_was_logged():
    """Every table of README.md is the one that draw.py makes of the committed results; all runs are there."""
    logged = load(RESULTS)
    assert sorted(job.file for job in run.jobs()) == sorted(p.name for p in RESULTS.glob("*_seed*.jsonl"))
    text = (RESULTS.parent / "README.md").read_text()
    for table in draw.tables(logged, load_sweep(RESULTS)):
        assert table in text, f"run `python -m experiments.stability.draw` and put this into README.md:\n{table}"


@pytest.mark.slow
def test_smoke(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    names = ("head_large_logits_bfloat16", "adam_tiny_gradients_paper")
    some = [job for job in run.jobs() if f"{job.study}_{job.name}" in names]
    monkeypatch.setattr(run, "jobs", lambda: some)
    monkeypatch.setattr(run, "SIZES", (0, 192))
    run.study(tmp_path, tmp_path / "results", smoke=True)
    logged = load(tmp_path / "results")
    assert sorted(logged) == sorted(names)
    assert all(found[0].curve("rollout/entropy")[1].size == 2 for found in logged.values())
    rows = read_logged(tmp_path / "results" / "sweep.jsonl")[1]
    gaps = {(row["head"], row["size"]): row["mean_gap"] for row in rows}
    assert gaps["bfloat16", 192] > 10 * gaps["float32", 192]
    assert logged["adam_tiny_gradients_paper"][0].about["config"]["optimizer"]["max_grad_norm"] == 1e-11
    draw.draw(tmp_path / "stability.png", logged, load_sweep(tmp_path / "results"))
    assert (tmp_path / "stability.png").stat().st_size > 10_000
    monkeypatch.setattr(run.subprocess, "run", None)  # again: everything is there already
    run.study(tmp_path, tmp_path / "results", smoke=True)
