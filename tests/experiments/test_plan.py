"""The plan: its numbers, its picture, that JAX never starts, and the one line of all that can be asked wrong."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import plan
from m1jax.model import accounting as count

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # paths inside configs are relative to the checkout


def printed(capsys, tmp_path, *words: str) -> str:
    assert plan.main([f"--workdir={tmp_path / 'out'}", *words]) == 0
    return capsys.readouterr().out


def cells(out: str, title: str, first: str) -> str:
    """The rest of the row that starts with `first` in the block that starts with `title`."""
    block = next(part for part in out.split("\n\n") if part.startswith(title))
    row = next(line for line in block.split("\n") if line.strip().startswith(first))
    return " ".join(row.strip().removeprefix(first).split())


def test_the_plan_of_m1_from_the_command_line(tmp_path):
    code = "import sys; from experiments import plan; plan.main(sys.argv[1:]); print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, f"--workdir={tmp_path}"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    out = done.stdout
    assert done.stderr == "" and out.endswith(f"\n\nwritten: {tmp_path / 'flops.png'}\nFalse\n")
    assert cells(out, "Parameters of MiniMax-M1", "total") == "456,089,655,296"
    assert cells(out, "Parameters of MiniMax-M1", "active per token, with the head (N_act)") == "47,174,113,280 10.34%"
    assert cells(out, "FLOPs per token", "128K") == "114 G 138 G 349 G 465 G 18.5%"
    assert cells(out, "Bytes that do not grow", "weights (bfloat16; router gates at least float32)") == "850 GiB"
    assert cells(out, "Bytes while decoding, batch 1", "1M") == "40.0 GiB 40.3 GiB 68.6 GiB 188 GiB 782 GiB"
    assert cells(out, "FLOPs of generating", "128K") == "15.2 P 52.5 P 32.1 P"
    over_r1 = "FLOPs of MiniMax-M1 over those of DeepSeek-R1"
    assert cells(out, over_r1, "64K") == "0.445 0.290 0.366 0.167 0.385 under 0.50"
    assert cells(out, over_r1, "100,000") == "0.344 0.222 0.282 0.120 0.292 about 0.25"
    assert cells(out, over_r1, "128K") == "0.290 0.189 0.239 0.098 0.244"
    assert cells(out, "FLOPs of MiniMax-M1 over those of Qwen3", "128K") == "0.474 0.308 0.367"
    assert all(len(line) <= 120 for line in out.split("\n"))


def test_the_reports_chart_against_the_shapes():
    """Its n^2 terms are R1's and Qwen3's in its own mix; M1's is that of 8 softmax layers instead of 10."""
    m1 = count.footprint(plan.chosen_model("m1", None)[1])
    r1, qwen3 = count.DEEPSEEK_R1.footprint(), count.footprint(count.QWEN3_235B)
    for name, shape, layers in ((plan.R1, r1, 61), (plan.QWEN3, qwen3, 94), (plan.M1, m1, 8)):
        mix = count.attention_flops(dataclasses.replace(shape, softmax_layers=layers), "chart")
        assert mix == pytest.approx(plan.FIGURE_1[name][1], rel=2e-3)
    assert [round(count.attention_flops(shape, "chart") / 1e6, 3) for shape in (r1, qwen3, m1)] == [3.498, 2.310, 0.246]
    assert 2 * qwen3.active == pytest.approx(plan.FIGURE_1[plan.QWEN3][0], rel=2e-3)
    assert 2 * r1.active == pytest.approx(plan.FIGURE_1[plan.R1][0], rel=0.03)
    assert plan.FIGURE_1[plan.M1][0] - 2 * m1.active == pytest.approx(1.02e10, rel=1e-2)


def test_the_picture(tmp_path, capsys):
    printed(capsys, tmp_path, "--accounting=full")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["flops.png"]
    data = (tmp_path / "out" / "flops.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width > 1000 and height > 400


def test_money_follows_from_the_flags(tmp_path, capsys):
    out = printed(capsys, tmp_path)
    assert cells(out, "  result", "GPU-hours of the run: devices * days * 24") == "258,048"
    assert cells(out, "  result", "dollars per GPU-hour: dollars / GPU-hours, unless given") == "2.07"
    # F(20,000) = 1.9598e15; 50,000 responses at 989e12 * (0.1 rollout, 0.3 training of 4 passes) FLOP/s
    assert cells(out, "  result", "1e9 response tokens: GPU-hours") == "642.2"
    assert cells(out, "  result", "1e9 response tokens: dollars") == "1,331"
    words = "--dollars_per_gpu_hour=4 --rollout_utilisation=0.2 --devices=256 --training_passes=3"
    out = printed(capsys, tmp_path, *words.split())
    # 1.9598e15 * 50,000 * (1 / 0.2 + 3 / 0.3) / 989e12 / 3600 = 412.8
    assert cells(out, "  result", "1e9 response tokens: GPU-hours") == "412.8"
    assert cells(out, "  result", "1e9 response tokens: dollars") == "1,651"
    assert cells(out, "  result", "1e9 response tokens: hours on 256 GPUs") == "1.61"
    assert cells(out, "An RL run", "--devices") == "256 given"


def test_other_models_batches_and_contexts(tmp_path, capsys):
    out = printed(capsys, tmp_path, "--model=tiny", "--batch=512", "--context", "128", "1K")
    assert out.startswith("Parameters of tiny\n") and "814,592" in out and "the report says" not in out
    # 512 rows: states 7 * 4 * 16 * 16 * 4 bytes a row, keys and values 2 * 2 * 16 * 4 bytes a token
    assert cells(out, "Bytes that do not grow", "lightning states, batch 512") == "14.0 MiB"
    assert cells(out, "Bytes while decoding, batch 512", "128").startswith("16.0 MiB ")
    assert cells(out, "Bytes while decoding, batch 512", "1K").startswith("128 MiB ")
    out = printed(capsys, tmp_path, "--model=smollm2_135m")
    assert cells(out, "Parameters of smollm2_135m", "total") == "134,515,008" and "\n  head " not in out
    assert cells(out, "Bytes while decoding", "8K").startswith("360 MiB ")
    assert "32K" not in next(part for part in out.split("\n\n") if part.startswith("Bytes while"))  # its window is 8K


@pytest.mark.parametrize("name", plan.MODELS)
def test_every_model_has_a_plan(name, tmp_path, capsys):
    assert "written: " in printed(capsys, tmp_path, f"--model={name}")


def test_the_model_of_a_runs_config(tmp_path, capsys):
    out = printed(capsys, tmp_path, "--config=configs/rl_tiny_cpu.py:smoke")
    assert out.startswith("Parameters of rl_tiny_cpu\n") and "814,592" in out


def test_the_moments_of_a_runs_config(tmp_path, capsys):
    config = tmp_path / "moments.py"
    config.write_text(
        "from configs import models\n"
        "def get_config(moments=''):\n"
        "    return {'model': models.m1().to_dict(), 'optimizer': {'moments': moments}}\n"
    )
    title, row = "Bytes that do not grow", "AdamW's m and v in "
    for moments, what, held in (("", "the parameters' dtypes", "1.66 TiB"), ("float32", "float32", "3.32 TiB")):
        out = printed(capsys, tmp_path, f"--config={config}:{moments}")
        assert cells(out, title, f"{row}{what} (optimizer.moments={moments!r})") == held
        assert out.count("(optimizer.moments=") == 1
    assert printed(capsys, tmp_path).count("(optimizer.moments=") == 3
    assert plan.main([f"--workdir={tmp_path}", f"--config={config}:float16"]) == 2
    assert capsys.readouterr().err.startswith("error: config.optimizer.moments: 'float16' must be one of ")


def test_the_accounting_of_the_tables(tmp_path, capsys):
    full = printed(capsys, tmp_path, "--accounting=full")
    assert cells(full, "FLOPs of generating n tokens, accounting full", "128K") == "18.0 P 95.5 P 58.6 P"
    assert "kappa 327,680," in full


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=m2"], "argument --model: invalid choice: 'm2'"),
        (["--accounting=casual"], "argument --accounting: invalid choice: 'casual'"),
        (["--modle=m1"], "unrecognized arguments: --modle=m1; --help lists the flags"),
        (["--model=tiny", "--config=x.py"], "argument --config: not allowed with argument --model"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py: no such config file"),
        (["--config={tmp}/empty.py"], "{tmp}/empty.py: has no section model"),
        (["--config={tmp}/wrong.py"], "config.model.num_layer: unknown key; did you mean num_layers?"),
        (["--batch=0"], "--batch=0: must be at least 1"),
        (["--context=64G"], "argument --context: '64G' is no number of tokens; write 65536 or 64K"),
        (["--context=0"], "argument --context: '0' is no number of tokens"),
        (["--model=smollm2_135m", "--context=16K"], "--context=16384: the model was made for 8,192 tokens at most"),
        (["--rollout_utilisation=1.5"], "--rollout_utilisation=1.5: a share of the peak is at most 1"),
        (["--days=nan"], "--days=nan: must be above 0"),
        (["--response_tokens=0"], "--response_tokens=0: must be above 0"),
        (["--workdir={tmp}/empty.py"], "{tmp}/empty.py/flops.png: cannot be written (File exists); give another"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words, message, tmp_path, capfd):
    (tmp_path / "empty.py").write_text("def get_config():\n    return {}\n")
    (tmp_path / "wrong.py").write_text("def get_config():\n    return {'model': {'num_layer': 8}}\n")
    words = [word.format(tmp=tmp_path) for word in words]
    if not any(word.startswith("--workdir") for word in words):
        words = [f"--workdir={tmp_path / 'out'}", *words]
    assert plan.main(words) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {message.format(tmp=tmp_path)}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1.00 KiB"), (1024, "1.00 KiB"), (10 * 2**20, "10.0 MiB"), (2**40, "1.00 TiB")],
)
def test_sizes(value, text):
    assert plan.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12, "12"), (999.6e9, "1.00 T"), (9.996e9, "10.0 G"), (123456, "123 k"), (1.5e-3, "0.00")],
)
def test_numbers(value, text):
    assert plan.si(value) == text


def test_lengths_are_read_as_they_are_written():
    for text, n in (("64K", 65_536), ("1M", 2**20), ("100,000", 100_000), ("1k", 1024), ("65536", 65_536)):
        assert plan.tokens(text) == n
        assert plan.tokens(plan.length(n)) == n
