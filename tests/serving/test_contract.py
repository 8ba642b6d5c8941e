"""Real SGLang servers keep the contract that their double keeps, so that the double cannot drift from them.

The servers run already, as tests/recorded/record.py asks for them: SGLANG_URL, SGLANG_NARROW_URL, and the folders with
their weights and with others, SGLANG_WEIGHTS and SGLANG_OTHER_WEIGHTS.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import sglang_contract as contract

pytestmark = pytest.mark.sglang


def _subject(url: str, **more) -> contract.Subject:
    if url not in os.environ:
        pytest.skip(f"{url} names no server")
    a, b = (Path(os.environ[name]) for name in ("SGLANG_WEIGHTS", "SGLANG_OTHER_WEIGHTS"))
    config = json.loads((a / "config.json").read_text())
    return contract.Subject(
        os.environ[url], config["vocab_size"], a, b, context_length=config["max_position_embeddings"], **more
    )


@pytest.fixture(scope="module")
def real_server():
    return _subject("SGLANG_URL")


@pytest.fixture(scope="module")
def narrow_server():
    return _subject("SGLANG_NARROW_URL", key="key", admin_key="admin", incremental=True)


@pytest.mark.parametrize("claim", contract.ROOMY, ids=lambda claim: claim.__name__)
def test_keeps_the_contract(claim, real_server):
    contract.holds(claim, real_server)


@pytest.mark.parametrize("claim", contract.NARROW, ids=lambda claim: claim.__name__)
def test_keeps_the_contract_with_keys_and_a_short_queue(claim, narrow_server):
    contract.holds(claim, narrow_server)


# The last two leave no server behind.


def test_an_unknown_token_ends_it(real_server):
    contract.an_unknown_token_ends_the_server(real_server)


def test_a_cut_file_ends_it(narrow_server, tmp_path):
    contract.a_cut_file_ends_the_server(narrow_server, tmp_path)
