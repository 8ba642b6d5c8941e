"""What is said to an SGLang server and what is believed of its answers. Pure functions: no sockets, no clocks.

A request names token ids and never text. Of an answer the ids and log-probabilities of `output_token_logprobs` are
taken, after everything that can be checked has been: see `read_piece`. What is wrong with an answer is a `Fault`; its
kind is what the metrics count and what the engine decides by.

A request is identified by 32 hexadecimal digits. The server's abort matches ids by prefix, so all have one length.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m1jax.types import Sampling

CHECK = frozenset({"unreachable", "timeout", "cut", "error", "version"})
"""Faults after which a server is looked at before it is asked anything more."""

PROCESSOR = json.dumps({"callable": b"cm1jax.serving.repetition\nRepetitionStop\n.".hex()})
"""The name of the logit processor that stops repetition, pickled as SGLang wants it; no code goes over the wire."""

BUSY = frozenset({"busy"})
"""Faults after which a server is left alone for a while."""


class Fault(Exception):
    """An answer that cannot be used, or none.

    Attributes:
        kind: "unreachable" (refused or reset), "timeout", "cut" (an answer that stops short), "error" (status 500 and
            its like), "busy" (429, 503), "refused" (400), and of answers that are there and wrong "logprobs",
            "lengths", "vocabulary", "ids", "identity", "duplicate" or "version".
        detail: one line for a person.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Piece:
    """What an event of a stream adds, or a whole answer.

    Attributes:
        token_ids, logprobs: of the new tokens.
        version: label of the weights when it was sent.
        spans: (label, start, end) over all tokens of the request; known at its end only, and to newer servers.
        finish: None while it goes on, then "stop", "length" or "abort".
        matched: the token id that ended it, where one did.
        prompt_tokens, cached_tokens, retractions: as counted by the server.
        routed: the experts that served, still encoded; None where there are none.
    """

    token_ids: list[int]
    logprobs: list[float]
    version: str
    spans: tuple[tuple[str, int, int], ...]
    finish: str | None
    matched: int | None
    prompt_tokens: int
    cached_tokens: int
    retractions: int
    routed: str | None


def with_processor(body: dict[str, Any], sampling: Sampling, run: int) -> dict[str, Any]:
    """The request with the repetition stop left to the server.

    Args:
        run: tokens above the threshold that the answer so far ends with.
    """
    parameters = body["sampling_params"]
    custom = {
        "repetition_run": sampling.repetition_run,
        "repetition_probability": sampling.repetition_probability,
        "temperature": sampling.temperature,
        "stop_id": parameters["stop_token_ids"][0],
        "run": run,
    }
    return body | {
        "custom_logit_processor": PROCESSOR,
        "sampling_params": parameters | {"custom_params": custom},
    }


def new_id() -> str:
    """A request id that is a prefix of no other."""
    return uuid.uuid4().hex


def request(
    rid: str,
    token_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    *,
    stream: bool = False,
    stream_interval: int = 0,
    extra_key: str = "",
    seed: int | None = None,
    experts: bool = False,
) -> dict[str, Any]:
    """The body of a POST to /generate.

    Every parameter that shapes the distribution is named, for a server may have defaults of its own.

    Args:
        token_ids: prompt and what was generated before.
        stop_ids: ids that end the answer, the one that did included in it.
        stream, stream_interval: events of about so many tokens; 0 leaves the number to the server.
        extra_key: prefixes are shared between requests of one key only.
        seed: of the noise; for servers in deterministic mode.
        experts: ask for the experts that serve.
    """
    parameters: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "ignore_eos": False,  # true would make the server deaf to stop_token_ids as well
        "stop_token_ids": list(stop_ids),
    }
    if stream and stream_interval:
        parameters["stream_interval"] = stream_interval
    if seed is not None:
        parameters["sampling_seed"] = seed
    body = {
        "rid": rid,
        "input_ids": list(token_ids),
        "sampling_params": parameters,
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": stream,
    }
    if extra_key:
        body["extra_key"] = extra_key
    if experts:
        body["return_routed_experts"] = True
    return body


def read_json(raw: bytes) -> Any:
    """The JSON value of a whole body or event.

    Raises:
        Fault: it is cut off or none at all.
    """
    try:
        return json.loads(raw)
    except ValueError as error:
        raise Fault("cut", f"no whole JSON in {len(raw)} bytes ({error})") from error


class Events:
    """Server-sent events out of bytes as they come, in whatever portions."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The payloads of the events that are whole now; the last one of a stream is b"[DONE]"."""
        looked = max(len(self._rest) - 1, 0)  # an event may have megabytes: no byte is looked at twice
        self._rest += chunk
        if self._rest.find(b"\n\n", looked) < 0:
            return
        *whole, self._rest = self._rest.split(b"\n\n")
        for event in whole:
            payload = event.strip()
            if payload.startswith(b"data:"):
                yield bytes(payload[5:].strip())


def read_status(status: int, raw: bytes) -> None:
    """Nothing where the status is 200.

    Raises:
        Fault: what the status means.
    """
    if status == 200:
        return
    kind = "busy" if status in (429, 503) else "refused" if 400 <= status < 500 else "error"
    raise Fault(kind, f"status {status}: {_message(raw)}")


def read_piece(body: Any, rid: str, so_far: int, max_new_tokens: int, vocab_size: int) -> Piece:
    """The new tokens of an event or of an answer.

    Args:
        body: decoded JSON.
        rid: id of the request.
        so_far: tokens of this request that came in earlier events.
        max_new_tokens: what was asked for.
        vocab_size: of the model that trains.

    Raises:
        Fault: it is an error, belongs to another request, or its tokens, lengths or log-probabilities are not sound.
    """
    try:
        return _read_piece(body, rid, so_far, max_new_tokens, vocab_size)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise Fault("cut", f"an answer of a form that is none ({type(error).__name__}: {error})"[:200]) from error


def _read_piece(body: Any, rid: str, so_far: int, max_new_tokens: int, vocab_size: int) -> Piece:
    if isinstance(body, list):
        raise Fault("duplicate", f"{len(body)} answers to one request")
    if not isinstance(body, dict):
        raise Fault("cut", f"{type(body).__name__} in place of an answer")
    if "error" in body:
        _raise_error(body["error"])
    meta, ids = body.get("meta_info"), body.get("output_ids")
    if not isinstance(meta, dict) or "finish_reason" not in meta:
        raise Fault("cut", "an answer without meta_info.finish_reason")
    if meta.get("id", rid) != rid:
        raise Fault("identity", f"an answer to request {str(meta['id']):.40} came to {rid}")
    finish = meta["finish_reason"] or {}
    kind = finish.get("type")
    if kind == "abort" and finish.get("status_code"):
        _raise_error({"message": finish.get("message"), "code": finish["status_code"]})
    if kind not in (None, "stop", "length", "abort"):
        raise Fault("error", f"unknown finish_reason {str(finish):.80}")

    triples = meta.get("output_token_logprobs")
    if triples is None and not ids:
        triples = []  # nothing was generated, as in an abort before prefill
    if not isinstance(triples, list) or not isinstance(ids, list):
        raise Fault("logprobs", "no output_token_logprobs, or no output_ids")
    total = meta.get("completion_tokens", so_far + len(ids))
    if kind == "abort" and len(ids) < len(triples) == total:
        # Ended in the waiting queue, where it went back to when weights changed: the last event of a stream has all
        # triples then, and of the ids the last one again.
        triples = triples[so_far:]
        ids = [triple[1] for triple in triples]
    if ids and total == so_far:
        raise Fault("duplicate", f"{len(ids)} tokens that came before, by completion_tokens {total}")
    if len(triples) != len(ids) or total != so_far + len(ids) or total > max_new_tokens:
        raise Fault(
            "lengths",
            f"{so_far} + {len(ids)} output_ids, {so_far} + {len(triples)} log-probabilities, completion_tokens "
            f"{total}, max_new_tokens {max_new_tokens}",
        )
    if kind == "length" and total != max_new_tokens:
        raise Fault("lengths", f"finish_reason length after {total} of {max_new_tokens} tokens")
    token_ids, logprobs = _tokens(triples, ids, vocab_size)

    matched = finish.get("matched") if kind == "stop" else None
    if kind == "stop" and not (token_ids and matched == token_ids[-1]):
        raise Fault("ids", f"finish_reason stop at {matched!r}, and the last id is {token_ids[-1:]}")
    spans = tuple((str(s["version"]), int(s["start"]), int(s["end"])) for s in meta.get("weight_versions") or ())
    if spans and (spans[0][1], *(s[1] for s in spans[1:]), spans[-1][2]) != (0, *(s[2] for s in spans[:-1]), total):
        raise Fault("version", f"weight_versions {spans} do not cover {total} tokens")
    return Piece(
        token_ids,
        logprobs,
        str(meta.get("weight_version", "")),
        spans,
        kind,
        matched,
        int(meta.get("prompt_tokens") or 0),
        int(meta.get("cached_tokens") or 0),
        int(meta.get("num_retractions") or 0),
        meta.get("routed_experts"),
    )


def read_experts(encoded: str, tokens: int, layers: int, per_token: int, num_experts: int) -> np.ndarray:
    """`meta_info.routed_experts` as the smallest signed integers [tokens, L, A].

    Args:
        encoded: base64 of int32.
        tokens: prompt and answer without the last token, which is sampled and not read.

    Raises:
        Fault: they are of another shape, or no experts.
    """
    try:
        flat = np.frombuffer(base64.b64decode(encoded, validate=True), np.int32)
        experts_TLA = flat.reshape(tokens, layers, per_token)
    except (binascii.Error, ValueError) as error:
        raise Fault("lengths", f"routed_experts are not {tokens} x {layers} x {per_token} ({error})") from error
    if experts_TLA.size and not (experts_TLA.min() >= 0 and experts_TLA.max() < num_experts):
        raise Fault("vocabulary", f"routed_experts up to {experts_TLA.max()}, the model has {num_experts}")
    return experts_TLA.astype(np.min_scalar_type(-num_experts))


def _tokens(triples: list[Any], ids: list[Any], vocab_size: int) -> tuple[list[int], list[float]]:
    logprobs = []
    for triple, token in zip(triples, ids, strict=True):
        try:
            logprob, named = triple[0], triple[1]
        except (TypeError, IndexError, KeyError) as error:
            raise Fault("logprobs", f"{str(triple):.40} is no (log-probability, id, text)") from error
        if named != token:
            raise Fault("ids", f"output_ids say {token!r:.20}, output_token_logprobs {named!r:.20}")
        if type(token) is not int or not 0 <= token < vocab_size:
            raise Fault("vocabulary", f"id {token!r:.20}, the vocabulary has {vocab_size}")
        # A probability of 1 may come out a rounding above it.
        if type(logprob) not in (int, float) or not -math.inf < logprob <= 1e-4:
            raise Fault("logprobs", f"log-probability {logprob!r:.20} of id {token}")
        logprobs.append(min(float(logprob), 0.0))
    return ids, logprobs


def _raise_error(error: Any) -> None:
    error = error if isinstance(error, dict) else {"message": error}
    code = error.get("code")
    read_status(code if isinstance(code, int) else 500, json.dumps({"error": error}).encode())
    raise Fault("error", str(error.get("message"))[:200])


def _message(raw: bytes) -> str:
    """The message inside an error body, or its start."""
    try:
        body = json.loads(raw)
        body = body.get("error", body)
        return str(body.get("message", body) if isinstance(body, dict) else body)[:200].split("\n")[0]
    except (ValueError, AttributeError):
        return raw[:200].decode(errors="replace").split("\n")[0]
