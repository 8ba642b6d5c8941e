"""launch/sglang.sh: what it starts it stops, a server that was killed comes back, keys are asked for and not shown."""

from __future__ import annotations

import os
import subprocess
import urllib.error
from contextlib import suppress
from pathlib import Path

import pytest

from tests.model.golden import GOLDENS
from tests.serving.server import ROOT, Server, group_alive, installed

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(
        not installed(), reason="NO SGLANG SERVER IS TESTED: its environment is absent, make sglang-env"
    ),
]


def test_a_killed_server_starts_again_and_a_stopped_one_leaves_nothing(tmp_path):
    server = Server(GOLDENS / "m1_tiny", tmp_path / "log", "--weight-version", "7",
                    SGLANG_API_KEY="ordinary-secret", SGLANG_ADMIN_KEY="admin-secret")  # fmt: skip
    first = server.start().pid
    assert first is not None
    with pytest.raises(urllib.error.HTTPError, match="401"):
        server.get("/model_info")
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            assert b"-secret" not in process.read_bytes()
    server.kill()
    assert not group_alive(first, patience=10)
    second = server.start().pid
    assert second is not None and second != first
    server.stop()
    assert not group_alive(second)


def test_a_server_that_cannot_start_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "minimax_m1", "architectures": ["MiniMaxM1ForCausalLM"]}')
    server = Server(tmp_path, tmp_path / "log")
    with pytest.raises(RuntimeError, match="vocab_size is missing"):
        server.start()


def test_usage():
    script = ROOT / "launch" / "sglang.sh"
    told = subprocess.run([script], capture_output=True, text=True)
    assert told.returncode == 2 and "launch/sglang.sh runs/m1/hf 30000" in told.stderr
    told = subprocess.run([script, "x", "1"], capture_output=True, text=True, env=os.environ | {"SGLANG_VENV": "/none"})
    assert told.returncode == 2 and "make sglang-env" in told.stderr
