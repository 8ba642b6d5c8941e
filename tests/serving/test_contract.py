"""Real SGLang servers keep the contract that their double keeps, so that the double cannot drift from them.

The double is the server as it is without our package, which two claims are about: see the last test.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import sglang_contract as contract
from tests.model.golden import GOLDENS
from tests.serving.models import perturbed, weights
from tests.serving.server import Server, installed

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(not installed(), reason="no SGLang server's environment; make sglang-env sets it up"),
]

MODEL = GOLDENS / "qwen2_tiny"


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    return perturbed(weights("qwen2_tiny", folder), folder / "weights").folder


def subject(server: Server, others: Path, **more) -> contract.Subject:
    config = json.loads((MODEL / "config.json").read_text())
    return contract.Subject(
        server.url, config["vocab_size"], MODEL, others, incremental=True,
        context_length=config["max_position_embeddings"], **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def real_server(others, tmp_path_factory):
    server = Server(MODEL, tmp_path_factory.mktemp("server") / "log").start()
    yield subject(server, others)
    server.stop()


@pytest.fixture(scope="module")
def narrow_server(others, tmp_path_factory):
    flags = ("--max-running-requests", "1", "--max-queued-requests", "2")
    log = tmp_path_factory.mktemp("narrow") / "log"
    server = Server(MODEL, log, *flags, SGLANG_API_KEY="key", SGLANG_ADMIN_KEY="admin").start()
    yield subject(server, others, key="key", admin_key="admin")
    server.stop()


@pytest.mark.parametrize("claim", contract.ROOMY, ids=lambda claim: claim.__name__)
def test_keeps_the_contract(claim, real_server):
    contract.holds(claim, real_server)


@pytest.mark.parametrize("claim", contract.NARROW, ids=lambda claim: claim.__name__)
def test_keeps_the_contract_with_keys_and_a_short_queue(claim, narrow_server):
    contract.holds(claim, narrow_server)


def test_an_unknown_token_ends_it(real_server):
    """Last, for it leaves no server. A file that is cut short would end one as well; our package refuses it instead."""
    contract.an_unknown_token_ends_the_server(real_server)
