"""What is asked of a server before it is trusted: settings that would bias the importance ratio are refused.

The trainer takes a server's log-probabilities for those of the full softmax at the sampling temperature, as the local
engine's are. Flags say some of what can make that false; the rest is tried out on a few tokens. A mistake of set-up is
a ServerRefused, for no retry mends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m1jax.errors import ServerRefused
from m1jax.rl.servers.protocol import Fault, Piece, new_id, read_piece, request
from m1jax.rl.servers.server import Server
from m1jax.types import Sampling
from m1jax.weights.hf_config import MODEL_TYPES

PROBE_TOKENS, PROBE_S, FAR = 8, 120.0, 0.25


@dataclass(frozen=True)
class Needs:
    """What a run wants of a server.

    Attributes:
        model_type: of the model, as its config.json has it.
        vocab_size: of the model.
        stop_ids: ids that end a response.
        temperature: that responses are sampled at.
        positions: longest prompt and response together.
        repetition_stop: `ServersConfig.repetition_stop`.
        update_mode: `ServersConfig.update_mode`.
        experts: whether the experts that serve are asked for.
    """

    model_type: str
    vocab_size: int
    stop_ids: tuple[int, ...]
    temperature: float
    positions: int
    repetition_stop: str
    update_mode: str
    experts: bool


def probe_flags(url: str, info: Mapping[str, Any], needs: Needs) -> None:
    """Refuse a server for what /server_info and /model_info say of it.

    Raises:
        ServerRefused: the reason, and the flag that mends it.
    """
    if "weight_version" not in info:
        raise ServerRefused(
            f"{url}: does not name the version of its weights, so that nobody can know which weights an answer is of; "
            f"it needs an SGLang with /update_weights_from_disk (0.5 or newer)"
        )
    served, wanted = (MODEL_TYPES.get(str(name)) for name in (info.get("model_type"), needs.model_type))
    if served not in (None, wanted):
        raise ServerRefused(
            f"{url}: serves {info.get('served_model_name')}, a {info.get('model_type')}, and the run trains a "
            f"{needs.model_type}; start it with an export of config.model"
        )
    if preferred := info.get("preferred_sampling_params"):
        raise ServerRefused(
            f"{url}: --preferred-sampling-params {preferred} would act on top of config.sampling; start it without"
        )
    context = info.get("context_length")
    if isinstance(context, int) and 0 < context < needs.positions:
        raise ServerRefused(
            f"{url}: --context-length {context} is less than the {needs.positions} tokens of prompt and response; "
            f"raise it, or lower config.sampling.max_tokens"
        )
    if needs.experts and not info.get("enable_return_routed_experts"):
        raise ServerRefused(
            f"{url}: config.rollout.router_replay wants the experts that serve; start it with "
            f"--enable-return-routed-experts, or choose 'off'"
        )
    flags = ("enable_custom_logit_processor", "disable_overlap_schedule")
    if needs.repetition_stop == "processor" and not all(info.get(flag) for flag in flags):
        raise ServerRefused(
            f"{url}: config.servers.repetition_stop 'processor' needs --enable-custom-logit-processor and "
            f"--disable-overlap-schedule; start it with both, or choose 'stream'"
        )
    if needs.repetition_stop == "stream" and info.get("incremental_streaming_output") is False:
        raise ServerRefused(
            f"{url}: streams all earlier tokens again with every event, quadratic bytes in the length; start it with "
            f"--incremental-streaming-output, or set config.servers.repetition_stop to 'segments'"
        )


async def probe_vocabulary(server: Server, needs: Needs) -> None:
    """Refuse a server whose model has more ids than ours or fewer: it takes a bias for an id that it has, and no other.

    To be asked before it gets weights: SGLang alone dies of tensors of another shape.

    Raises:
        ServerRefused: it has.
        Fault: it did not answer.
    """
    fewer = await _refuses(server, needs.vocab_size - 1, needs)
    if fewer or not await _refuses(server, needs.vocab_size, needs):
        raise ServerRefused(
            f"{server.url}: serves a model of {'fewer' if fewer else 'more'} ids than the {needs.vocab_size} of the "
            f"one that trains{fewer and f' ({fewer})'}; start it with an export of config.model"
        )


async def probe_logprobs(server: Server, needs: Needs, log: Callable[[str], None]) -> None:
    """Refuse a server for what its answers show: log-probabilities of another distribution, spans that are missing.

    Raises:
        ServerRefused: the reason, and what mends it.
        Fault: it did not answer.
    """
    prompt = [i % needs.vocab_size for i in range(2, 2 + PROBE_TOKENS) if i not in needs.stop_ids]
    piece, gaps = await _answer_and_gaps(server, prompt, 1.0, needs)
    noise = float(np.abs(gaps).mean())
    if not piece.spans and needs.update_mode != "abort":
        raise ServerRefused(
            f"{server.url}: does not tell which weights each token is of (weight_versions); set "
            f"config.servers.update_mode to 'abort', with which no request sees two versions"
        )
    if np.abs(gaps).max() > 0.1:
        log(
            f"warning: {server.url}: its log-probabilities of the same tokens differ by up to {np.abs(gaps).max():.3f} "
            f"between decoding and prefill; low precision, or state that is lost"
        )
    if needs.temperature not in (0.0, 1.0):
        # At a temperature far below 1 sampled tokens are likelier than at 1, by far more in the mean than low precision
        # makes of them; it does not where log-probabilities at 1 come back.
        far = [(await _answer_and_gaps(server, prompt[i:], FAR, needs))[1] for i in range(3)]
        if np.concatenate(far).mean() < max(noise, 1e-4):
            raise ServerRefused(
                f"{server.url}: sampling at temperature {FAR:g} it returns log-probabilities at temperature 1, which "
                f"at config.sampling.temperature {needs.temperature:g} biases every ratio; start it without "
                f"SGLANG_RETURN_ORIGINAL_LOGPROB, or sample at 1"
            )
    if needs.repetition_stop == "stream":
        try:
            await asyncio.wait_for(_probe_stream(server, prompt, needs), PROBE_S)
        except TimeoutError as error:
            raise Fault("timeout", f"{server.url}: no stream of 4 tokens in {PROBE_S:.0f} s") from error


async def _answer_and_gaps(
    server: Server, prompt: list[int], temperature: float, needs: Needs
) -> tuple[Piece, np.ndarray]:
    """An answer, and by how much its log-probabilities are above those that prefill gives at temperature 1."""
    body = request(new_id(), prompt, PROBE_TOKENS, Sampling(PROBE_TOKENS, temperature=temperature), needs.stop_ids)
    piece = read_piece(await _soon(server, body), body["rid"], 0, PROBE_TOKENS, needs.vocab_size)
    at_one = np.array(await _rescored(server, prompt, piece.token_ids))
    return piece, np.array(piece.logprobs) - at_one


async def _soon(server: Server, body: dict[str, Any]) -> Any:
    """The answer to a small request."""
    try:
        return await asyncio.wait_for(server.whole(body), PROBE_S)
    except TimeoutError as error:
        raise Fault("timeout", f"{server.url}: no answer to {PROBE_TOKENS} tokens in {PROBE_S:.0f} s") from error


async def _refuses(server: Server, token: int, needs: Needs) -> str:
    """Why a server takes no bias for an id; "" where it does."""
    body = request(new_id(), [0], 1, Sampling(1), needs.stop_ids)
    body["sampling_params"]["logit_bias"] = {str(token): 0.0}
    try:
        await _soon(server, body)
    except Fault as fault:
        if fault.kind != "refused":
            raise
        return fault.detail
    return ""


async def _rescored(server: Server, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probabilities at temperature 1 of an answer, by prefill."""
    body = request(new_id(), prompt + answer, 1, Sampling(1), ())
    body |= {"logprob_start_len": 0}
    meta = (await _soon(server, body)).get("meta_info", {})
    triples = meta.get("input_token_logprobs") or []
    if len(triples) < len(answer) or None in (scored := [t[0] for t in triples[-len(answer) :]]):
        raise Fault("logprobs", f"{server.url}: no log-probabilities of a prompt")
    return scored


async def _probe_stream(server: Server, prompt: list[int], needs: Needs) -> None:
    """An older server has no flag to tell how it streams; a stream tells."""
    body = request(new_id(), prompt, 4, Sampling(4), needs.stop_ids, stream=True)
    seen = 0
    async for event in server.events(body):
        ids = event.get("output_ids") if isinstance(event, dict) else None
        if ids and seen and len(ids) == event["meta_info"].get("completion_tokens"):  # more than what is new
            probe_flags(server.url, {"weight_version": "", "incremental_streaming_output": False}, needs)
        seen += len(ids or ())
