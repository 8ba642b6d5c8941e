"""The double of an SGLang server keeps the contract of the real one, its tokens are its model's, its faults happen."""

from __future__ import annotations

import base64
import http.client
import json
import os
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
    with Double(weights=digest(folders[0]), incremental=False, seconds_per_token=0.003, context_length=2000) as double:
        contract.holds(claim, subject(double, folders))


@pytest.mark.parametrize("claim", contract.NARROW, ids=lambda claim: claim.__name__)
def test_keeps_the_contract_with_keys_and_a_short_queue(claim, folders):
    with Double(weights=digest(folders[0]), seconds_per_token=0.003, api_key="key", admin_key="admin", max_running=1,
                max_queued=2) as double:  # fmt: skip
        contract.holds(claim, subject(double, folders, key="key", admin_key="admin", incremental=True))


def test_dies_as_the_real_one_and_comes_back_as_it_started(folders, tmp_path):
    with Double(weights=digest(folders[0]), weight_version="start") as double:
        on = subject(double, folders, incremental=True)
        first, port = on.checksum(), double.port
        on.load(folders[1], "later")
        assert on.generate().meta["weight_version"] == "later"
        contract.an_unknown_token_ends_the_server(on)
        double.restart()
        assert double.port == port and double.weights == digest(folders[0])
        assert (on.version(), on.checksum()) == ("start", first)
        assert on.generate().meta["cached_tokens"] == 0
        contract.a_cut_file_ends_the_server(on, tmp_path)
        double.restart()
        contract.whole(on.generate())


def test_a_kill_resets_connections_and_closes_the_port(folders):
    with Double(seconds_per_token=0.01) as double:
        on, seen = subject(double, folders), []

        def call():
            try:
                on.generate(tokens=1000, rid="lost")
            except OSError as error:
                seen.append(type(error))

        caller = threading.Thread(target=call)
        caller.start()
        contract.until(lambda: bool(double.received))
        double.kill()
        caller.join(20)
        assert seen == [ConnectionResetError]
        with pytest.raises(ConnectionRefusedError):
            on.ask("/ready")
        double.kill()  # it is dead already
    with pytest.raises(ConnectionRefusedError):
        on.ask("/ready")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_who_leaves_takes_his_request_along(folders, stream):
    with Double(seconds_per_token=0.1) as double:  # it would run for minutes
        on = subject(double, folders, timeout=0.5)
        with pytest.raises(TimeoutError):
            on.generate(tokens=3000, stream=stream, stream_interval=1000)
        on.timeout = 60
        on.flush()
        assert on.generate([5, 6, 7], 1).status == 200


def test_leaves_nothing_running(folders):
    before, files = threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with Double(seconds_per_token=0.01) as double:
        on = subject(double, folders)
        runs = [on.begin(f"left-{at}", 1000) for at in range(3)]
        assert threading.active_count() == before + 4
    for run in runs:
        run.join(20)
    assert threading.active_count() == before
    assert not files or len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_tokens_are_its_models(folders, temperature):
    with Double(weights=7, vocab_size=32) as double:
        answer = subject(double, folders).generate([3, 4], 60, temperature=temperature)
        scored(answer, [3, 4], lambda at: 7, 32, temperature)


def test_tokens_of_a_changed_version_are_those_of_its_weights(folders):
    old, new = map(digest, folders)
    assert old != new
    with Double(weights=old, seconds_per_token=0.003) as double:
        on = subject(double, folders, incremental=True)
        running = on.begin("changed")
        with on.paused("retract"):
            on.update(folders[1], "new")
        answer = running.answer()
        at = answer.meta["weight_versions"][1]["start"]
        assert 0 < at < 120
        scored(answer, [5, 6, 7], lambda step: old if step < at else new, 64, 1.0)


def scored(answer, prompt, weights, vocab_size, temperature):
    contract.whole(answer)
    ids = list(prompt)
    for step, (score, token, _) in enumerate(answer.meta["output_token_logprobs"]):
        expected = logprobs(weights(step), ids, vocab_size, temperature)
        assert score == np.float32(expected[token])
        assert temperature or token == expected.argmax()
        ids.append(token)


def test_samples_come_as_often_as_their_probabilities_say(folders):
    with Double(vocab_size=16, max_running=1000, seed=3) as double:
        on = subject(double, folders)
        plain = Counter(one["output_ids"][0] for one in on.generate([3, 4], 1, n=1000).body)
        few = Counter(one["output_ids"][0] for one in on.generate([3, 4], 1, n=200, top_k=3).body)
        mass = {one["output_ids"][0] for one in on.generate([3, 4], 1, n=200, top_p=0.5).body}
    scores = logprobs(0, [3, 4], 16, 1.0)
    expected = np.exp(scores)
    best = np.argsort(-scores)
    # The sum over 16 tokens of |frequency - p| is on average below sqrt(16 / 1000), 0.13.
    assert sum(abs(plain[token] / 1000 - expected[token]) for token in range(16)) < 0.2
    assert set(few) == set(best[:3])
    assert mass == set(best[: int(np.searchsorted(np.cumsum(expected[best]), 0.5)) + 1])


def test_options_make_other_servers(folders):
    with Double(original_logprobs=True, vocab_size=32) as double:
        answer = subject(double, folders).generate([3, 4], 1, temperature=0.5)
        ((score, token, _),) = answer.meta["output_token_logprobs"]
        assert score == np.float32(logprobs(0, [3, 4], 32, 1.0)[token])
    with Double(weight_versions=False, checker=False, version="0.4.9", deterministic=True) as double:
        on = subject(double, folders)
        assert "weight_versions" not in on.generate().meta
        assert on.ask("/weights_checker", {"action": "checksum"}).status == 404
        info = on.ask("/server_info").body
        assert (info["version"], info["enable_deterministic_inference"]) == ("0.4.9", True)
        first, again, other = (on.generate(tokens=20, sampling_seed=seed).body["output_ids"] for seed in (1, 1, 2))
        assert first == again != other
    with Double(eos_ids=[9], script=lambda prompt: [(prompt[-1], -0.5), (8, -0.25)]) as double:
        on = subject(double, folders)
        whole, cut = on.generate([1, 2], 5), on.generate([1, 2], 1)
        assert whole.meta["output_token_logprobs"] == [[-0.5, 2, None], [-0.25, 8, None]]
        assert whole.meta["finish_reason"] == {"type": "stop", "matched": 8}
        assert cut.body["output_ids"] == [2] and cut.meta["finish_reason"] == {"type": "length", "length": 1}
    with Double(eos_ids=range(64)) as double:
        answer = subject(double, folders).generate(ignore_eos=False)
        assert len(answer.body["output_ids"]) == 1 and answer.meta["finish_reason"]["type"] == "stop"


def test_routed_experts_come_when_asked_for(folders):
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4}, "return_routed_experts": True}
    with Double(weights=7, experts=(2, 3, 8)) as double:
        on = subject(double, folders)
        answer = on.ask("/generate", body)
        found = np.frombuffer(base64.b64decode(answer.meta["routed_experts"]), np.int32).reshape(6, 2, 3)
        np.testing.assert_array_equal(found, routed_experts(7, [5, 6, 7, *answer.body["output_ids"][:-1]], (2, 3, 8)))
        assert all(len(set(choice)) == 3 for choice in found.reshape(-1, 3)) and 0 <= found.min() <= found.max() < 8
        assert "routed_experts" not in on.generate().meta
    with Double() as double:
        assert "routed_experts" not in subject(double, folders).ask("/generate", body).meta


def test_an_update_may_fail_to_flush_unless_retracted(folders):
    with Double() as double:
        on = subject(double, folders)
        double.flush_failures = 2
        assert on.update(folders[0], "one").status == 400 and on.version() == "default"
        assert double.weights == digest(folders[0])
        on.load(folders[1], "two")
        assert on.update(folders[0], "three").status == 400
        assert on.update(folders[0], "three").status == 200 and on.version() == "three"


BROKEN = {"reset_before": ConnectionResetError, "reset_after": ConnectionResetError, "stuck": TimeoutError,
          "half_event": (ConnectionResetError, http.client.IncompleteRead), "truncated_json": ValueError}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "incremental"])
def test_every_fault_happens_once_and_is_counted(folders, stream, incremental):
    with Double(incremental=incremental, slow_seconds=0.01) as double:
        on = subject(double, folders)
        on.load(folders[0], "now")
        for kind in ALL:
            double.fault(kind)
            if kind in BROKEN:
                on.timeout = 0.3 if kind == "stuck" else 60
                with pytest.raises(BROKEN[kind]):
                    on.generate(rid="broken", stream=stream)
                on.timeout = 60
            else:
                wrong(kind, on.generate(rid="right", stream=stream), stream)
            assert double.injected == Counter(ALL[: ALL.index(kind) + 1])
            contract.whole(on.generate())
    assert [call.body["rid"] for call in double.received if (call.body or {}).get("rid")] == [
        "broken" if kind in BROKEN else "right" for kind in ALL
    ]


def wrong(kind, answer, stream):
    """Asserts what is wrong with an answer that came."""
    if kind.startswith("status_"):
        assert answer.status == int(kind[-3:]) and "message" in json.dumps(answer.body)
        return
    assert answer.status == 200
    if kind == "duplicate" and not stream:
        assert answer.body[0] == answer.body[1]
        return
    body = answer.body[-2] if stream else answer.body
    meta = body["meta_info"]
    triples, reason, last = meta.get("output_token_logprobs"), meta["finish_reason"], body["output_ids"][-1:]
    assert not stream or answer.body[-1] == "[DONE]"
    assert {
        "slow": lambda: reason["type"] == "length",
        "abort_503": lambda: reason["status_code"] == 503 and triples == [],
        "abort_before_prefill": lambda: reason["type"] == "abort" and last == [] and meta["completion_tokens"] == 0,
        "duplicate": lambda: answer.body[0] == answer.body[1],
        "old_span": lambda: [s["version"] for s in meta["weight_versions"]] == ["default", "now"],
        "nan_logprob": lambda: np.isnan(triples[-1][0]),
        "null_logprob": lambda: triples[-1][0] is None,
        "missing_logprobs": lambda: triples is None,
        "wrong_length": lambda: abs(len(triples) - len(body["output_ids"])) == 1,
        "beyond_vocabulary": lambda: last[0] >= 64 and triples[-1][1] == last[0],
        "id_mismatch": lambda: last[0] != triples[-1][1],
        "rid_mismatch": lambda: meta["id"] != "right",
        "old_version": lambda: meta["weight_version"] == meta["weight_versions"][0]["version"] == "default",
        "no_finish": lambda: reason is None and triples,
    }[kind]()


def test_faults_come_with_their_share_and_only_where_they_can(folders):
    with Double() as double:
        on = subject(double, folders)
        double.faults(0.3, kinds=["status_503", "nan_logprob"], seed=1)
        refused = sum(on.generate(return_logprob=False).status == 503 for _ in range(100))
        assert double.injected == {"status_503": refused}  # there was no log-prob to spoil
        assert 5 <= refused <= 25  # 15 on average, with a deviation of 3.6
        double.faults(0)
        contract.whole(on.generate())
        with pytest.raises(ValueError, match="refused"):
            double.fault("refused")


def test_shapes_differ_in_keys_types_and_items():
    recorded = {"a": 1, "b": [[0.5, 7, None]], "c": None, "text": "", "d": [{"v": "x", "n": 0}]}
    same = {"a": 2.5, "b": [[0.1, 3, None], [0.2, 4, None]], "c": None, "d": []}
    assert contract.differences(recorded, same) == []
    for change in ({"a": "1"}, {"a": True}, {"b": [[0.1, 3, "x"]]}, {"b": [[None, 3, None]]}, {"c": {}}, {"e": 1},
                   {"d": [{"v": "x"}]}, {"d": [{"v": 1, "n": 0}]}):  # fmt: skip
        assert contract.differences(recorded, same | change), change
    assert contract.differences(recorded, {key: value for key, value in same.items() if key != "a"}) == [".a"]
