"""MiniMax in Hugging Face Transformers: MiniMaxForCausalLM with the quickest settings that it offers on a CPU."""

# The peers live in an environment of their own.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from experiments.bench.peers.protocol import Prepared, fastest, serve
from experiments.bench.peers.workloads import Decode, Hybrid, Pass, workload

BLOCKS, EXPERTS = (256, 64), ("eager", "grouped_mm")
"""Settings to choose from: the lightning block (256 is the default) and the implementation of the experts.
`batched_mm` copies a weight matrix for every token, and took thirty times as long."""


@cache
def model(shape: Hybrid, block: int, experts: str) -> MiniMaxForCausalLM:
    """The decoder with random weights."""
    config = MiniMaxConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.expert_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, num_local_experts=shape.experts, num_experts_per_tok=shape.experts_per_token,
        layer_types=["linear_attention"] * (shape.layers - 1) + ["full_attention"], block_size=block,
        full_attn_alpha_factor=shape.alpha, linear_attn_alpha_factor=shape.alpha, mlp_alpha_factor=shape.alpha,
        bos_token_id=None, eos_token_id=None, attn_implementation="sdpa", experts_implementation=experts,
    )  # fmt: skip
    torch.manual_seed(0)
    return MiniMaxForCausalLM(config).eval()


def passes(work: Pass, network: MiniMaxForCausalLM) -> Callable[[], Any]:
    """Token log-probabilities, or mean cross entropy and its gradient."""
    ids = torch.randint(0, work.model.vocab, (work.rows, work.tokens), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].reshape(-1)

    def losses(reduction: str) -> torch.Tensor:
        logits = network(ids, use_cache=False).logits[:, :-1].reshape(-1, work.model.vocab)
        return torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)

    def forward() -> None:
        with torch.inference_mode():
            losses("none")

    def backward() -> None:
        network.zero_grad(set_to_none=True)
        losses("mean").backward()

    return backward if work.backward else forward


def decode(work: Decode, network: MiniMaxForCausalLM) -> Callable[[], Any]:
    """`generate` with its cache."""
    ids = torch.randint(0, work.model.vocab, (work.rows, work.prompt), generator=torch.Generator().manual_seed(1))

    def run() -> dict[str, int]:
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=work.new, min_new_tokens=work.new, pad_token_id=0,
        )  # fmt: skip
        return {"tokens": out[:, work.prompt :].numel()}

    return run


def prepare(name: str, smoke: bool) -> Prepared:
    work = workload(name, smoke)
    assert isinstance(work, Pass | Decode)
    networks = {f"block {b}, experts {e}": model(work.model, b, e) for b in BLOCKS for e in EXPERTS}
    runs = {
        setting: passes(work, network) if isinstance(work, Pass) else decode(work, network)
        for setting, network in networks.items()
    }
    setting = fastest(runs)
    parameters = sum(p.numel() for p in networks[setting].parameters())
    return Prepared(runs[setting], {"parameters": parameters, "setting": f"sdpa, {setting}"})


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    serve(lambda name: prepare(name, settings["smoke"]), versions)


if __name__ == "__main__":
    main()
