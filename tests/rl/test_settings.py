"""Values that make no sense are refused where a run is described, with the dotted key and the rule."""

import pytest

from experiments import cli
from m1jax.config import build
from m1jax.errors import UserError
from m1jax.rl.run import check_heldout
from m1jax.rl.settings import RLConfig
from m1jax.train.sft import SFTConfig

RL, SFT = (RLConfig, "configs/rl_tiny_cpu.py"), (SFTConfig, "configs/sft_tiny_cpu.py")


def built(kind, **changes):
    """The shipped config with `section__key=value` laid over it."""
    record, path = kind
    values = cli.load_config(path)
    for name, value in changes.items():
        *parents, key = name.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[key] = value
    return build(record, values)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (RL, {"steps": -1}, "config.steps: -1 must be at least 0"),
        (RL, {"evaluation__every": 0}, "config.evaluation.every: 0 must be at least 1"),
        (RL, {"evaluation__problems": 0}, "config.evaluation.problems: 0 must be at least 1"),
        (RL, {"evaluation__sampling__top_p": 0.0}, "config.evaluation.sampling.top_p: 0.0 must be above 0"),
        (RL, {"evaluation__sampling__temperature": -1.0}, "config.evaluation.sampling.temperature: -1.0 must be"),
        (RL, {"sampling__max_tokens": 0}, "config.sampling.max_tokens: 0 must be at least 1"),
        (RL, {"sampling__repetition_probability": 1.0}, "config.sampling.repetition_probability: 1.0 must be between"),
        (RL, {"reward__workers": 0}, "config.reward.workers: 0 must be at least 1"),
        (RL, {"reward__cpu_seconds": 0.0}, "config.reward.cpu_seconds: 0.0 must be above 0"),
        (RL, {"optimizer__learning_rate": -1.0}, "config.optimizer.learning_rate: -1.0 must be above 0"),
        (RL, {"optimizer__warmup_updates": -5}, "config.optimizer.warmup_updates: -5 must be at least 0"),
        (RL, {"update__row_tokens": 9}, "config.update.row_tokens: 9 is shorter than"),
        (RL, {"update__updates_per_batch": 3}, "config.update.updates_per_batch: 3 does not divide the 64 prompts"),
        (SFT, {"rows__micro_batch_rows": 0}, "config.rows.micro_batch_rows: 0 must be at least 1"),
        (SFT, {"rows__per_update": 0}, "config.rows.per_update: 0 must be at least 1"),
        (SFT, {"steps": 0}, "config.steps: 0 must be at least 1"),
        (
            RL,
            {"model__max_positions": 127},
            "config.sampling.max_tokens: 96 after a prompt of 32 tokens make 128, and the model was made for 127 "
            "positions (model.max_positions); lower it or problems.max_prompt_tokens",
        ),
        (
            RL,
            {"model__max_positions": 128, "evaluation__sampling__max_tokens": 97},
            "config.evaluation.sampling.max_tokens: 97 after a prompt of 32 tokens make 129",
        ),
        (
            SFT,
            {"model__max_positions": 127, "rows__tokens": 128},
            "config.rows.tokens: 128, and the model was made for 127 positions (model.max_positions); choose at most",
        ),
    ],
)
def test_value_without_a_meaning_is_refused(kind, change, message):
    with pytest.raises(UserError) as refusal:
        built(kind, **change)
    assert str(refusal.value).startswith(message)


def test_questions_that_the_checkpoint_was_trained_on_cannot_be_held_out():
    config = built(RL, problems__heldout_share=0.5, init_from="runs/sft")
    trained = {"config": {"problems": {"heldout_share": 0.3}}}
    with pytest.raises(UserError, match="config.problems.heldout_share: 0.5 .* runs/sft .*choose at most 0.3"):
        check_heldout(config, trained)
    check_heldout(built(RL, problems__heldout_share=0.3), trained)
    check_heldout(built(RL, problems__heldout_share=0.2), trained)


def test_windows_of_exactly_the_models_positions_are_allowed():
    assert built(RL, model__max_positions=128).model.max_positions == 128
    assert built(SFT, model__max_positions=128, rows__tokens=128).model.max_positions == 128


def test_what_is_seldom_meant_is_told():
    assert built(RL).warnings() == []
    loss = {"loss__ratio_anchor": "trainer", "update__updates_per_batch": 1}
    (line,) = built(RL, **loss).warnings()
    assert line.startswith("config.loss.ratio_anchor: 'trainer' with one update makes every ratio 1")
    assert built(RL, **loss, update__passes=2).warnings() == []
    late = {"loss__ratio_anchor": "trainer", "rollout__staleness": 1}
    (line,) = built(RL, **late).warnings()
    assert line.startswith("config.loss.ratio_anchor: 'trainer' with rollout.staleness 1: nothing weighs that older")
    assert built(RL, **late, loss__mismatch_cap=2.0).warnings() == built(RL, rollout__staleness=1).warnings() == []
    (line,) = built(RL, loss={"kind": "ppo_clip", "clip_low": 0.3, "clip_high": 0.2}).warnings()
    assert line.startswith("config.loss.clip_high: 0.2 is below clip_low, 0.3")
