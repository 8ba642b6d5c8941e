"""What a real SGLang server and its double must both do: claims about a `Subject`, and the recordings they leave.

A claim is a function that asks the server for something, asserts how it behaves and returns the answers by name.
`holds` runs one and compares the shape of every answer (keys and JSON types) with the recording of that name in
tests/recorded/; tests/recorded/record.py writes these recordings from a real server by running the same claims.

A claim leaves the server as it found it: running, with the weights of folder `a`.
"""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.sglang_subject import Answer, Running, Subject, request, until, whole

__all__ = [
    "Answer",
    "EVERY",
    "NARROW",
    "ROOMY",
    "Running",
    "Subject",
    "differences",
    "holds",
    "request",
    "until",
    "whole",
]

RECORDED = Path(__file__).parent / "recorded" / "sglang_0_5_23"
# Keys that an answer may lack or have: the embedding plan and text belong to models and tokenizers, the time stamp to
# the first events of a stream.
OPTIONAL = {"embedding", "text", "response_sent_to_client_ts"}
VARIES = {"cached_tokens_details": "null where nothing came from the cache"}
MAPS = {"checksums": "by the server's own names of its parameters"}
# What of /server_info is compared: the rest are some four hundred flags.
SERVER_INFO = (
    "model_path", "tokenizer_path", "skip_tokenizer_init", "load_format", "max_running_requests", "stream_interval",
    "incremental_streaming_output", "enable_deterministic_inference", "tp_size", "dp_size", "weight_version",
    "enable_return_routed_experts", "disable_radix_cache", "version",
)  # fmt: skip


# Claims. First those that any server keeps.

Answers = dict[str, Answer]


def an_answer_is_whole(on: Subject) -> Answers:
    one = on.generate(rid="one")
    whole(one, 4)
    assert one.meta["id"] == "one"
    assert one.meta["finish_reason"] == {"type": "length", "length": 4}
    assert one.meta["prompt_tokens"] == 3
    bare = on.generate(return_logprob=False)
    assert len(bare.body["output_ids"]) == 4 and "output_token_logprobs" not in bare.meta
    none = on.generate(tokens=0)
    whole(none, 0)
    unknown = on.ask("/generate", request((5, 6, 7), 2) | {"no_such_field": True})
    whole(unknown, 2)
    return {"generate": one, "generate_without_logprobs": bare, "generate_no_tokens": none}


def a_batch_is_a_list_in_order(on: Subject) -> Answers:
    batch = on.generate([(5, 6, 7), (5, 6)], 2, rid=["u", "v"])
    assert [answer["meta_info"]["id"] for answer in batch.body] == ["u", "v"]
    assert [answer["meta_info"]["prompt_tokens"] for answer in batch.body] == [3, 2]
    prefixed = on.generate([(5, 6, 7), (5, 6)], 2, rid="w").body
    assert [answer["meta_info"]["id"] for answer in prefixed] == ["w_0", "w_1"]
    samples = on.generate(tokens=2, n=2, rid="x")
    assert len({answer["meta_info"]["id"] for answer in samples.body} - {"x", "x_0", "x_1"}) == 2  # not ours
    for answer in batch.body + prefixed + samples.body:
        whole(Answer(200, "", answer), 2)
    return {"generate_batch": batch, "generate_samples": samples}


def logprobs_are_those_at_the_temperature(on: Subject) -> Answers:
    """Greedy ones are those at temperature 1, and so are the prompt's: scored again they are the same."""
    prompt = [5, 6, 7]
    greedy, again, cooler = (on.generate(prompt, 6, temperature=heat) for heat in (0, 0, 0.25))
    assert greedy.body["output_ids"] == again.body["output_ids"]
    for same in (on.generate(prompt, 6, temperature=1e-7), on.generate(prompt, 6, top_k=1)):
        assert same.meta["output_token_logprobs"] == greedy.meta["output_token_logprobs"]
    for answer, same in ((greedy, True), (cooler, False)):
        scored = on.generate(prompt + answer.body["output_ids"], 0, logprob_start_len=0)
        triples = scored.meta["input_token_logprobs"]
        assert triples[0][0] is None and [token for _, token, _ in triples] == prompt + answer.body["output_ids"]
        pairs = zip(triples[3:], answer.meta["output_token_logprobs"], strict=True)
        gaps = [abs(ours[0] - theirs[0]) for ours, theirs in pairs]
        assert (max(gaps) < 1e-3) is same, gaps
    return {"generate_greedy": greedy, "generate_prompt_logprobs": scored}


def stop_tokens_stay_in_the_answer(on: Subject) -> Answers:
    ids = on.generate(tokens=4, temperature=0).body["output_ids"]
    at = ids.index(ids[1])
    stopped = on.generate(tokens=4, temperature=0, stop_token_ids=[ids[1]], ignore_eos=False)
    whole(stopped, at + 1)
    assert stopped.meta["finish_reason"] == {"type": "stop", "matched": ids[1]}
    ignored = on.generate(tokens=4, temperature=0, stop_token_ids=[ids[1]])
    assert ignored.body["output_ids"] == ids  # ignore_eos ignores these as well
    return {"generate_stopped": stopped}


def streams_end_with_a_reason_and_done(on: Subject) -> Answers:
    stream = on.generate(tokens=6, rid="s", stream=True)
    *events, done = stream.body
    assert stream.status == 200 and done == "[DONE]"
    assert [event["meta_info"]["finish_reason"] for event in events] == [None] * (len(events) - 1) + [
        {"type": "length", "length": 6}
    ]
    pieces = [event["output_ids"] for event in events]
    for event in events:
        assert event["output_ids"] == [token for _, token, _ in event["meta_info"]["output_token_logprobs"]]
        assert event["meta_info"]["id"] == "s"
    if on.incremental:
        counts = [event["meta_info"]["completion_tokens"] for event in events]
        assert counts == list(itertools.accumulate(map(len, pieces))) and counts[-1] == 6
    else:
        assert all(longer[: len(piece)] == piece for piece, longer in zip(pieces, pieces[1:], strict=False))
        assert len(pieces[-1]) == 6
    batch = on.generate([(5, 6, 7), (5, 6)], 2, rid=["u", "v"], stream=True)
    assert {(event["index"], event["meta_info"]["id"]) for event in batch.body[:-1]} == {(0, "u"), (1, "v")}
    sparse = on.generate(tokens=12, stream=True, stream_interval=4)
    assert [event["meta_info"]["completion_tokens"] for event in sparse.body[:-1]] == [1, 5, 9, 12]
    name = "incremental" if on.incremental else "cumulative"
    return {f"stream_{name}": stream, f"stream_{name}_batch": batch}


def what_cannot_be_done_is_refused(on: Subject) -> Answers:
    """Errors have three shapes: of the schema (a string), of the request (an object), of the endpoint (flat)."""
    asked = {
        "unknown_sampling_key": request((5, 6, 7), 2, temprature=1.0),
        "wrong_type": request((5, 6, 7), 2, temperature="hot"),
        "negative_temperature": request((5, 6, 7), 2, temperature=-1),
        "top_p_above_one": request((5, 6, 7), 2, top_p=2),
        "top_k_zero": request((5, 6, 7), 2, top_k=0),
        "negative_tokens": request((5, 6, 7), -2),
        "too_many_tokens": request((5, 6, 7), on.context_length),
        "prompt_too_long": request([1] * (on.context_length + 1), 2),
        "stop_string": request((5, 6, 7), 2, stop=["a"]),
        "bias_beyond_vocabulary": request((5, 6, 7), 2, logit_bias={str(on.vocab_size): 0.0}),
        "no_prompt": {"sampling_params": {"max_new_tokens": 2}},
        "empty_prompt": {"input_ids": [], "sampling_params": {"max_new_tokens": 2}},
        "prompt_no_list": {"input_ids": "abc", "sampling_params": {"max_new_tokens": 2}},
        "ids_twice": request([(5, 6, 7), (5, 6)], 2, rid=["u", "u"]),
        "ids_too_few": request([(5, 6, 7), (5, 6)], 2, rid=["u"]),
        "no_json": b"{",
    }
    answers = {f"refused_{name}": on.ask("/generate", body) for name, body in asked.items()}
    answers |= {
        "refused_pause_mode": on.ask("/pause_generation", {"mode": "later"}),
        "refused_update_without_path": on.ask("/update_weights_from_disk", {}),
        "refused_checker_action": on.ask("/weights_checker", {"action": "guess"}),
    }
    assert {name: answer.status for name, answer in answers.items()} == dict.fromkeys(answers, 400)
    assert isinstance(answers["refused_unknown_sampling_key"].body["error"], str)
    whole(on.generate(tokens=2, logit_bias={str(on.vocab_size - 1): 0.0}), 2)
    streamed = on.generate(tokens=2, temperature=-1, stream=True)
    assert streamed.status == 200 and streamed.body[0]["error"]["code"] == 400
    missing = on.ask("/no_such_path", {}, key=on.key)
    assert missing.status == 404
    return answers | {"refused_in_a_stream": streamed, "no_such_path": missing}


def endpoints_answer(on: Subject) -> Answers:
    answers = {
        "model_info": on.ask("/model_info"), "server_info": on.ask("/server_info"), "ready": on.ask("/ready"),
        "health": on.ask("/health"), "flush_cache": on.ask("/flush_cache?timeout=5", {}),
        "weights_checker": on.ask("/weights_checker", {"action": "checksum"}),
        "abort_nobody": on.ask("/abort_request", {"rid": "nobody"}),
        "begin_weight_update": on.ask("/begin_weight_update", {}),
        "end_weight_update": on.ask("/end_weight_update", {}),
        "continue_unpaused": on.ask("/continue_generation", {}),
    }  # fmt: skip
    assert {name: answer.status for name, answer in answers.items()} == dict.fromkeys(answers, 200)
    info = answers["server_info"]
    assert info.body["incremental_streaming_output"] is on.incremental
    info.body = {name: info.body[name] for name in SERVER_INFO}
    assert on.ask("/get_model_info", key=on.key).body == answers["model_info"].body
    assert on.ask("/get_server_info", key=on.key).status == on.ask("/health_generate").status == 200
    return answers


def the_prefix_cache_is_split_and_flushed(on: Subject) -> Answers:
    def cached(prompt: list[int], **more: Any) -> int:
        return on.generate(prompt, 2, **more).meta["cached_tokens"]

    prompt = list(range(20, 40))
    on.flush()
    assert [cached(prompt), cached(prompt)] == [0, 19]  # the last token is always computed
    assert [cached(prompt, extra_key="v1"), cached(prompt, extra_key="v1"), cached(prompt, extra_key="v2")] == [
        0,
        19,
        0,
    ]
    assert cached([*prompt[:16], 1, 2]) == 16
    assert cached(prompt, logprob_start_len=0) == 0
    on.flush()
    assert cached(prompt) == 0
    return {}


def an_update_changes_weights_and_version(on: Subject) -> Answers:
    before, first = on.generate(temperature=0), on.checksum()
    done = on.load(on.b, "step-1")
    assert on.version() == "step-1"
    assert on.checksum() != first
    after = on.generate(temperature=0)
    assert after.meta["weight_versions"] == [{"version": "step-1", "start": 0, "end": 4}]
    assert after.meta["output_token_logprobs"] != before.meta["output_token_logprobs"]
    unnamed = on.load(on.a)
    assert on.version() == "step-1"  # the label stays where none is given
    assert on.checksum() == first
    assert on.generate(temperature=0).body["output_ids"] == before.body["output_ids"]
    on.load(on.a, "step-2")
    assert on.version() == "step-2"
    assert on.checksum() == first
    return {"update": done, "update_unnamed": unnamed}


def a_failed_update_changes_nothing(on: Subject) -> Answers:
    version, checksum, before = on.version(), on.checksum(), on.generate(temperature=0)
    missing = on.update(on.a / "missing", "never")
    assert missing.status == 400 and missing.body["success"] is False
    assert (on.version(), on.checksum()) == (version, checksum)
    assert on.generate(temperature=0).meta["weight_versions"] == before.meta["weight_versions"]
    return {"update_missing_folder": missing}


def an_update_in_an_answer_splits_its_versions(on: Subject) -> Answers:
    answers, old = {}, on.version()
    for mode, flush in (("retract", True), ("in_place", False)):
        running = on.begin(f"split-{mode}")
        with on.paused(mode) as pause:
            update = on.update(on.b, f"new-{mode}", flush_cache=flush)
            assert (pause.status, update.status) == (200, 200)
        answer = running.answer()
        whole(answer, 120)
        assert [span["version"] for span in answer.meta["weight_versions"]] == [old, f"new-{mode}"]
        assert answer.meta["num_retractions"] == (mode == "retract")
        answers |= {f"generate_over_{mode}": answer, f"pause_{mode}": pause}
        on.load(on.a, old)
    return answers


def an_in_place_pause_forbids_the_flush(on: Subject) -> Answers:
    """The answer says failure, yet the weights are the new ones; answers name the new version, /model_info the old."""
    old, checksum = on.version(), on.checksum()
    running = on.begin("in-place")
    with on.paused("in_place"):
        update = on.update(on.b, "half")
        assert update.status == 400 and update.body["success"] is False
        assert on.version() == old and on.checksum() != checksum
    answer = running.answer()
    whole(answer, 120)
    assert [span["version"] for span in answer.meta["weight_versions"]] == [old, "half"]
    on.load(on.a, old)
    return {"update_not_flushed": update}


def an_update_without_a_pause_waits_for_answers(on: Subject) -> Answers:
    """And may then fail to flush, because the last request has hardly left; the weights are new all the same."""
    old, checksum = on.version(), on.checksum()
    running = on.begin("waited-for", 60)
    update = on.update(on.b, "after")
    answer = running.answer()
    whole(answer, 60)
    assert [span["version"] for span in answer.meta["weight_versions"]] == [old]
    assert update.status in (200, 400) and update.body["success"] is (update.status == 200)
    assert on.checksum() != checksum
    on.load(on.a, old)
    return {}


def a_pause_that_aborts_returns_what_there_is(on: Subject) -> Answers:
    running = on.begin("partial", 1000)
    with on.paused("abort") as pause:
        answer = running.answer()
        whole(answer)
        assert pause.status == 200 and 0 < answer.meta["completion_tokens"] < 1000
        assert answer.meta["finish_reason"]["type"] == "abort"
        assert on.ask("/ready").status == 503
        late = Running(on, request((5, 6, 7), 4, rid="late"))
        time.sleep(0.1)
        assert late.alive and not late.first.is_set()
    whole(late.answer(), 4)
    assert on.ask("/ready").status == 200
    return {"generate_aborted": answer, "pause_abort": pause}


def an_abort_returns_what_there_is(on: Subject) -> Answers:
    """Also to a call that does not stream; one that the client left is given up; an id runs but once."""
    result: dict[str, Answer] = {}
    body = request((5, 6, 7), 1000, rid="whole")
    caller = threading.Thread(target=lambda: result.update(it=on.ask("/generate", body)))
    caller.start()
    until(lambda: on.ask("/flush_cache", {}).status == 400)
    busy, twice = on.ask("/flush_cache", {}), on.generate(rid="whole")
    assert twice.status == 400
    for other in ({"rid": "who"}, {"rid": ""}, {}):  # a prefix that is nobody's own id ends nobody
        on.ask("/abort_request", other)
    time.sleep(0.1)
    assert caller.is_alive()
    on.ask("/abort_request", {"rid": "whole"})
    caller.join(on.timeout)
    whole(result["it"])
    assert result["it"].meta["finish_reason"]["type"] == "abort"
    on.flush()
    with suppress(ConnectionError), on.connection("/generate", body | {"stream": True}, None) as response:
        response.readline()
        assert on.ask("/flush_cache", {}).status == 400
    on.flush()
    return {"flush_cache_busy": busy, "refused_id_in_use": twice, "generate_aborted_unstreamed": result["it"]}


# Where several requests run at once.


def an_abort_takes_all_ids_that_begin_so(on: Subject) -> Answers:
    runs = {rid: on.begin(rid, 1000) for rid in ("g1", "g10", "h1")}
    on.ask("/abort_request", {"rid": "g1"})
    for rid in ("g1", "g10"):
        assert runs[rid].answer().meta["finish_reason"]["type"] == "abort"
    assert runs["h1"].alive
    on.ask("/abort_request", {"abort_all": True})
    assert runs["h1"].answer().meta["finish_reason"]["type"] == "abort"
    return {}


def aborts_in_a_pause(on: Subject) -> Answers:
    """Retracted: at once, with fewer fields. In place: with the next token. Not yet let in: never."""
    running = on.begin("retracted", 1000)
    with on.paused("retract"):
        on.ask("/abort_request", {"rid": "retracted"})
        retracted = running.answer()
        late = Running(on, request((5, 6, 7), 4, rid="outside"))
        time.sleep(0.1)
        on.ask("/abort_request", {"rid": "outside"})
    whole(retracted)
    assert retracted.meta["finish_reason"]["type"] == "abort" and retracted.meta["completion_tokens"] > 0
    whole(late.answer(), 4)
    running = on.begin("held", 1000)
    with on.paused("in_place"):
        on.ask("/abort_request", {"rid": "held"})
        time.sleep(0.1)
        assert running.alive
    assert running.answer().meta["finish_reason"]["type"] == "abort"
    return {"generate_aborted_retracted": retracted}


# Where keys are asked for, one request runs at once and two may wait.


def keys_open_their_own_endpoints(on: Subject) -> Answers:
    closed = on.ask("/generate", request((5, 6, 7), 2), key="")
    for path, body, open_to in (
        ("/generate", request((5, 6, 7), 2), on.key), ("/model_info", None, on.key), ("/server_info", None, on.key),
        ("/flush_cache", {}, on.admin_key), ("/abort_request", {"rid": "x"}, on.admin_key),
        ("/weights_checker", {"action": "checksum"}, on.admin_key), ("/continue_generation", {}, on.admin_key),
    ):  # fmt: skip
        for key in ("", on.key, on.admin_key):
            assert on.ask(path, body, key=key).status == (200 if key == open_to else 401), (path, key)
    assert on.ask("/health", key="").status == on.ask("/ready", key="").status == 200
    return {"unauthorized": closed}


def a_full_queue_refuses(on: Subject) -> Answers:
    first = on.begin("first", 1000)
    waiting = [Running(on, request((5, 6, 7), 4, rid=rid)) for rid in ("second", "third")]
    time.sleep(0.4)  # nothing tells that they wait
    refused, streamed = on.generate(rid="fourth"), on.generate(rid="fifth", stream=True)
    assert refused.status == 503
    assert streamed.status == 200 and streamed.body[0]["meta_info"]["finish_reason"]["status_code"] == 503
    on.ask("/abort_request", {"rid": "second"})
    given_up = waiting[0].answer()
    assert given_up.body["output_ids"] == [] and given_up.meta["finish_reason"]["type"] == "abort"
    on.ask("/abort_request", {"rid": "first"})
    whole(first.answer())
    whole(waiting[1].answer(), 4)
    return {"queue_full": refused, "queue_full_in_a_stream": streamed, "generate_aborted_waiting": given_up}


EVERY = (
    an_answer_is_whole, a_batch_is_a_list_in_order, logprobs_are_those_at_the_temperature,
    stop_tokens_stay_in_the_answer, streams_end_with_a_reason_and_done, what_cannot_be_done_is_refused,
    endpoints_answer, an_update_changes_weights_and_version, a_failed_update_changes_nothing,
    an_update_in_an_answer_splits_its_versions, an_in_place_pause_forbids_the_flush,
    an_update_without_a_pause_waits_for_answers, a_pause_that_aborts_returns_what_there_is,
    an_abort_returns_what_there_is, the_prefix_cache_is_split_and_flushed,
)  # fmt: skip
ROOMY = (*EVERY, an_abort_takes_all_ids_that_begin_so, aborts_in_a_pause)
NARROW = (*EVERY, keys_open_their_own_endpoints, a_full_queue_refuses)


def an_unknown_token_ends_the_server(on: Subject) -> None:
    """The last thing that a server is asked."""
    with suppress(OSError, http.client.HTTPException):
        on.generate([5, on.vocab_size], 2)
    until(lambda: not _alive(on))


def a_cut_file_ends_the_server(on: Subject, folder: Path) -> None:
    """So is a weights file that is not all there; `folder` is made for it."""
    for path in on.a.iterdir():
        if path.is_file():
            data = path.read_bytes()
            (folder / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    with suppress(OSError, http.client.HTTPException):
        on.update(folder, "cut")
    until(lambda: not _alive(on))


def _alive(on: Subject) -> bool:
    try:
        return on.ask("/ready").status == 200
    except (OSError, http.client.HTTPException):
        return False


# Shapes.


def holds(claim: Callable[[Subject], Answers], on: Subject) -> None:
    """Asserts `claim` of a server, and that its answers have the shapes of the recorded ones."""
    for name, answer in claim(on).items():
        recorded = json.loads((RECORDED / f"{name}.json").read_text())
        found = [f"status {answer.status}, recorded {recorded['status']}"] * (answer.status != recorded["status"])
        found += [f"type {answer.type}, recorded {recorded['type']}"] * (answer.type != recorded["type"])
        assert not (found := found + differences(recorded["body"], answer.body)), f"{name}: {found}"


def differences(recorded: Any, found: Any, at: str = "") -> list[str]:
    """Where the shape of `found` is not that of `recorded`; items of a list are each like one that was recorded."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        keys = [f"{at}.{key}" for key in (recorded.keys() ^ found.keys()) - OPTIONAL]
        shared = (recorded.keys() & found.keys()) - VARIES.keys() - MAPS.keys() - OPTIONAL
        return keys + [line for key in sorted(shared) for line in differences(recorded[key], found[key], f"{at}.{key}")]
    if isinstance(recorded, list) and isinstance(found, list):
        if len(found) == len(recorded) and not any(isinstance(item, dict | list) for item in found):
            return [line for pair in zip(recorded, found, strict=True) for line in differences(*pair, f"{at}[]")]
        options = [[differences(item, one, f"{at}[]") for item in recorded] for one in found]
        return [line for option in options if [] not in option for line in (option[0] if option else [f"{at}[]"])]
    return [] if _type(recorded) == _type(found) else [f"{at}: {_type(found)}, recorded {_type(recorded)}"]


def _type(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__
