"""A real SGLang server's log-probabilities are ours to 1e-4, whatever it did on the way to them.

Every model has a server of its own, on a CPU in float32, and the tests of a model share it: each leaves it with the
weights that it was started with.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.model import golden
from tests.serving import models
from tests.serving.models import TOLERANCE, distance, logprobs_of
from tests.serving.server import Server, installed

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(
        not installed(), reason="NO SGLANG SERVER IS TESTED: its environment is absent, make sglang-env"
    ),
]
HYBRID = ("m1_tiny", "m1_kernel", "odd")


class Served:
    """A server, the weights that it starts with, and other ones for the same network."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.old = models.weights(name, folder / "odd")
        self.new = models.perturbed(self.old, folder / "new")
        experts = ("--enable-return-routed-experts",) if name in HYBRID else ()
        self.server = Server(self.old.folder, folder / "server.log", "--weight-version", "old", *experts)
        self.options = {"return_routed_experts": True} if experts else {}

    def generate(self, prompt: list[int], length: int = 8, **options):
        return self.server.generate(prompt, max_new_tokens=length, **self.options, **options)


@pytest.fixture(scope="module", params=["m1_tiny", "m1_kernel", "odd", "qwen2_tiny"])
def served(request, tmp_path_factory):
    served = Served(request.param, tmp_path_factory.mktemp(request.param))
    served.server.start()
    yield served
    served.server.stop()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 97, length).tolist()


def interrupted(served, ids, mode, act):
    """A streamed answer of 1000 tokens that is paused after some twenty: (ids, log-probabilities, last meta_info)."""
    output, logprobs, meta, paused = [], [], {}, False
    for event in served.server.stream(ids, max_new_tokens=1000, **served.options):
        output += event["output_ids"]
        logprobs += [logprob for logprob, *_ in event["meta_info"]["output_token_logprobs"]]
        meta = event["meta_info"]
        if len(output) >= 20 and not paused:
            paused = True
            assert served.server.post("/pause_generation", {"mode": mode})[0] == 200
            assert act()[0] == 200
            assert served.server.post("/continue_generation", {})[0] == 200
    return output, logprobs, meta


def test_prompt_in_chunks(served):
    """600 tokens are three pieces of the prefill: the state goes on from one to the next."""
    answer = served.generate(prompt(600), 20)
    assert answer["meta_info"]["cached_tokens"] == 0
    assert distance(answer, prompt(600), served.old) < TOLERANCE


def test_answer_of_hundreds_of_tokens(served):
    answer = served.generate(prompt(5, 1), 400)
    assert answer["meta_info"]["completion_tokens"] == 400
    assert distance(answer, prompt(5, 1), served.old) < TOLERANCE


def test_prefix_comes_from_the_cache(served):
    """The whole earlier turn, its answer included, then the longer one again: with the state as it was there."""
    ids, cached = prompt(300, 2), []
    for turn in range(3):
        answer = served.generate(ids, 30)
        assert distance(answer, ids, served.old) < TOLERANCE
        cached.append(answer["meta_info"]["cached_tokens"])
        ids = ids + answer["output_ids"] + prompt(7, 30 + turn)
    assert cached[0] == 0 and cached[1] >= 300 and cached[2] > cached[1], cached


def test_several_answers_to_one_prefix(served):
    """Its state is shared, and none of its users changes it.

    A hybrid's state is kept where a prefill ended, and at least one token is computed anew: a prompt that was seen
    whole is found again by what goes on after it, and recomputed where it comes once more as it is.
    """
    ids = prompt(100, 3)
    served.generate(ids, 1)
    prompts = [ids + [token] for token in (3, 3, 4, 5)]
    answers = [served.generate(prompt, 20) for prompt in prompts]
    assert min(answer["meta_info"]["cached_tokens"] for answer in answers) >= 100
    assert max(map(distance, answers, prompts, [served.old] * 4)) < TOLERANCE
    again = served.generate(ids, 20)
    assert again["meta_info"]["cached_tokens"] == (0 if served.name in HYBRID else 99)
    assert distance(again, ids, served.old) < TOLERANCE


def test_concurrent_requests(served):
    """More requests than slots, of all lengths: some decode while others are prefilled, some wait."""
    prompts = [prompt(3 + 17 * i, 100 + i) for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda ids: served.generate(ids, 10 + len(ids) // 4), prompts))
    worst = max(distance(answer, ids, served.old) for answer, ids in zip(answers, prompts, strict=True))
    assert worst < TOLERANCE


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_of_the_temperature(served, temperature):
    answer = served.generate(prompt(9, 4), 40, temperature=temperature)
    assert distance(answer, prompt(9, 4), served.old, temperature) < TOLERANCE
    if temperature != 1:
        assert distance(answer, prompt(9, 4), served.old, 1.0) > 100 * TOLERANCE, "the test sees a wrong temperature"


def test_recorded_logprobs(served):
    """Two rows that Transformers scored: nothing of ours in between."""
    if served.name == "odd":
        pytest.skip("made here of sizes that no other implementation has recorded")
    numbers = golden.numbers(served.name)
    for ids, recorded in zip(numbers["input_ids"].tolist(), numbers["logprobs"], strict=True):
        answer = served.generate(ids, 1, logprob_start_len=0)
        scored = answer["meta_info"]["input_token_logprobs"]
        # SGLang 0.5.23 reports the last id of the vocabulary as 0; its log-probability is right.
        assert [token for _, token, _ in scored] == [
            0 if token == served.old.config.vocab_size - 1 else token for token in ids
        ]
        np.testing.assert_allclose([logprob for logprob, *_ in scored[1:]], recorded, atol=TOLERANCE, rtol=0)


def test_greedy_answer_is_the_recorded_one(served):
    if served.name == "odd":
        pytest.skip("made here of sizes that no other implementation has recorded")
    numbers = golden.numbers(served.name)
    answer = served.generate(numbers["greedy_prompt"].tolist(), 32, temperature=0.0)
    assert answer["output_ids"] == numbers["greedy_ids"].tolist()
    np.testing.assert_allclose(logprobs_of(answer), numbers["greedy_logprobs"], atol=TOLERANCE, rtol=0)


def test_experts_are_our_router_s(served):
    """In the order of the choice, for every token but the last, those of the prompt included."""
    if served.name not in HYBRID:
        pytest.skip("a dense model has no router")
    ids = prompt(300, 5)
    answer = served.generate(ids, 60)
    theirs = models.experts_of(answer, served.old.config)
    _, ours = served.old.logprobs(ids + answer["output_ids"])
    assert theirs.shape == ours[:-1].shape
    # A token in a thousand may lie on the border between two experts.
    assert (theirs != ours[:-1]).mean() < 1e-3


def test_update_between_requests(served):
    """Every tensor is taken over, and back: the server's own checksums say so too."""
    ids = prompt(40, 6)
    served.generate(ids)  # its prefix is in the cache, made by weights that are about to go
    before = served.server.post("/weights_checker", {"action": "checksum"})[1]["ranks"][0]["checksums"]
    status, told = served.server.update(served.new.folder, "new")
    assert status == 200 and told["success"], told
    answer = served.generate(ids, 20)
    assert answer["meta_info"]["cached_tokens"] == 0
    assert answer["meta_info"]["weight_versions"] == [{"version": "new", "start": 0, "end": 20}]
    assert distance(answer, ids, served.new) < TOLERANCE < distance(answer, ids, served.old)
    changed = served.server.post("/weights_checker", {"action": "checksum"})[1]["ranks"][0]["checksums"]
    assert {name for name in before if before[name] == changed[name]} <= {n for n in before if "rotary_emb" in n}

    assert served.server.update(served.old.folder, "old")[0] == 200
    after = served.server.post("/weights_checker", {"action": "checksum"})[1]["ranks"][0]["checksums"]
    assert after == before
    assert distance(served.generate(ids, 20), ids, served.old) < TOLERANCE


def test_update_in_the_middle_of_an_answer(served):
    """Tokens before the pause are of the old weights, tokens after it of the new ones, and the server says which.

    The experts are not: a retracted answer is computed anew, and those of its old tokens are the new weights' too.
    """
    ids = prompt(30, 7)
    output, logprobs, meta = interrupted(served, ids, "retract", lambda: served.server.update(served.new.folder, "new"))
    spans = meta["weight_versions"]
    assert [span["version"] for span in spans] == ["old", "new"], spans
    assert 20 <= spans[0]["end"] == spans[1]["start"] < spans[1]["end"] == len(output) == 1000
    experts = models.experts_of({"meta_info": meta}, served.new.config) if served.name in HYBRID else None
    for span, of, recorded in zip(spans, (served.old, served.new), (None, experts), strict=True):
        ours, _ = of.logprobs(ids + output, experts=recorded)
        stretch = slice(span["start"], span["end"])
        assert np.abs(ours[len(ids) :][stretch] - logprobs[stretch]).max() < TOLERANCE, span
    if experts is not None:
        _, ours = served.new.logprobs(ids + output)
        assert (experts != ours[:-1]).mean() < 1e-3
    assert served.server.update(served.old.folder, "old")[0] == 200


def test_pause_that_aborts_gives_what_there_was(served):
    ids = prompt(30, 8)
    output, logprobs, meta = interrupted(served, ids, "abort", lambda: (200, None))
    assert meta["finish_reason"]["type"] == "abort" and 20 <= len(output) < 1000
    ours, _ = served.old.logprobs(ids + output)
    assert np.abs(ours[len(ids) :] - logprobs).max() < TOLERANCE


def test_stop_by_token_id(served):
    """Without a tokenizer too; the id that ended the answer is its last one."""
    answer = served.generate(prompt(6, 9), 200, ignore_eos=False, stop_token_ids=list(range(50)))
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": answer["output_ids"][-1]}
    assert answer["output_ids"][-1] < 50 <= min(answer["output_ids"][:-1], default=50)


FAULTS = {
    "missing": (lambda t, norm: t.pop(norm), "missing tensors: {}"),
    "unknown": (lambda t, norm: t.update(extra=t[norm]), "unknown tensors: extra"),
    "misshaped": (lambda t, norm: t.update({norm: t[norm][1:].copy()}), "misshaped tensors: {}"),
    "renamed": (lambda t, norm: t.update(renamed=t.pop(norm)), "missing tensors: {}; unknown tensors: renamed"),
}


@pytest.mark.parametrize("fault", [*FAULTS, "truncated", "other network", "no folder"])
def test_bad_folder_is_refused_and_the_old_weights_serve(served, fault, tmp_path):
    """For models of SGLang's own too, which would take the first two for good and die of the third."""
    if served.name not in ("m1_tiny", "qwen2_tiny"):
        pytest.skip("one model of ours and one of SGLang's: what is checked does not hang on the sizes")
    folder, named, norm = tmp_path / "bad", "", "model.layers.1.input_layernorm.weight"
    if fault in FAULTS:
        edit, named = FAULTS[fault]
        models.edited(served.new, folder, lambda tensors: edit(tensors, norm))
    elif fault != "no folder":
        models.edited(served.new, folder, lambda tensors: None)
    if fault == "truncated":
        file, named = folder / "model.safetensors", "model.safetensors has"
        file.write_bytes(file.read_bytes()[:-100])
    if fault == "other network":
        if served.name == "qwen2_tiny":
            pytest.skip("of models that are not ours we know the tensors only, not what config.json means for them")
        config, named = folder / "config.json", "rope_theta is 10000.0"
        config.write_text(config.read_text().replace('"rope_theta": 10000000.0', '"rope_theta": 10000.0'))
    status, told = served.server.update(folder, "bad")
    assert status == 400 and not told["success"] and named.format(norm) in told["message"], told
    assert served.server.get("/model_info")["weight_version"] == "old"
    ids = prompt(50, 10)
    assert distance(served.generate(ids, 20), ids, served.old) < TOLERANCE
