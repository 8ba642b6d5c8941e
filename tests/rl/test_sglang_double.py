"""The double of an SGLang server keeps the contract of the real one, its tokens are its model's, its faults happen."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import sglang_contract as contract
from tests.sglang_double import ALL, Double, digest, logprobs, routed_experts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of weights."""
    made = []
    for name in "ab":
        made.append(tmp_path_factory.mktemp("weights") / name)
        made[-1].mkdir()
        save_file({"w": np.full(4, ord(name), np.float32)}, made[-1] / "model.safetensors")
    return made


def subject(double, folders, **more):
    return contract.Subject(double.url, double.vocab_size, *folders, context_length=double.context_length, **more)


@pytest.mark.parametrize("claim", contract.ROOMY, ids=lambda claim: claim.__name__)
def test_keeps_the_contract(claim, folders):
    with Double(weights=digest(folders[0]), incremental=False, seconds_per_token=0.001, context_length=2000) as double:
        contract.holds(claim, subject(double, folders))


@pytest.mark.parametrize("claim", contract.NARROW, ids=lambda claim: claim.__name__)
def test_keeps_the_contract_with_keys_and_a_short_queue(claim, folders):
    with Double(weights=digest(folders[0]), seconds_per_token=0.001, api_key="key", admin_key="admin", max_running=1,
                max_queued=2) as double:  # fmt: skip
        contract.holds(claim, subject(double, folders, key="key", admin_key="admin", incremental=True))
