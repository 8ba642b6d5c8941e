"""The benchmark: its slope is hand-checked, and every part of it runs at its smallest."""

from __future__ import annotations

import json

import pytest

from experiments.bench import core, update
from experiments.bench.__main__ import main


def test_slope_of_exact_powers():
    assert core.log_log_slope([(1024, 0.5), (2048, 1.0), (4096, 2.0)]) == pytest.approx(1)
    assert core.log_log_slope([(10, 3.0), (20, 12.0), (80, 192.0)]) == pytest.approx(2)


def test_interleaved_programs_run_in_turn_after_one_first_call():
    calls = []
    medians, first = core.interleaved_medians({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert set(medians) == {"a", "b"} and first >= 0


def test_cores_of_every_kind_and_length(tmp_path, capsys):
    sizes = ["--softmax_longest=32", "--heads=2", "--head_dim=8", "--block=16", "--rounds=2"]
    assert main(["--only=core", f"--workdir={tmp_path}", "--lengths", "32", "64", *sizes]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    measured = {(row["kind"], row["pass"], row["tokens"]) for row in results["core"]["rows"]}
    cores = [("lightning", 32), ("lightning", 64), ("softmax", 32)]
    assert measured == {(kind, way, tokens) for kind, tokens in cores for way in ("forward", "forward+backward")}
    assert set(results["core"]["slopes"]) == {"lightning forward", "lightning forward+backward"}
    assert (tmp_path / "bench.png").stat().st_size > 0
    assert "lightning forward" in capsys.readouterr().out


@pytest.mark.slow
def test_stages_of_the_demo(tmp_path, capsys):
    assert main(["--smoke", "--only=stages", f"--workdir={tmp_path}"]) == 0
    stages = json.loads((tmp_path / "bench.json").read_text())["stages"]
    assert stages["sft"]["tokens_per_second"] > 0 and stages["rl"]["rollout_tokens_per_second"] > 0
    assert {"rollout", "reward", "update"} <= set(stages["rl"]["seconds_per_batch"])
    assert "generation batch" in capsys.readouterr().out


def test_stages_of_an_update(capsys):
    config = "configs/rl_tiny_cpu.py:smoke"
    assert update.main([f"--config={config}", "--rounds=1", "--rows=4", "--tokens=48"]) == 0
    printed = capsys.readouterr().out
    for stage in (*update.WITHOUT, "one update"):
        assert stage in printed
    assert update.main([f"--config={config}", "--model=ConfigDict"]) == 2
    assert "--model: there is no 'ConfigDict' in configs/models.py" in capsys.readouterr().err
