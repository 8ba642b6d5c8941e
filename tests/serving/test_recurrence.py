"""The server's forms of lightning attention, which no model here can tell apart from ours: in the server's Python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from m1jax.pallas_kernels.lightning_attention.slopes import slopes
from tests.serving.server import ROOT, environment, installed

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(
        not installed(), reason="NO SGLANG SERVER IS TESTED: its environment is absent, make sglang-env"
    ),
]


@pytest.fixture(scope="module")
def told():
    variables = {"PYTHONPATH": str(ROOT / "m1jax/serving/cpu"), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [environment() / "bin/python", Path(__file__).with_name("kernel_child.py")],
        env=os.environ | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_slopes_are_ours(told):
    for case, theirs in told["slopes"].items():
        np.testing.assert_array_equal(np.float32(theirs), slopes(*map(int, case.split())), err_msg=case)


def test_slopes_on_a_gpu_are_ours_on_every_rank(told):
    assert len(told["their slopes"]) == 11
    for case, apart in told["their slopes"].items():
        assert apart < 3e-7, case  # float32, in another order


@pytest.mark.parametrize("form", ["token by token", "seg_la"])
def test_chunks_and_steps_are_the_recurrence(told, form):
    """Prompts from zero and after a prefix, several in a batch, single steps, states from inside a prompt.

    Relative to the largest entry.
    """
    assert len(told["apart"]) == 5
    for case, apart in told["apart"].items():
        assert apart[form] < 3e-6, (case, apart)
