"""The command line of convert_weights: what it prints, and one line for what a user can mend."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli, convert_weights
from tests.model.golden import GOLDENS

ROOT = Path(__file__).parents[2]


def call(capsys, *argv):
    code = cli.guard(lambda: convert_weights.main(list(map(str, argv))), uses_jax=False)
    return code, capsys.readouterr()


def test_dry_run_knows_the_released_model(capsys):
    code, said = call(capsys, "--dry_run")
    assert code == 0
    assert "8,243 tensors, 456,089,655,296 parameters" in said.out
    assert "912,210,767,872 bytes in bfloat16" in said.out
    line = next(line for line in said.out.splitlines() if "qkv_proj" in line)
    assert line.split()[:4] == ["70", "model.layers.L.self_attn.qkv_proj.weight", "(24576,", "6144)"]
    gates = [line for line in said.out.splitlines() if "block_sparse_moe.gate" in line]
    assert len(gates) == 2 and all("float32" in line for line in gates)


def test_dry_run_of_a_folder_and_of_its_index_alone(capsys, tmp_path):
    code, said = call(capsys, "--dry_run", f"--from={GOLDENS / 'm1_tiny'}")
    assert code == 0 and "checked: config.json, the header of every shard" in said.out
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(GOLDENS / "m1_tiny" / name, tmp_path)
    code, said = call(capsys, "--dry_run", f"--from={tmp_path}")
    assert code == 0 and "checked: config.json, 155 names in 3 shards, 849,312 bytes, which is float32" in said.out
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_local_experts": 5}))
    code, said = call(capsys, "--dry_run", f"--from={tmp_path}")
    assert code == 2 and "missing tensors: model.layers.0.block_sparse_moe.experts.4.w1.weight" in said.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--from is missing"),
        (["--from=x"], "--to is missing"),
        (["--from=nothing", "--to=/tmp/never"], "nothing: no such folder"),
        (["--from=x", "--to=y", "--model=m1"], "--model: only with --dry_run"),
        (["--dry_run", "--model=m2"], "--model: 'm2' is not in configs/models.py; it has"),
        (["--from=x", "--to=y", "--dtype=int8"], "invalid choice: 'int8'"),
    ],
)
def test_mistakes_take_one_line(capsys, argv, message):
    code, said = call(capsys, *argv)
    assert code == 2 and said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1


def test_a_terminated_conversion_cleans_up(tmp_path):
    """SIGTERM in the middle: exit code 143, and no folder under any name."""
    child = (
        "import os, signal, sys\n"
        "from experiments import cli, convert_weights\n"
        "convert_weights.progress_bar = lambda total: lambda done: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(cli.guard(lambda: convert_weights.main(sys.argv[1:])))\n"
    )
    command = [sys.executable, "-c", child, f"--from={GOLDENS / 'm1_tiny'}", f"--to={tmp_path / 'ours'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 143, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_progress_shows_bytes_and_time_left(tmp_path):
    command = [sys.executable, "-m", "experiments.convert_weights", f"--from={GOLDENS / 'm1_tiny'}"]
    done = subprocess.run(
        [*command, f"--to={tmp_path / 'ours'}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "212,328 parameters in 155 tensors, float32" in done.stdout and "written: " in done.stdout
    assert "829k/829k" in done.stderr and "B/s]" in done.stderr
