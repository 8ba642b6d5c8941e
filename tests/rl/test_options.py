"""Whole runs with the options of the loop: dynamic sampling, KL to the reference, shaping, replay, one batch."""

import json
import math

import jax
import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl.loop import train
from m1jax.train.checkpoint import restore_params
from m1jax.train.interrupt import Interrupted
from m1jax.train.report import load_run
from tests import runs
from tests.rl.test_resume import assert_same_run

KL = dict(loss__kl_coefficient=0.5, loss__kl_estimator="k3")
DYNAMIC = dict(rollout__dynamic_sampling=True, rollout__max_prompts=12, rollout__responses=2, rollout__engine_rows=4)
"""Groups of two, so that some have no variance."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    runs.save_bigram(folder)
    return folder


def run(folder, name, log=lambda _: None, **changes):
    return train(runs.rl_config(folder, init_from=str(folder / "bigram"), **changes), folder / name, log=log)


def distance(result, folder) -> float:
    """How far the parameters have gone from those that the run started from."""
    squares = jax.tree.map(
        lambda a, b: float(((a - b) ** 2).sum()), result.params, restore_params(folder / "bigram")[0]
    )
    return math.sqrt(sum(jax.tree.leaves(squares)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # 70 training problems: 3 steps of 4 to 12 prompts end within the first epoch; of 8 problems, in a later one.
        ("mid_epoch", DYNAMIC),
        ("epoch_end", DYNAMIC | dict(problems__per_task=8)),
        ("two_epochs", dict(problems__per_task=8, steps=4)),  # two steps of four prompts are one
        ("kl_in_loss", KL | dict(loss__kl_in="loss")),
        ("kl_in_reward", KL | dict(loss__kl_in="reward", loss__kl_estimator="k1")),
    ],
)
def test_a_run_that_stops_after_every_step_is_the_run_that_did_not(folder, name, changes, monkeypatch):
    whole = run(folder, f"{name}_whole", **changes)
    from m1jax.rl import loop

    class StopAfterOne(loop.StopSignal):
        """Asks to stop as soon as one more step is done."""

        @property
        def requested(self):
            self.asked = getattr(self, "asked", 0) + 1
            return "SIGTERM" if self.asked > 1 else None

        @requested.setter
        def requested(self, value):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopSignal", StopAfterOne)
        for _ in range(whole.config["steps"] - 1):
            with pytest.raises(Interrupted):
                run(folder, f"{name}_parts", **changes)
    assert_same_run(run(folder, f"{name}_parts", **changes).folder, whole.folder)
    if "dynamic" in str(changes):
        asked = [row["sampling/prompts_asked"] for row in whole.metrics[1:]]
        assert max(asked) > 4, "some group was replaced, or the test shows nothing"


def test_dynamic_sampling_fills_the_batch(folder):
    result = run(folder, "dynamic", steps=2, **DYNAMIC)
    for row in result.metrics[1:]:
        live = round(row["sampling/acceptance"] * row["sampling/prompts_asked"])
        assert live + row["sampling/groups_short"] >= 4 and row["sampling/groups_short"] == max(4 - live, 0)
        assert row["reward/zero_variance_share"] == pytest.approx(1 - row["sampling/acceptance"])


def test_a_batch_without_any_group_that_can_teach_is_a_step_like_others(folder):
    """Three tokens hold no answer: at the bound there is nothing to learn from; the run says so, goes on and saves."""
    said = []
    result = run(folder, "nothing", said.append, sampling__max_tokens=3, reward__format_weight=0.0, steps=2, **DYNAMIC)
    assert [row["train/updates_applied"] for row in result.metrics[1:]] == [0, 0]
    assert [row["sampling/groups_short"] for row in result.metrics[1:]] == [4, 4]
    assert sum("0 of 12 groups have variance" in line for line in said) == 2
    assert distance(result, folder) == 0 and (result.folder / "checkpoints" / "00000002").is_dir()


def test_the_kl_term_holds_the_policy_near_where_it_started(folder):
    free = run(folder, "free", steps=2)
    held = run(folder, "held", steps=2, loss__kl_coefficient=50.0, loss__kl_estimator="k3", loss__kl_in="loss")
    assert distance(held, folder) < distance(free, folder)
    assert "train/kl" not in free.metrics[-1] and held.metrics[-1]["train/kl"] > 0
    # The reference is the start: before the first update of the run there is no divergence but rounding.
    taken = run(folder, "taken", steps=1, update__updates_per_batch=1, loss__kl_in="reward", **KL)
    assert abs(taken.metrics[-1]["reward/kl_penalty"]) < 1e-4 and taken.metrics[-1]["train/kl"] < 1e-4


def test_a_reference_that_is_gone_is_missed(folder):
    import shutil

    shutil.rmtree(run(folder, "lost", steps=1, loss__kl_in="loss", **KL).folder / "reference")
    with pytest.raises(UserError, match="reference: gone"):
        run(folder, "lost", steps=1, loss__kl_in="loss", **KL)


def test_a_long_response_earns_less_and_endings_have_policies(folder):
    """The window is 3 tokens, so that no response has an answer and most are cut; the buffer is the last 2 of them."""
    cut = dict(sampling__max_tokens=3, steps=1)
    plain = run(folder, "plain", reward__overlong_buffer=2, reward__overlong_penalty=0.5, **cut).metrics[-1]
    over = (plain["rollout/length_mean"] - 1) / 2  # 0 at one token, 1 at three; none is shorter
    assert plain["rollout/share_length"] > 0.5 and plain["reward/overlong_penalty"] == pytest.approx(0.5 * over)
    assert plain["reward/mean"] == pytest.approx(-0.5 * over)
    gone = run(folder, "gone", reward__on_length="filter", **cut).metrics[-1]
    assert gone["reward/filtered"] == pytest.approx(gone["rollout/share_length"]) and gone["reward/mean"] == 0
    with pytest.raises(UserError, match="reward.on_repetition: 'wrong', and no response is ever cut"):
        run(folder, "never", reward__on_repetition="wrong")


def unsure(answer: str, row) -> float | None:
    """A verifier that cannot judge even digits."""
    return None if int(answer[-1]) % 2 == 0 else 1.0


def test_responses_without_a_score_leave_their_groups_and_too_many_stop_the_run(folder):
    rows = runs.sums(folder).partition("@")[0]
    values = dict(tasks=f"{rows}@tests.rl.test_options:unsure", steps=1)
    with pytest.raises(
        UserError, match=r"step 0: the verifiers gave \d+% of the answers no score .*max_unscored_share allows 10%"
    ):
        run(folder, "too_many", **values)
    result = run(folder, "some", reward__max_unscored_share=1.0, **values).metrics[-1]
    assert 0 < result["reward/unscored"] < 1 and np.isfinite(result["reward/mean"])
    # Responses that are left either have an answer, which is right, or none: the mean is not pulled down by the others.
    scored = 1 - result["reward/unscored"]
    right = 1 - result["reward/unscored"] - result["reward/no_answer"]
    assert result["reward/mean"] == pytest.approx((right + 0.1 * result["reward/format"]) / scored, abs=0.1)


def test_saved_rollouts_repeat_the_run_without_an_engine_and_take_another_loss(folder):
    saved = run(folder, "saved", rollout__save=True)
    again = run(folder, "again", rollout__replay=str(saved.folder))
    jax.tree.map(np.testing.assert_array_equal, again.params, saved.params)
    assert again.summary["heldout"] == {} and json.loads((again.folder / "config.json").read_text())
    reinforce = dict(loss__kind="reinforce", loss__weight_cap=None)
    other = run(folder, "other", rollout__replay=str(saved.folder), **reinforce)
    assert other.metrics[-1]["rollout/tokens"] == saved.metrics[-1]["rollout/tokens"]
    with pytest.raises(UserError, match="answers to other prompts"):
        run(folder, "mistaken", rollout__replay=str(saved.folder), seed=1)


def test_a_benchmark_of_its_own_is_evaluated_whole(folder):
    """Rows that are in no training task, scored by their own verifier; no share of the training task is held out."""
    rows = [{"prompt": f"{a}+{a}=", "answer": 7} for a in range(5)]
    (folder / "doubles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = dict(problems__heldout_share=0.0, evaluation__problems=5, steps=1)
    result = run(folder, "benchmark", evaluation__tasks=f"{folder / 'doubles.jsonl'}@tests.runs:parity", **values)
    assert list(result.summary["heldout"]) == ["doubles"] and result.summary["heldout"]["doubles"]["after"]["n"] == 5
    assert "reward/accuracy/sums" in result.metrics[-1] and "heldout/doubles/mean" in result.metrics[-1]
    with pytest.raises(UserError, match="config.evaluation.tasks: sums is trained on, by config.tasks"):
        run(folder, "same", evaluation__tasks=runs.sums(folder), **values)
    with pytest.raises(UserError, match="task doubles: 5 distinct heldout problems, 6 asked for"):
        changes = values | dict(evaluation__problems=6)
        run(folder, "few", evaluation__tasks=f"{folder / 'doubles.jsonl'}@tests.runs:parity", **changes)


def test_one_batch_is_asked_again_and_again_with_new_noise(folder):
    result = run(folder, "one_batch", rollout__overfit_one_batch=True, rollout__save=True, steps=2)
    from m1jax.rl.recorded import load_rollouts

    files = sorted((result.folder / "rollouts").glob("*-*.npz"))
    first, second = load_rollouts(files[0]), load_rollouts(files[-1])
    assert [p.token_ids for p in first[0]] == [p.token_ids for p in second[0]]
    assert [p.index for p in first[0]] != [p.index for p in second[0]]
    ids = lambda rollouts: [r.token_ids.tolist() for group in rollouts for r in group]  # noqa: E731
    assert ids(first[1]) != ids(second[1])


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_nothing_is_compiled_after_the_first_steps(folder, place):
    """With everything on: a step of the run is the programs of the first one."""
    more = dict(reward__overlong_buffer=4, reward__overlong_penalty=0.5, rollout__save=True)
    result = run(folder, f"compiles_{place}", steps=4, loss__kl_in=place, **more, **KL, **DYNAMIC)
    compiles = [row["time/compiles"] for row in load_run(result.folder).metrics]
    assert compiles[1] > compiles[0] > 0 and compiles[2] == compiles[-1]
