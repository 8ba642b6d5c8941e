"""The demo and its study, at their smallest, and the tables that they print."""

import json

import pytest

from experiments.demo import run, study

ACCURACY = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 100}
BETTER = {"mean": 0.75, "low": 0.65, "high": 0.83, "n": 100}


def test_table_by_hand():
    lines = run.table({"count_bits": {"majority": 0.25, "before": ACCURACY, "after": BETTER}}).splitlines()
    assert lines[1].split() == [
        "count_bits", "100", "0.250", "0.500", "[0.400,", "0.600]", "0.750", "[0.650,", "0.830]", "+0.250",
    ]  # fmt: skip


def test_study_table_has_means_over_seeds():
    row = {"majority": 0.25, "before": ACCURACY, "after": BETTER, "control": ACCURACY}
    other = {**row, "after": ACCURACY}
    table = study.markdown([{"seed": 0, "tasks": {"t": row}}, {"seed": 1, "tasks": {"t": other}}])
    assert "| t | mean | | | 0.500 | 0.625 | +0.125 | 0.500 |" in table


@pytest.mark.slow
def test_study_runs_the_demo_and_its_control(tmp_path, capsys):
    study.study(tmp_path, seeds=1, smoke=True)
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert set(result["tasks"]) == {"count_bits", "basic_arithmetic"}
    for task in result["tasks"].values():
        assert {"majority", "before", "after", "control"} <= set(task)
    out = capsys.readouterr().out
    assert "held-out accuracy" in out and "| basic_arithmetic | 0 |" in out
    study.study(tmp_path, seeds=1, smoke=True)  # again: everything is there already
    assert json.loads((tmp_path / "results.json").read_text())[0]["tasks"] == result["tasks"]
