"""Entry points: what a command line means, and the one line and exit code of everything that can go wrong."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import cli
from m1jax.config import build
from m1jax.errors import NonFinite, UserError
from m1jax.train.interrupt import Interrupted

ROOT = Path(__file__).parents[2]

CONFIG = """
from ml_collections import ConfigDict

def get_config(size=""):
    config = ConfigDict({"loss": {"weight_cap": 5}, "tasks": ("a", "b"), "clip": None, "name": "x"})
    if size == "smoke":
        config.steps = 1
    if size == "broken":
        raise RuntimeError("first line\\nsecond line")
    return config
"""

ENTRY = """
import dataclasses, sys, time
from experiments import cli
from m1jax.config import build
from m1jax.train.interrupt import Interrupted, StopSignal

@dataclasses.dataclass(frozen=True)
class Loss:
    weight_cap: float

@dataclasses.dataclass(frozen=True)
class Config:
    loss: Loss
    tasks: tuple[str, ...]
    clip: float | None
    name: str
    steps: int = 3

def main(arguments):
    print(build(Config, arguments.config), flush=True)
    if arguments.config["name"] == "waits":
        with StopSignal() as stop:
            print("ready", flush=True)
            while not stop.requested:
                time.sleep(0.01)
        raise Interrupted(stop.exit_code)

if __name__ == "__main__":
    cli.run(main)
"""


@dataclasses.dataclass(frozen=True)
class Loss:
    weight_cap: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    loss: Loss = dataclasses.field(default_factory=Loss)
    tasks: tuple[str, ...] = ()
    clip: float | None = None
    name: str = ""
    steps: int = 3
    remat: bool = False


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def parse(path: Path | str, *words: str) -> cli.Arguments:
    return cli.parse([f"--config={path}", "--workdir=runs/x", *words])


def test_overrides_become_values_of_the_right_type(config_file):
    arguments = parse(
        f"{config_file}:smoke",
        "--config.loss.weight_cap=2.5",  # 5 in the file: the field, not the file, says float
        "--config.tasks=rows.jsonl@mod:fn",
        "--config.clip=1e-3",  # None in the file
        "--config.name=3",  # a string in the file
        "--config.remat=true",  # not in the file
        "--init_from=runs/y",
    )
    config = build(Config, arguments.config)
    assert config == Config(Loss(2.5), ("rows.jsonl@mod:fn",), 1e-3, "3", 1, True)
    assert (arguments.workdir, arguments.init_from) == (Path("runs/x"), Path("runs/y"))


def test_a_tuple_is_overridden_whole_or_entry_by_entry(config_file):
    for words, tasks in (
        (["--config.tasks=('c', 'd')"], ("c", "d")),
        (["--config.tasks=c"], ("c",)),
        (["--config.tasks=c", "--config.tasks=d"], ("c", "d")),
        (["--config.tasks=()"], ()),
        ([], ("a", "b")),
    ):
        assert build(Config, parse(config_file, *words).config).tasks == tasks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.loss.wieght_cap=3"], "config.loss.wieght_cap: unknown key; did you mean weight_cap?"),
        (["--config.lss.weight_cap=3"], "config.lss: unknown key; did you mean loss?"),
        (["--config.steps=many"], "config.steps: expected int, found 'many' (str)"),
        (["--config.name.more=3"], "config.name.more: name is a value, not a section"),
        (["--config.steps"], "--config.steps: write an override as --config.section.key=VALUE"),
        (["--config..steps=3"], "--config..steps=3: write an override as --config.section.key=VALUE"),
        (["--wrokdir=x"], "unrecognized arguments: --wrokdir=x; --help lists the flags"),
    ],
)
def test_a_mistake_on_the_command_line(config_file, words, message):
    with pytest.raises(UserError) as caught:
        build(Config, parse(config_file, *words).config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        (None, "", "{}: no such config file"),
        (CONFIG, ":broken", "{}:broken: RuntimeError: first line, line 9"),
        ("import ml_collection", "", "{}: ModuleNotFoundError: No module named 'ml_collection', line 1"),
        ("def get_config(:\n", "", "{}: SyntaxError: invalid syntax (config.py, line 1), line 1"),
        ("x = 1\n", "", "{}: AttributeError: module 'config_file' has no attribute 'get_config'"),
        ("def get_config():\n    pass\n", "", "{}: get_config() returned NoneType, expected a ConfigDict"),
    ],
)
def test_a_mistake_in_the_config_file(tmp_path, text, argument, message):
    path = tmp_path / "config.py"
    if text:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(f"{path}{argument}")
    assert str(caught.value) == message.format(path)


def test_a_misspelt_key_inside_the_file_is_found(config_file):
    config_file.write_text(CONFIG.replace("weight_cap", "wieght_cap"))
    with pytest.raises(UserError, match="config.loss.wieght_cap: unknown key; did you mean weight_cap?"):
        build(Config, parse(config_file).config)


def test_a_run_needs_a_config():
    with pytest.raises(UserError, match="required: --config"):
        cli.parse(["--workdir=x"])


def raising(error: BaseException):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        (lambda: None, 0, ""),
        (raising(UserError("rows.jsonl, line 3: no field answer")), 2, "error: rows.jsonl, line 3: no field answer\n"),
        (
            raising(NonFinite(3, "update", "loss")),
            1,
            "error: step 3, stage update: loss is not finite; stopped, the last good checkpoint stays\n",
        ),
        (raising(Interrupted(75)), 75, "stopped and saved; resume with: RESUME\n"),
        (raising(KeyboardInterrupt()), 130, "stopped at once; resume from the last checkpoint with: RESUME\n"),
        (
            raising(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")),
            2,
            "error: no space left on the disk (runs/x/metrics.jsonl); the last good checkpoint stays\n",
        ),
    ],
)
def test_exit_codes(capfd, body, code, line):
    assert cli.guard(body, resume="RESUME") == code
    assert capfd.readouterr().err == line


def test_out_of_memory_names_the_micro_batch(capfd):
    assert cli.guard(lambda: jnp.zeros(1 << 46).block_until_ready()) == 2  # 256 TiB: the allocator's own error
    line = capfd.readouterr().err
    assert "out of memory: lower the micro_batch_rows of the stage that ran" in line and line.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    for bug in (ValueError("bug"), OSError(errno.ENOENT, "gone", "x")):
        with pytest.raises(type(bug)):
            cli.guard(raising(bug))


def start(tmp_path: Path, *words: str) -> subprocess.Popen:
    (tmp_path / "entry.py").write_text(ENTRY)
    (tmp_path / "config.py").write_text(CONFIG)
    command = [sys.executable, "-m", "entry", "--config=config.py", "--workdir=run dir", *words]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_ends_with_one_line_and_code_2(tmp_path):
    child = start(tmp_path, "--config.loss.wieght_cap=3")
    out, err = child.communicate(timeout=60)
    assert (out, child.returncode) == ("", 2)
    assert err == "error: config.loss.wieght_cap: unknown key; did you mean weight_cap?\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_process_that_is_asked_to_stop_prints_the_line_that_resumes(tmp_path, number, code):
    child = start(tmp_path, "--config.name=waits")
    assert child.stdout is not None
    while (line := child.stdout.readline()) != "ready\n":
        assert line, child.communicate()
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    command = "python -m entry --config=config.py '--workdir=run dir' --config.name=waits"
    assert err == f"stopped and saved; resume with: {command}\n"
