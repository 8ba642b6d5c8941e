"""What can go wrong with an answer of /generate, done to the answers of `tests/sglang_double.py`.

Three families: instead of an answer (`INSTEAD`), in how it is sent, in what it says. In a stream what is said is
spoiled in the last event, which every client reads; `duplicate` and `reset_after` take the first.
"""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

INSTEAD = ("reset_before", "status_400", "status_429", "status_503", "abort_503", "stuck", "abort_before_prefill")
SENDING = ("reset_after", "half_event", "truncated_json", "duplicate")
SAYING = ("nan_logprob", "null_logprob", "missing_logprobs", "wrong_length", "beyond_vocabulary", "id_mismatch",
          "rid_mismatch", "old_version", "old_span", "no_finish")  # fmt: skip
KINDS = (*INSTEAD, "slow", *SENDING, *SAYING)


def reset(transport: Any) -> None:
    """Ends a connection with RST."""
    if transport is not None and (connection := transport.get_extra_info("socket")) is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


async def instead(kind: str, request: web.Request, asked: dict[str, Any], version: str) -> web.StreamResponse:
    if kind == "reset_before":
        reset(request.transport)
        return web.Response()
    if kind == "stuck":
        await asyncio.Event().wait()
    if kind.startswith("status_"):
        status = int(kind.removeprefix("status_"))
        message = {400: "injected", 429: "Too many requests.", 503: "The request queue is full."}[status]
        body = {"object": "error", "message": message, "type": str(status), "param": None, "code": status}
        return web.json_response({"error": {"message": message}} if status == 400 else body, status=status)
    finish: dict[str, Any] = {"type": "abort", "message": "Abort in waiting queue"}
    if kind == "abort_503":
        finish = {"type": "abort", "status_code": 503, "message": "The request queue is full."}
    rid = asked.get("rid")
    meta = {"id": rid if isinstance(rid, str) else "0", "finish_reason": finish, "weight_version": version,
            "e2e_latency": 0.001, "weight_versions": [{"version": version, "start": 0, "end": 0}],
            "input_token_logprobs": [], "output_token_logprobs": [], "output_token_logprobs_length": 0,
            "completion_tokens": 0}  # fmt: skip
    answer = {"text": "", "output_ids": [], "meta_info": meta}
    if asked.get("stream"):
        return await send_events(request, _each([answer]), "", Counter(), version)
    return web.json_response(answer)


async def send(
    request: web.Request, payload: Any, kind: str, injected: Counter[str], version: str
) -> web.StreamResponse:
    """The whole answer, spoiled by `kind`, which is counted if it happened."""
    if kind in SAYING:
        first = spoil(kind, payload[0] if isinstance(payload, list) else payload, version)
        if first is not None:
            injected[kind] += 1
            payload = [first, *payload[1:]] if isinstance(payload, list) else first
    elif kind == "duplicate":
        injected[kind] += 1
        payload = [payload, payload]
    raw = json.dumps(payload).encode()
    if kind in ("reset_after", "half_event"):
        injected[kind] += 1
        response = web.StreamResponse(headers={"Content-Length": str(len(raw)), "Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(raw[: len(raw) // 2])
        reset(request.transport)
        return response
    if kind == "truncated_json":
        injected[kind] += 1
        raw = raw[: len(raw) // 2]
    return web.Response(body=raw, content_type="application/json")


async def send_events(request: web.Request, events: AsyncIterator[Any], kind: str, injected: Counter[str],
                      version: str) -> web.StreamResponse:  # fmt: skip
    """Server-sent events up to [DONE], spoiled by `kind`, which is counted if it happened."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    first = True
    async for event in events:
        last = event.get("meta_info", {}).get("finish_reason") is not None
        spoiled = spoil(kind, event, version) if last and kind in SAYING else None
        raw = b"data: " + json.dumps(event if spoiled is None else spoiled).encode() + b"\n\n"
        happens = spoiled is not None or (first and kind in ("duplicate", "reset_after"))
        happens |= last and kind in ("half_event", "truncated_json")
        if happens:
            injected[kind] += 1
        if happens and (kind == "half_event" or (kind == "reset_after" and last)):
            raw = raw[: len(raw) // 2]
        elif happens and kind == "truncated_json":
            raw = raw[: len(raw) // 2] + b"\n\n"
        await response.write(raw * 2 if happens and kind == "duplicate" else raw)
        if happens and kind == "reset_after":
            reset(request.transport)
            return response
        if happens and kind == "half_event":
            if request.transport is not None:
                request.transport.close()  # no RST: the end of the file in the middle of a chunked body
            return response
        first = False
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def spoil(kind: str, answer: dict[str, Any], version: str) -> dict[str, Any] | None:
    """A copy of `answer` that is wrong in the way of `kind`; None where it has nothing that could be."""
    answer = copy.deepcopy(answer)
    meta, ids = answer["meta_info"], answer["output_ids"]
    triples = meta.get("output_token_logprobs")
    if kind == "no_finish":
        meta["finish_reason"] = None
    elif kind == "rid_mismatch":
        meta["id"] = "f" * 32
    elif kind == "old_version":
        if all(
            span["version"] == version for span in meta.get("weight_versions", [{"version": meta["weight_version"]}])
        ):
            return None
        meta["weight_version"] = version
        for span in meta.get("weight_versions", ()):
            span["version"] = version
    elif kind == "old_span":
        spans = meta.get("weight_versions")
        if not spans or spans[0]["version"] == version or spans[0]["end"] < 2:
            return None
        first = {"version": version, "start": 0, "end": 1}
        meta["weight_versions"] = [first, spans[0] | {"start": 1}, *spans[1:]]
    elif not triples:
        return None
    elif kind == "nan_logprob":
        triples[-1][0] = float("nan")
    elif kind == "null_logprob":
        triples[-1][0] = None
    elif kind == "missing_logprobs":
        del meta["output_token_logprobs"], meta["output_token_logprobs_length"]
    elif kind == "wrong_length":
        if len(ids) % 2:
            triples.pop()
        else:
            triples.append(list(triples[-1]))
    elif kind == "beyond_vocabulary":
        ids[-1] = triples[-1][1] = 1 << 30
    elif kind == "id_mismatch":
        ids[-1] = ids[-1] - 1 if ids[-1] else 1
    return answer


async def _each(events: list[Any]) -> AsyncIterator[Any]:
    for event in events:
        yield event
