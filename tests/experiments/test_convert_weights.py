"""The command line of convert_weights: what it prints, and one line for what a user can mend."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli, convert_weights
from m1jax.train.convert import convert
from m1jax.weights.hf_config import from_hf
from m1jax.weights.hf_folder import hf_bytes
from m1jax.weights.hf_names import hf_tensors
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


def tensor_rows(said):
    rows = [line for line in said.splitlines() if ".weight" in line]
    assert len(rows) > 10
    return rows


def test_dry_run_shows_the_dtype_that_is_stored(capsys, tmp_path):
    """The column of an index alone, whose size says bfloat16, and of a named model."""
    index = json.loads((GOLDENS / "m1_tiny" / "model.safetensors.index.json").read_text())
    shutil.copy(GOLDENS / "m1_tiny" / "config.json", tmp_path)
    config = from_hf(json.loads((tmp_path / "config.json").read_text()))
    index["metadata"] = {"total_size": hf_bytes(hf_tensors(config), "bfloat16")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for argv in ([f"--from={tmp_path}"], ["--model=m1", "--dtype=bfloat16"]):
        code, said = call(capsys, "--dry_run", *argv)
        assert code == 0
        for row in tensor_rows(said.out):
            assert (" float32 " if "moe.gate." in row else " bfloat16 ") in row


def test_dry_run_of_a_folder_and_of_its_index_alone(capsys, tmp_path):
    code, said = call(capsys, "--dry_run", f"--from={GOLDENS / 'm1_tiny'}")
    assert code == 0 and "checked: config.json, the header of every shard" in said.out
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(GOLDENS / "m1_tiny" / name, tmp_path)
    code, said = call(capsys, "--dry_run", f"--from={tmp_path}")
    assert code == 0 and "checked: config.json, 155 names in 3 shards, 849,312 bytes, which is float32" in said.out
    for dtype in ("bfloat16", "float32"):
        code, said = call(capsys, "--dry_run", f"--from={tmp_path}", f"--dtype={dtype}")
        assert code == 0 and all(("float32" if "moe.gate." in row else dtype) in row for row in tensor_rows(said.out))
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
        (["--dry_run", "--to=y"], "--to: not together with --dry_run"),
        (["--dry_run", "--max_positions=5"], "--max_positions: not together with --dry_run"),
        (["--from=x", "--to=y", "--max_positions=0"], "--max_positions: 0 must be at least 1"),
        ([f"--from={GOLDENS / 'm1_tiny'}", f"--to={__file__}/sub"], "sub: cannot be made (Not a directory)"),
        ([f"--from={GOLDENS / 'm1_tiny'}", f"--to=/tmp/{'a' * 300}"], "cannot be made (File name too long)"),
        (["--from=x", "--to=y", "--dtype=int8"], "invalid choice: 'int8'"),
    ],
)
def test_mistakes_take_one_line(capsys, argv, message):
    code, said = call(capsys, *argv)
    assert code == 2 and said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_stopped_conversion_says_so_and_cleans_up(name, code, direction, tmp_path):
    source = GOLDENS / "m1_tiny"
    if direction == "out":
        source = convert(source, tmp_path / "source", log=lambda _: None)
    child = (
        "import os, signal, sys\n"
        "from experiments import cli, convert_weights\n"
        f"convert_weights.progress_bar = lambda total: lambda done: os.kill(os.getpid(), signal.{name})\n"
        "sys.exit(cli.guard(lambda: convert_weights.main(sys.argv[1:])))\n"
    )
    if name == "SIGINT":  # once: a second one does not wait
        child = child.replace("lambda done: os.kill(", "lambda done: sent.append(1) or len(sent) == 3 and os.kill(")
        child = "sent = []\n" + child
    command = [sys.executable, "-c", child, f"--from={source}", f"--to={tmp_path / 'ours'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.strip()) == (code, "stopped, nothing written")
    assert [path.name for path in tmp_path.iterdir()] == ["source"] * (direction == "out")


def test_progress_shows_bytes_and_time_left(tmp_path):
    command = [sys.executable, "-m", "experiments.convert_weights", f"--from={GOLDENS / 'm1_tiny'}"]
    done = subprocess.run(
        [*command, f"--to={tmp_path / 'ours'}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "212,328 parameters in 155 tensors, float32" in done.stdout and "written: " in done.stdout
    assert "829k/829k" in done.stderr and "B/s]" in done.stderr
