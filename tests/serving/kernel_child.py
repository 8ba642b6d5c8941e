"""Run by a server's Python: prints how far lightning attention in plain torch is from other forms of it, as JSON.

Comparisons at MiniMax-M1's head width. SGLang's kernel for GPUs ("seg_la") is interpreted by Triton on the CPU: its
arithmetic runs, its compiled form does not. The recurrence token by token, in float64. And the slopes that SGLang's
backend for GPUs gives that kernel, on each rank.
"""

from __future__ import annotations

import json
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import sglang.srt.layers.attention.linear.lightning_backend as lightning_backend
import torch
import triton.runtime.interpreter as interpreter
from sglang.kernels.ops.attention.linear.seg_la import SegLaMeta, seg_la_fwd

from m1jax.serving import recurrence

HEADS, WIDTH, TOLD = 3, 128, {}


def masks_as_booleans(name: str, position: int) -> None:
    """Triton 3.9's interpreter hands a broadcast mask on as integers, which it then refuses."""
    original = getattr(interpreter.InterpreterBuilder, name)

    def patched(self, *args, **options):
        args[position].data = np.ascontiguousarray(args[position].data).astype(bool)
        return original(self, *args, **options)

    setattr(interpreter.InterpreterBuilder, name, patched)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def token_by_token(q, k, v, rates, state):
    outputs, decay = [], torch.exp(-rates.double())[:, None, None]
    q, k, v, state = (x.double() for x in (q, k, v, state))
    for t in range(len(q)):
        state = decay * state + k[t, :, :, None] * v[t, :, None, :]
        outputs.append(torch.einsum("nk,nkv->nv", q[t], state))
    return torch.stack(outputs).float(), state.float()


def compare(lengths: list[int], continued: list[bool], layer: int, kept: list[int] | None = None) -> None:
    """Requests of these lengths in one batch, from states that others have left in their slots or from zero.

    Of each, the state after its first `kept` tokens goes to a slot of its own where that is not 0: on a GPU SGLang
    keeps prefixes from inside prompts.
    """
    rates = recurrence.slopes(64, layer, 80)[:HEADS]  # the fastest
    q, k, v = (torch.randn(sum(lengths), HEADS, WIDTH) for _ in range(3))
    pool = torch.randn(2 * len(lengths) + 1, HEADS, WIDTH, WIDTH)
    slots = torch.arange(1, len(lengths) + 1, dtype=torch.int32)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    ours, exact, states = [], [], pool.clone()
    for b, slot in enumerate(slots.tolist()):
        parts = [x[starts[b] : starts[b + 1]] for x in (q, k, v)]
        before = pool[slot] if continued[b] else torch.zeros(HEADS, WIDTH, WIDTH)
        if lengths == [1] * len(lengths):
            o, after = recurrence.step(*parts, rates, before[None])
            after = after[0]
        else:
            o, after = recurrence.prefill(*parts, rates, before)
        expected, expected_state = token_by_token(*parts, rates, before)
        exact.append(max(apart(o, expected), apart(after, expected_state)))
        ours.append(o)
        states[slot] = after
        if kept and kept[b]:
            states[slot + len(lengths)] = recurrence.prefill(*(x[: kept[b]] for x in parts), rates, before)[1]
    meta = SegLaMeta(
        batch_size=len(lengths), q_offsets=starts, q_lengths=starts.diff(), s_offsets=slots, max_q_length=None,
        s_scales=torch.tensor(continued, dtype=torch.int32),
    )  # fmt: skip
    tracked = {}
    if kept:
        places = [len(lengths) + 1 + b if n else -1 for b, n in enumerate(kept)]
        tracked["track_lens"] = torch.tensor(kept, dtype=torch.int32)
        tracked["track_state_indices"] = torch.tensor(places, dtype=torch.int32)
    theirs = seg_la_fwd(q=q, k=k, v=v, s=pool, decay_scales=rates, meta=meta, softmax_scale=1.0, **tracked)
    kernel = max(apart(theirs, torch.cat(ours).view(theirs.shape)), apart(pool, states))
    TOLD[f"{lengths} {continued} {kept} layer {layer}"] = {"token by token": max(exact), "seg_la": kernel}


masks_as_booleans("create_masked_load", 1)
masks_as_booleans("create_masked_store", 2)
torch.manual_seed(0)
compare([70], [False], 0)
compare([64], [True], 3)
compare([33, 70], [True, False], 78)
compare([1, 1, 1], [True, True, True], 0)
compare([100, 70, 40], [True, False, False], 0, kept=[64, 64, 0])
slopes = {
    f"{n} {i} {L}": recurrence.slopes(n, i, L).tolist() for n, i, L in ((64, 3, 80), (6, 1, 6), (12, 5, 6), (1, 0, 1))
}
theirs = {}
for n, L, ranks in ((64, 80, 1), (64, 80, 8), (6, 6, 2)):
    for rank in range(ranks):
        parallel = types.SimpleNamespace(attn_tp_size=ranks, attn_tp_rank=rank)
        lightning_backend.get_parallel = lambda parallel=parallel: parallel
        table = lightning_backend.LightningAttentionBackend._build_slope_tensor(n, L, "cpu")
        mine = slice(rank * n // ranks, (rank + 1) * n // ranks)
        ours = [recurrence.slopes(n, layer, L)[mine] for layer in range(L)]
        theirs[f"{n} {L} {rank}/{ranks}"] = max(
            (table[layer].flatten() / ours[layer] - 1).abs().max().item() for layer in range(L)
        )
json.dump({"apart": TOLD, "slopes": slopes, "their slopes": theirs}, sys.stdout)
