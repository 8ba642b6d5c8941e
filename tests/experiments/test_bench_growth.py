"""What grows with what, at the smallest sizes; its tables by hand."""

from __future__ import annotations

import json

import pytest

from experiments.bench import growth


@pytest.mark.slow
def test_every_part_at_its_smallest(tmp_path, capsys):
    assert growth.main(["--smoke", "--rounds=1", f"--workdir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "growth.json").read_text())
    measured = {(row["layers"], row["tokens"]) for row in results["length"]["rows"]}
    assert measured == {("lightning", 128), ("lightning", 256), ("hybrid", 128)}
    assert all(row["seconds"] > 0 for row in results["length"]["rows"] + results["depth"])
    assert [row["layers"] for row in results["depth"]] == [8, 16]
    one, two = results["memory"]
    assert one["tensors"] < two["tensors"] and 1.5 < two["bytes"] / one["bytes"] < 2.5
    assert all(row[way] > 1 << 20 for row in (one, two) for way in ("to_checkpoint", "to_folder"))
    assert "microseconds a token" in capsys.readouterr().out


def test_tables_by_hand():
    rows = [
        {"layers": "lightning", "tokens": 1000, "seconds": 0.5},
        {"layers": "lightning", "tokens": 2000, "seconds": 1.25},
        {"layers": "softmax", "tokens": 1000, "seconds": 2.0},
    ]
    out = growth.lines({
        "machine": {"cpu": "a CPU", "cores": 2, "versions": {"jax": "1"}},
        "length": {"rows": rows, "slopes": dict.fromkeys(growth.PATTERNS, 1.3)},
        "depth": [{"layers": 8, "seconds": 4.0}, {"layers": 16, "seconds": 6.0}],
        "memory": [{"bytes": 242e6, "tensors": 611, "to_checkpoint": 120e6, "to_folder": 90e6}],
    })  # fmt: skip
    words = [line.split() for line in out]
    assert ["8", "layers,", "lightning", "0.50", "1.25", "1.30"] in words
    assert ["microseconds", "a", "token", "500.0", "625.0"] in words
    assert ["microseconds", "a", "token", "2000.0", "-"] in words
    assert ["16", "6.00", "1.50x"] in words
    assert ["611", "242", "120", "90"] in words
