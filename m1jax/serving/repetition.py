"""The repetition stop inside a server: a logit processor that ends an answer which is sure of itself for too long.

The report (section 3.2) cuts a generation off once 3,000 consecutive tokens each had a probability above 0.99. Here the
server counts, and forces an end token at the step after; its log-probability is 0, and the client drops it. What that
costs is a softmax and one copy to the host a step. Servers need --enable-custom-logit-processor, which lets clients run
code in them, and --disable-overlap-schedule, since the overlap scheduler shows a request's tokens one step late.

A client names this class and sends no code: pickled by reference it is a module, a name and a full stop.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class RepetitionStop(CustomLogitProcessor):
    """Forces `stop_id` after `repetition_run` tokens in a row of probability above `repetition_probability`.

    Parameters of each request (`custom_params`): these three, its `temperature`, and `run`, the tokens of such a run
    that its prompt ends with.
    """

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        """Logits [rows, V] of the next token, before temperature; rows that are to end hold one finite value."""
        parameters = custom_param_list or []
        temperatures = torch.tensor([p["temperature"] or 1.0 for p in parameters], device=logits.device)
        logprobs = torch.log_softmax(logits.float() / temperatures[:, None], dim=-1)
        states = [_state(p) for p in parameters]
        grown = [
            row for row, (p, s) in enumerate(zip(parameters, states, strict=True))
            if len(p["__req__"].output_ids) == s["seen"] + 1
        ]  # fmt: skip
        if grown:
            last = [int(parameters[row]["__req__"].output_ids[-1]) for row in grown]
            before = torch.stack([states[row]["logprobs"] for row in grown])
            index = torch.tensor(last, device=logits.device)[:, None]
            for row, p in zip(grown, before.gather(1, index)[:, 0].exp().tolist(), strict=True):
                sure = p > parameters[row]["repetition_probability"]
                states[row]["run"] = states[row]["run"] + 1 if sure else 0
        for row, (p, state) in enumerate(zip(parameters, states, strict=True)):
            state["seen"], state["logprobs"] = len(p["__req__"].output_ids), logprobs[row]
            if 0 < p["repetition_run"] <= state["run"]:
                logits[row] = -torch.inf
                logits[row, p["stop_id"]] = 0.0
        return logits


def _state(parameters: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a request from step to step, on the request itself, so that it goes when that goes."""
    request = parameters["__req__"]
    if not hasattr(request, "m1jax_repetition"):
        # No step was seen yet, so that no token is judged by it.
        request.m1jax_repetition = {"seen": -2, "run": parameters["run"], "logprobs": None}
    return request.m1jax_repetition
