"""The held-out evaluation alone: a run's own numbers again, of the network that lies there, without a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import cli, evaluate
from m1jax.config import build, to_dict
from m1jax.errors import NonFinite, UserError
from m1jax.rl.loop import train
from m1jax.train.checkpoint import Checkpoints
from m1jax.train.pretrained import find_pretrained
from m1jax.train.report import load_run
from tests import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`run`, an RL run of no steps from `bigram`, and config.py, its config."""
    folder = tmp_path_factory.mktemp("evaluate")
    values = runs.rl_values(folder, steps=0)
    train(build(evaluate.RLConfig, values), folder / "run", params=runs.bigram(), log=lambda line: None)
    (folder / "config.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config(_=''): return ConfigDict({values})"
    )
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return [f"--model={folder / 'run'}", f"--config={folder / 'config.py'}", *more]


def test_the_numbers_are_those_of_the_run(folder, tmp_path, capsys):
    evaluate.main(words(folder, f"--workdir={tmp_path / 'new' / 'folder'}"))
    (task, theirs), *others = load_run(folder / "run").summary["heldout"].items()
    found = json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text())
    ours = found["tasks"][task]
    assert not others and list(found["tasks"]) == [task]
    assert {k: ours[k] for k in theirs["before"]} == theirs["before"] and ours["n"] == 16
    assert 0 < ours["mean"] < 1 and ours["majority"] == theirs["majority"]
    assert ours["format"] >= ours["mean"] and sum(ours["endings"].values()) == pytest.approx(1)
    assert 1 <= ours["mean_length"] <= 12
    assert (found["step"], found["config"]["steps"]) == (0, 0)
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == "task n majority accuracy format tokens stop length repetition"
    assert row.split()[:4] == [task, "16", f"{ours['majority']:.3f}", f"{ours['mean']:.3f}"]
    samples = (tmp_path / "new" / "folder" / "evaluation_samples.md").read_text()
    assert samples.count("\n## sums: ") == evaluate.SAMPLES and "    <think></think><answer>" in samples


def test_overrides_and_no_workdir(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate.main(words(folder, "--config.evaluation.problems=3"))
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["sums", "3"]
    assert not list(tmp_path.iterdir())


def test_the_network_is_the_checkpoints_and_how_it_is_computed_the_configs(folder, tmp_path):
    model = find_pretrained(folder / "run")
    said = []
    values = runs.rl_values(tmp_path, model__hidden_size=64, model__dtype="bfloat16", model__attention_block=8)
    config = evaluate.config_of(values | {"tokenizer": {"path": "other.json"}}, model, said.append)
    assert config.model == dataclasses.replace(model.config, dtype="bfloat16", attention_block=8, mesh=config.mesh)
    assert said[0].startswith("config.model is another network; the one of ")
    assert said[1].startswith("config.tokenizer.path is other.json; ") and len(said) == 2
    evaluate.config_of(cli.load_config(str(folder / "config.py")), model, said.append)
    assert len(said) == 2


def test_questions_that_were_trained_on_are_refused(folder):
    with pytest.raises(UserError, match="heldout_share: 0.5 holds out questions .*/run was trained on .* at most 0.3"):
        evaluate.main(words(folder, "--config.problems.heldout_share=0.5"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.evaluation.problms=3", "config.evaluation.problms: unknown key; did you mean problems?"),
        ("--config.model.max_positions=5", ""),  # the checkpoint's bound counts, and it has none
        ("--config.tokenizer.path=", "config.model.vocab_size: 20 is smaller than the 263 ids"),
        ("--workdir={}/config.py", "{}/config.py: cannot be a folder"),
        ("--model=nowhere", "nowhere: no such folder"),
        ("--modle=x", "unrecognized arguments: --modle=x; --help"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, monkeypatch, word, message):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: [])
    code = cli.guard(lambda: evaluate.main(words(folder, word.format(folder))))
    line = capsys.readouterr().err
    assert line.startswith(f"error: {message.format(folder)}") if message else not line
    assert (code, line.count("\n")) == ((2, 1) if message else (0, 0))


def test_weights_that_are_not_numbers_are_not_scored(folder, tmp_path):
    model = find_pretrained(folder / "run")
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), runs.bigram())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": params}, {"step": 7, "config": to_dict(model.meta["config"])}, wait=True)
    with pytest.raises(NonFinite, match="step 7"):
        evaluate.main([f"--model={tmp_path}", f"--config={folder / 'config.py'}"])
