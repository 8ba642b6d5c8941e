"""The peers that need torch: lightning attention of Transformers and of fla, torch's own softmax attention, and
Transformers' mixture of experts.

A program's name is JSON: {"peer", "way", "dtype", "shape": {...}}, and for attention "decay": [per head] and
"segments": [their lengths], for experts "expert_ids": the file that holds the routing.
"""

# The peers live in an environment of their own, or in none.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from experiments.bench.peers.protocol import Prepared, serve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTED = 16.0
"""As on our side."""

BLOCK = 256
"""Of Transformers' lightning attention: its default."""


def transformers_core(work: Mapping[str, Any], q_BTNH, k_BTNH, v_BTNH) -> Callable[..., torch.Tensor]:
    """The layer itself, with everything in front of and behind its recurrence replaced by nothing.

    What is left beside it: one product of the outputs with the number 1, where its gate was.
    """
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    class One(torch.nn.Module):
        def forward(self, x):
            return torch.tensor(math.inf)  # before its sigmoid

    _, T, N, H = q_BTNH.shape
    config = MiniMaxConfig(
        hidden_size=N * H, num_attention_heads=N, head_dim=H, num_hidden_layers=3,
        layer_types=["linear_attention"] * 3, block_size=BLOCK,
    )  # fmt: skip
    layer = MiniMaxLightningAttention(config, layer_idx=1)  # the middle one of three: half of the first one's slopes
    torch.testing.assert_close(layer.slope_rate.flatten(), torch.tensor(work["decay"]), rtol=1e-4, atol=0)
    layer.qkv_proj = layer.act_fn = layer.norm = layer.out_proj = torch.nn.Identity()
    layer.output_gate = One()
    return lambda qkv_BTX: layer(qkv_BTX, None, None)[0].view(q_BTNH.shape)


def fla_simple_gla(work: Mapping[str, Any], q_BTNH, k_BTNH, v_BTNH) -> Callable[..., torch.Tensor]:
    """Of flash-linear-attention: its chunked kernels with one constant decay for each head."""
    from fla.ops.simple_gla import chunk_simple_gla

    gamma_N = -torch.tensor(work["decay"], device=DEVICE)
    packed = {}
    if work["segments"]:
        packed["cu_seqlens"] = torch.tensor([0, *work["segments"]], device=DEVICE).cumsum(0)
    return lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=gamma_N, scale=1.0, **packed)[0]


def sdpa(work: Mapping[str, Any], q_BTNH, k_BTKH, v_BTKH) -> Callable[..., torch.Tensor]:
    """Torch's choice of its own kernels."""

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return o.transpose(1, 2)

    return attend


def transformers_experts(work: Mapping[str, Any], how: str) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """The whole block, router and all, and what it computes from: x, the router's weight and those of the experts.

    Logits are bent to the routing as ours are; `how` is one of its implementations of the experts.
    """
    import numpy as np
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxSparseMoeBlock

    shape, dtype = work["shape"], getattr(torch, work["dtype"])
    T, D, F, E, A = (shape[name] for name in "TDFEA")
    config = MiniMaxConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=A)
    config._experts_implementation = how
    with torch.device(DEVICE):
        block = MiniMaxSparseMoeBlock(config).to(dtype).eval()
        ids_TA = torch.from_numpy(np.load(work["expert_ids"])).long().to(DEVICE)
        routing_TE = ROUTED * torch.nn.functional.one_hot(ids_TA, E).sum(1).to(dtype)
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = lambda *dims: torch.randn(*dims, generator=generator, device=DEVICE)  # noqa: E731
    weights = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(normal(*weight.shape) / weight.shape[-1] ** 0.5)  # the last axis is the contracted one

    def route(x_TD):
        logits_TE = torch.nn.functional.linear(x_TD, block.gate.weight) + routing_TE
        top_TA, ids_TA = torch.topk(torch.softmax(logits_TE.float(), dim=-1), A, dim=-1)
        return logits_TE, (top_TA / top_TA.sum(dim=-1, keepdim=True)).to(dtype), ids_TA

    block.gate.forward = route
    return lambda x_TD, *_: block(x_TD[None])[0], [normal(T, D).to(dtype), *weights]


PEERS = {"transformers": transformers_core, "fla": fla_simple_gla, "torch SDPA": sdpa}
EXPERTS = {"Transformers' grouped": "grouped_mm", "Transformers' loop": "eager"}


def attention(work: Mapping[str, Any]) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """A peer's attention, and what it computes from."""
    shape, dtype = work["shape"], getattr(torch, work["dtype"])
    B, T, N, H = (shape[x] for x in "BTNH")
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = lambda *dims: torch.randn(*dims, generator=generator, device=DEVICE).to(dtype)  # noqa: E731
    inputs = [normal(B, T, heads, H) for heads in (N, shape.get("K", N), shape.get("K", N))]
    function = PEERS[work["peer"]](work, *inputs)
    if work["peer"] == "transformers":  # it splits them itself, from where its projection leaves them: [q|k|v] per head
        inputs = [torch.stack(inputs, 3).reshape(B, T, -1)]
    return function, inputs


def prepare(name: str) -> Prepared:
    work = json.loads(name)
    if work["peer"] in EXPERTS:
        function, inputs = transformers_experts(work, EXPERTS[work["peer"]])
    else:
        function, inputs = attention(work)
    with torch.no_grad():
        output = function(*inputs)
    cotangent = torch.randn(output.shape, device=DEVICE).to(output.dtype)
    del output
    if backward := work["way"] != "forward":
        inputs = [x.requires_grad_() for x in inputs]

    def start() -> list[torch.Tensor]:
        with torch.set_grad_enabled(backward):
            output = function(*inputs)
            return [output, *(torch.autograd.grad(output, inputs, cotangent) if backward else ())]

    def finish() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    results = start()
    squares = sum(x.detach().float().square().sum().item() for x in results)
    rms = math.sqrt(squares / sum(x.numel() for x in results))
    del results
    begin = time.perf_counter()
    start()
    finish()
    # As on our side: the launch of one call is hidden behind the call before.
    repeats = 1 if DEVICE == "cpu" else max(1, min(100, round(0.01 / (time.perf_counter() - begin))))

    def run() -> dict[str, int]:
        for _ in range(repeats):
            start()
        finish()
        return {"repeats": repeats}

    return Prepared(run, {"rms": rms})


def missing() -> dict[str, str]:
    """Why a peer cannot run here, by its name; nothing for those that can."""
    out = {}
    if DEVICE != "cpu":
        out["transformers"] = "its loop over blocks is a peer on a CPU only"
    minimax = dict.fromkeys(("transformers", *EXPERTS), "transformers.models.minimax")
    for peer, module in {**minimax, "fla": "fla.ops.simple_gla"}.items():
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            out.setdefault(peer, f"not installed: no module {error.name}")
        except Exception as error:  # fla without a GPU fails in more ways than that
            out.setdefault(peer, f"{type(error).__name__}: {error}".split("\n")[0])
    if DEVICE == "cpu":
        out.setdefault("fla", "it needs a GPU, and torch sees none")
    return out


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    names = ("torch", "transformers", "triton", "fla-core", "flash-linear-attention")
    versions = {"python": platform.python_version(), "device": DEVICE} | {name: installed(name) for name in names}
    serve(prepare, versions, {"missing": missing})


if __name__ == "__main__":
    main()
