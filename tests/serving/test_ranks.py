"""An update of a server of several ranks is all of theirs or none's: the plugin's check, in two of its processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.model.golden import GOLDENS
from tests.serving.server import ROOT, environment, installed

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(
        not installed(), reason="NO SGLANG SERVER IS TESTED: its environment is absent, make sglang-env"
    ),
]
MODEL = str(GOLDENS / "m1_tiny")
ABSENT = MODEL + " is not there yet"
UPDATES = {"seen": [(MODEL, True)] * 2, "unseen by 0": [(ABSENT, True), (MODEL, True)],
           "unseen by 1": [(MODEL, True), (ABSENT, True)], "unread by 1": [(MODEL, True), (MODEL, False)]}  # fmt: skip
"""(the folder that a rank sees, whether it can read it) for both ranks."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each update told on both ranks."""
    variables = {"PYTHONPATH": f"{ROOT / 'm1jax/serving/cpu'}:{ROOT}", "SGLANG_USE_CPU_ENGINE": "1"}
    command = [environment() / "bin/python", Path(__file__).with_name("ranks_child.py")]
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    ranks = [
        subprocess.Popen(
            [*command, str(rank), meeting, MODEL, json.dumps([update[rank] for update in UPDATES.values()])],
            env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    found = [rank.communicate(timeout=180) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], found
    by_rank = [json.loads(out.splitlines()[-1]) for out, _ in found]
    return dict(zip(UPDATES, zip(*by_rank, strict=True), strict=True))


def test_a_folder_that_all_see_is_taken_by_all(told):
    assert all(rank["done"] and rank["begun"] for rank in told["seen"])


@pytest.mark.parametrize("blind", [0, 1])
def test_a_folder_that_one_rank_does_not_see_changes_none(told, blind):
    ranks = told[f"unseen by {blind}"]
    assert not any(rank["done"] or rank["begun"] for rank in ranks)
    assert "cannot be read" in ranks[blind]["message"] and "another rank" in ranks[1 - blind]["message"]


def test_weights_that_one_rank_could_not_read_fail_on_all(told):
    ranks = told["unread by 1"]
    assert [rank["done"] for rank in ranks] == [False, False] and all(rank["begun"] for rank in ranks)
    assert "another rank could not read the weights" in ranks[0]["message"]
