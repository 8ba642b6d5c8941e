"""What a body of /generate asks for, or the real SGLang server's refusal of it, word for word."""

from __future__ import annotations

import math
import uuid
from collections import Counter
from typing import Any

Json = dict[str, Any]
SAMPLING = dict(
    max_new_tokens=128, stop=None, stop_token_ids=None, stop_regex=None, temperature=1.0, top_p=1.0, top_k=-1,
    min_p=0.0, frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0, n=1,
    json_schema=None, regex=None, ebnf=None, structural_tag=None, ignore_eos=False, skip_special_tokens=True,
    spaces_between_special_tokens=True, no_stop_trim=False, stream_interval=None, logit_bias=None, sampling_seed=None,
    custom_params=None, beam_width=None, watermark=None, choice=None,
)  # fmt: skip


class Refused(Exception):
    """A request that the server answers with `status` and `body`."""

    def __init__(self, status: int, body: Json):
        self.status, self.body = status, body


def bad(message: str) -> Refused:
    """What makes no sense, found before a request runs; in a stream it is an event."""
    return Refused(400, {"error": {"message": message}})


def foreign(message: str) -> Refused:
    """What the schema does not know; never an event."""
    return Refused(400, {"error": message})


def invalid(message: str) -> Refused:
    """What is no such request at all."""
    return Refused(400, {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400})


def asked(body: Json, context_length: int, vocab_size: int) -> list[tuple[str, list[int], Json]]:
    """The request's id, its prompt and all sampling parameters, for each answer that is wanted."""
    prompts = body.get("input_ids")
    if prompts is None:
        raise bad("Either text, input_ids or input_embeds should be provided.")
    if not isinstance(prompts, list):
        raise invalid("Value error, must be list or null; got " + type(prompts).__name__)
    batch = bool(prompts) and isinstance(prompts[0], list)
    prompts = prompts if batch else [prompts]
    given = body.get("sampling_params") or {}
    params = [_sampling(one) for one in (given if isinstance(given, list) else [given] * len(prompts))]
    n, rid = params[0]["n"], body.get("rid")
    if rid is None or n > 1:  # several answers to one prompt have ids of the server's own
        names = [uuid.uuid4().hex for _ in range(len(prompts) * n)]
    elif isinstance(rid, str):
        names = [f"{rid}_{at}" for at in range(len(prompts))] if batch else [rid]
    else:
        names = list(rid)
        if len(names) != len(prompts):
            raise bad("The specified rids length mismatch with the batch_size for batch processing.")
    if doubled := [name for name, times in Counter(names).items() if times > 1]:
        raise bad(f"Duplicate request IDs detected within the request: {doubled}")
    for prompt, one in zip(prompts, params, strict=True):
        if not prompt and not batch:  # in a batch it goes unnoticed until the scheduler dies of it
            raise bad("input_ids cannot be empty.")
        _check_length(len(prompt), one["max_new_tokens"], context_length)
        if odd := [key for key in one["logit_bias"] or () if not 0 <= int(key) < vocab_size]:
            raise bad(f"logit_bias must has keys in [0, {vocab_size - 1}], got {odd[0]}.")
    return [(name, prompts[at // n], params[at // n]) for at, name in enumerate(names)]


def _sampling(given: Json) -> Json:
    for key in given:
        if key not in SAMPLING:
            raise foreign(f"unknown field `{key}`, expected one of `{'`, `'.join(SAMPLING)}`")
    params: Json = SAMPLING | {key: value for key, value in given.items() if value is not None}
    for key in ("max_new_tokens", "temperature", "top_p", "top_k", "n"):
        if isinstance(params[key], bool) or not isinstance(params[key], int | float):
            raise foreign(f'invalid type: {type(params[key]).__name__} "{params[key]}", expected f64')
    if params["max_new_tokens"] < 0:
        raise bad(f"max_new_tokens must be at least 0, got {params['max_new_tokens']}.")
    if not 0 <= params["temperature"] < math.inf:
        raise bad(f"temperature must be a non-negative finite number, got {params['temperature']}.")
    if not 0 < params["top_p"] <= 1:
        raise bad(f"top_p must be in (0, 1], got {params['top_p']}.")
    if params["top_k"] != -1 and params["top_k"] < 1:
        raise bad(f"top_k must be -1 (disable) or at least 1, got {params['top_k']}.")
    if params["min_new_tokens"]:
        raise bad(
            f"min_new_tokens={params['min_new_tokens']} is unavailable when skip_tokenizer_init=True (requires "
            "tokenizer for eos_token_id)."
        )
    if params["stop"]:
        raise bad(
            f"stop={params['stop']} is unavailable when skip_tokenizer_init=True (requires tokenizer to decode tokens "
            "to text for matching)."
        )
    return params


def _check_length(old: int, new: int, limit: int) -> None:
    if old >= limit:
        raise bad(f"The input ({old} tokens) is longer than the model's context length ({limit} tokens).")
    if old + new > limit:
        raise bad(
            f"Requested token count exceeds the model's maximum context length of {limit} tokens. You requested a "
            f"total of {old + new} tokens: {old} tokens from the input messages and {new} tokens for the completion. "
            "Please reduce the number of tokens in the input messages or the completion to fit within the limit."
        )
