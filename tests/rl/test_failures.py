"""What goes wrong in a run ends with one line that names the thing and the mend, and costs no good checkpoint."""

from __future__ import annotations

import errno
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.errors import JaxRuntimeError

from experiments import cli, train_rl, train_sft
from m1jax.data.problems import split_of
from m1jax.errors import NonFinite, UserError
from m1jax.rl.loop import train
from m1jax.train import sft
from m1jax.train.checkpoint import restore_params, steps
from m1jax.train.report import load_run
from tests import runs

ROOT = Path(__file__).parents[2]
QUIET = {"log": lambda _: None}

CONFIG = """
from pathlib import Path
from ml_collections import ConfigDict
from tests import runs

def get_config(argument=""):
    values = runs.{kind}
    if argument == "misspelt":
        values["optimizer"]["learning_rat"] = 1e-3
    return ConfigDict(values)
"""


@pytest.fixture
def rl_file(tmp_path) -> Path:
    path = tmp_path / "rl.py"
    path.write_text(CONFIG.format(kind=f"rl_values(Path({str(tmp_path)!r}))"))
    return path


@pytest.fixture
def sft_file(tmp_path) -> Path:
    path = tmp_path / "sft.py"
    path.write_text(CONFIG.format(kind="sft_values()"))
    return path


def said(capfd, main, config: Path | str, *words: str) -> str:
    """The line of an entry point that ended with code 2; the run folder is not claimed by a run that cannot be."""
    workdir = Path(str(config).partition(":")[0]).parent / "run"
    code = cli.guard(
        lambda: main(cli.parse([f"--config={config}", f"--workdir={workdir}", *words], train_rl.add_flags))
    )
    line = capfd.readouterr().err
    assert code == 2 and line.startswith("error: ") and line.count("\n") == 1, (code, line)
    assert not (workdir / "config.json").exists(), "the mended config would be refused as a changed one"
    return line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--config.loss.wieght_cap=3"], ["config.loss.wieght_cap: unknown key; did you mean weight_cap?"]),
        (["--config.tokenizer.path=absent.json"], ["tokenizer: no file absent.json"]),
        (["--init_from=absent"], ["absent: no such folder; give a Hugging Face folder, a .gguf file, a run folder"]),
        (["--config.tasks="], ["tasks: no tasks; name at least one"]),
        (["--config.tasks=absent.jsonl"], ["tasks: no file absent.jsonl"]),
        (["--config.problems.max_prompt_tokens=5"],
         ["held-out prompt 0 of task sums has 6 tokens, the window 5", "raise config.problems.max_prompt_tokens"]),
        (["--config.evaluation.problems=99"], ["task sums:", "99 asked for"]),
        (["--config.sampling.top_p=0.9"], ["config.sampling", "biases every importance ratio"]),
        (["--config.sampling.top_k=5"], ["config.sampling", "biases every importance ratio"]),
        (["--config.loss.weight_cap=0.2"], ["config.loss.weight_cap: 0.2"]),
        (["--config.model.vocab_size=19"], ["config.model.vocab_size: 19 is smaller than the 20 ids"]),
        (["--config.update.updates_per_batch=3"], ["updates_per_batch: 3 does not divide the 4 prompts"]),
    ],
    ids=lambda value: value[0].removeprefix("--").removeprefix("config.") if value[0].startswith("--") else "",
)  # fmt: skip
def test_a_mistake_in_an_rl_run(capfd, rl_file, words, parts):
    line = said(capfd, train_rl.main, rl_file, *words)
    for part in parts:
        assert part in line


def test_a_misspelt_key_in_the_file_and_a_missing_file(capfd, rl_file, tmp_path):
    line = said(capfd, train_rl.main, f"{rl_file}:misspelt")
    assert "config.optimizer.learning_rat: unknown key; did you mean learning_rate?" in line
    assert f"{tmp_path / 'absent.py'}: no such config file" in said(capfd, train_rl.main, tmp_path / "absent.py")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--config.tasks=leg_counting"], "no worked solutions for leg_counting; there are some for count_bits"),
        (["--config.rows.micro_batch_rows=3"], "micro_batch_rows: 3 does not divide per_update 4"),
        (["--config.tasks="], "tasks: no tasks"),
        (["--init_from=absent"], "absent: no such folder"),
        (["--config.model.vocab_size=100"], "config.model.vocab_size: 100 is smaller than the 263 ids"),
    ],
)
def test_a_mistake_in_a_supervised_run(capfd, sft_file, words, part):
    assert part in said(capfd, train_sft.main, sft_file, *words)


def test_a_worked_solution_longer_than_a_row_is_named(tmp_path):
    with pytest.raises(UserError, match=r"sequence 0 has \d+ tokens, a row 32; raise config.rows.tokens"):
        sft.train(runs.sft_config(rows__tokens=32), tmp_path, **QUIET)


def test_a_training_prompt_longer_than_the_window_is_named(tmp_path):
    """Held-out prompts fit, those of training do not: 1 + 9 + 1 tokens in a window of 10."""
    questions = [f"{a}+{b}+{c}=" for a in range(4) for b in range(4) for c in range(10)]
    questions = [q if split_of(q, 0.3) == "heldout" else f"000{q}" for q in questions]
    questions = [q for q in questions if len(q) == 6 or split_of(q, 0.3) == "train"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "answer": 1}) + "\n" for q in questions))
    config = runs.rl_config(tmp_path, tasks=f"{path}@tests.runs:parity", problems__max_prompt_tokens=10)
    with pytest.raises(
        UserError, match=r"^prompt 0 of task rows has 11 tokens, the window 10: '000.*max_prompt_tokens"
    ):
        train(config, tmp_path / "run", engine=runs.ScriptedEngine(), **QUIET)


@pytest.mark.parametrize(
    ("module", "file", "line"),
    [
        (
            "train_rl",
            "rl_file",
            "config.update.micro_batch_rows: 8 rows cannot be dealt out to 3 devices; choose 6 or 9",
        ),
        ("train_sft", "sft_file", "config.rows.micro_batch_rows: 2 rows cannot be dealt out to 3 devices; choose 3"),
    ],
)
def test_rows_that_the_devices_do_not_divide(request, tmp_path, module, file, line):
    config = request.getfixturevalue(file)
    child = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", f"--config={config}", f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "3"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (child.returncode, child.stderr) == (2, f"error: {line}\n")


# ---------------------------------------------------------------- while it runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(runs.rl_config(folder), folder / "run", engine=runs.ScriptedEngine(), **QUIET)
    assert steps(folder / "run" / "checkpoints") == [2, 3]
    return folder


def test_a_truncated_checkpoint_is_told_and_the_one_before_is_used(finished):
    run = finished / "run"
    params, metrics = restore_params(run)[0], load_run(run).metrics
    victim = max((run / "checkpoints" / "00000003").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    os.truncate(victim, victim.stat().st_size // 2)
    (run / "summary.json").unlink()
    lines: list[str] = []
    again = train(runs.rl_config(finished), run, engine=runs.ScriptedEngine(), log=lines.append)
    assert "checkpoint of step 3 is damaged" in lines[0] and "trying the one before" in lines[0]
    assert lines[1] == f"resumed {run} after step 2 of 3"
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    assert [row["step"] for row in again.metrics] == [0, 1, 2, 3]
    assert again.metrics[3]["train/loss"] == metrics[3]["train/loss"] and again.summary["steps"] == 3


def test_a_changed_config_refuses_to_resume_and_names_the_key(finished):
    config = runs.rl_config(finished, loss__weight_cap=4.0)
    with pytest.raises(UserError, match=r"another config: loss.weight_cap was 5.0 and is 4.0; give the old values or"):
        train(config, finished / "run", engine=runs.ScriptedEngine(), **QUIET)


def test_parameters_of_another_model_are_refused(tmp_path):
    config = runs.rl_config(tmp_path, init_from=runs.save_bigram(tmp_path), model__hidden_size=16)
    with pytest.raises(UserError, match="another network: hidden_size is 32 there and 16 in config.model"):
        train(config, tmp_path / "run", engine=runs.ScriptedEngine(), **QUIET)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capfd):
    save, calls = ocp.StandardCheckpointer.save, []

    def full(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 3:  # steps 0 and 1 are saved
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return save(self, path, *args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full)
    run = tmp_path / "run"
    code = cli.guard(lambda: train(runs.rl_config(tmp_path), run, engine=runs.ScriptedEngine(), **QUIET) and None)
    line = capfd.readouterr().err
    assert code == 2 and line.count("\n") == 1
    assert "no space left for a checkpoint; the last good checkpoint, step 1, stays; free some space" in line
    assert steps(run / "checkpoints") == [0, 1]
    again = train(runs.rl_config(tmp_path), run, engine=runs.ScriptedEngine(), **QUIET)
    assert [row["step"] for row in again.metrics] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "logprob", "message"),
    [
        (
            {"optimizer__learning_rate": 1e30, "update__updates_per_batch": 1},
            -0.7,
            "step 1, stage update: train/param_norm is not finite",
        ),
        ({}, float("nan"), "step 1, stage rollout: a log-probability is not finite"),
    ],
)
def test_numbers_that_are_not_finite_are_never_saved(tmp_path, changes, logprob, message):
    class Breaks(runs.ScriptedEngine):
        def generate(self, prompts, responses, sampling, seed):
            self.logprob = logprob if responses > 1 else -0.7
            return super().generate(prompts, responses, sampling, seed)

    with pytest.raises(NonFinite, match=message):
        train(runs.rl_config(tmp_path, **changes), tmp_path / "run", engine=Breaks(), **QUIET)
    assert steps(tmp_path / "run" / "checkpoints") == [0]
    params = restore_params(tmp_path / "run")[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_nan_among_the_parameters_is_the_updates_loss(tmp_path):
    params = runs.bigram()
    params["head"] = params["head"] + jnp.nan
    with pytest.raises(NonFinite, match="step 1, stage update: train/loss is not finite"):
        train(runs.rl_config(tmp_path), tmp_path / "run", params=params, engine=runs.ScriptedEngine(), **QUIET)


def test_a_supervised_run_stops_before_it_saves_what_is_not_finite(tmp_path):
    config = runs.sft_config(optimizer__learning_rate=1e30, optimizer__warmup_updates=0, checkpoint__every=1)
    with pytest.raises(NonFinite, match="step 1, stage update: train/param_norm is not finite; stopped"):
        sft.train(config, tmp_path, **QUIET)
    assert steps(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(
    ("module", "target", "file", "setting"),
    [
        ("train_rl", "m1jax.rl.loop.train", "rl_file", "lower config.update.micro_batch_rows"),
        ("train_sft", "m1jax.train.sft.train", "sft_file", "lower config.rows.micro_batch_rows"),
    ],
)
def test_out_of_memory_names_the_micro_batch_of_its_entry_point(
    request, capfd, monkeypatch, module, target, file, setting
):
    def exhausted(*_, **__):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes.\nmore lines")

    monkeypatch.setattr(target, exhausted)
    monkeypatch.setattr(sys, "argv", [module, f"--config={request.getfixturevalue(file)}", "--workdir=run"])
    monkeypatch.delitem(sys.modules, f"experiments.{module}", raising=False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"experiments.{module}", run_name="__main__")
    line = capfd.readouterr().err
    assert caught.value.code == 2 and line.count("\n") == 1
    assert f"error: out of memory: {setting}" in line and "allocating 4294967296 bytes" in line
