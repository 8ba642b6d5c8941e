"""The experts of a layer: SGLang's fused kernels on a GPU, a loop in plain torch on a CPU, where those do not run.

Both hold w13_weight [E, 2F, D] (w1 over w3: gate over up) and w2_weight [E, D, F], filled one expert at a time by
`weight_loader(parameter, tensor, name, shard, expert)` with shard "w1", "w2" or "w3".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.moe.utils import RoutingMethodType
from sglang.srt.runtime_context import get_device, get_parallel
from torch import nn


class MixtureOfExperts(nn.Module):
    """sum over the A best experts e of p_e * W2[e](silu(W1[e] x) * W3[e] x), p renormalised over the A.

    The router is float32, stored and multiplied: bfloat16 logits flip near-tied choices between trainer and server.
    Choices go through SGLang's `TopK`, which hands them to the server's capturer of routed experts on either device.
    """

    def __init__(self, config, layer: int, prefix: str):
        super().__init__()
        c = config
        self.on_cpu = get_device().device == "cpu"
        self.gate = nn.Linear(c.hidden_size, c.num_local_experts, bias=False, dtype=torch.float32)
        self.topk = TopK(top_k=c.num_experts_per_tok, renormalize=True, layer_id=layer)
        if self.on_cpu:
            self.experts = TorchExperts(c.num_local_experts, c.hidden_size, c.expert_dim)
            return
        self.experts = get_moe_impl_class(None)(
            num_experts=c.num_local_experts, top_k=c.num_experts_per_tok, layer_id=layer, hidden_size=c.hidden_size,
            intermediate_size=c.expert_dim, reduce_results=True, prefix=f"{prefix}.experts",
            routing_method_type=RoutingMethodType.Renormalize,
        )  # fmt: skip
        self.topk.bind_runner_backend(self.experts.runner_backend, routing_method_type=self.experts.routing_method_type)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, D] in its dtype."""
        logits = F.linear(x.float(), self.gate.weight)
        if self.on_cpu:  # the dispatch of a CPU server leads to compiled kernels that it lacks
            chosen = self.topk.forward_native(x, logits)
            return self.experts(x, chosen.topk_ids, chosen.topk_weights)
        return self.experts(x, self.topk(x, logits))


class TorchExperts(nn.Module):
    """Every expert once over its own tokens. Run on a CPU, one rank."""

    def __init__(self, num_experts: int, hidden_size: int, expert_dim: int):
        super().__init__()
        if get_parallel().tp_size > 1:
            # A loop in torch over whole experts is there for tests; what shards them needs SGLang's GPU kernels.
            raise ValueError("--tp-size: a CPU server holds all experts in one rank; start it without")
        empty = lambda *shape: nn.Parameter(torch.empty(shape), requires_grad=False)  # noqa: E731
        self.w13_weight = empty(num_experts, 2 * expert_dim, hidden_size)
        self.w2_weight = empty(num_experts, hidden_size, expert_dim)

    def weight_loader(self, parameter: nn.Parameter, tensor: torch.Tensor, name: str, shard: str, expert: int) -> None:
        """Copy one matrix of one expert to its place."""
        half = self.w13_weight.shape[1] // 2
        rows = {"w1": slice(0, half), "w3": slice(half, None), "w2": slice(None)}[shard]
        parameter.data[expert, rows].copy_(tensor)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, D], ids and float32 weights [T, A] -> [T, D]."""
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in torch.unique(ids).tolist():
            if expert < 0:  # padding
                continue
            rows, place = (ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[rows], self.w13_weight[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.w2_weight[expert])
            out.index_add_(0, rows, y.float() * weights[rows, place, None].float())
        return out.to(x.dtype)
