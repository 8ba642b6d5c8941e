"""Lightning attention in plain torch: S_t = exp(-s) S_{t-1} + k_t v_t^T, o_t = q_t S_t, per head, no scale.

Letters: T tokens of one request, B requests, N heads (of this rank), H head width. The state S is [N, H, H], key axis
first, which is the layout of SGLang's pool and of its kernels. Everything is float32; no exponent is above 0, so
nothing overflows. An independent form of `m1jax/pallas_kernels/lightning_attention`.
"""

from __future__ import annotations

import torch

CHUNK = 64
"""Tokens whose scores exist at the same time. The result does not depend on it."""


def slopes(num_heads: int, layer: int, num_layers: int) -> torch.Tensor:
    """Decay rates s of a layer, float32 [N]: ALiBi's ladder times 1 - layer / (num_layers - 1) + 1e-5.

    `layer` counts all layers, softmax ones too. Where N is no power of two, the ladder is that of the largest power P
    below, then every second rate of the ladder of 2 P (the released model code). One layer alone has the factor
    1 + 1e-5.
    """
    power = 1 << (num_heads.bit_length() - 1)
    rates = _ladder(power) + _ladder(2 * power)[::2][: num_heads - power]
    depth = layer / (num_layers - 1) if num_layers > 1 else 0.0
    return torch.tensor(rates, dtype=torch.float64).mul(1 - depth + 1e-5).float()


def _ladder(power: int) -> list[float]:
    return [2.0 ** (-8 * (head + 1) / power) for head in range(power)]


def prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rates: torch.Tensor, state: torch.Tensor, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """A stretch of one request after `state` [N, H, H]: q, k, v float32 [T, N, H] -> (o [T, N, H], state after it)."""
    steps = torch.arange(1, min(chunk, len(q)) + 1, dtype=torch.float32, device=q.device)  # 1-based: j
    gap = steps[:, None] - steps
    within = torch.where(gap >= 0, torch.exp(-rates[:, None, None] * gap.clamp(min=0)), 0.0)  # [N, j, l]
    since = torch.exp(-rates[:, None] * steps)  # [N, j]: what is left of a state after j tokens
    outputs = []
    for at in range(0, len(q), chunk):
        qc, kc, vc = (x[at : at + chunk].transpose(0, 1) for x in (q, k, v))  # [N, m, H]
        m = qc.shape[1]
        scores = (qc @ kc.transpose(1, 2)) * within[:, :m, :m]
        outputs.append((scores @ vc + (qc @ state) * since[:, :m, None]).transpose(0, 1))
        # Token l of the chunk has decayed m - l times at its end: the last row of `within`.
        state = state * since[:, m - 1, None, None] + (kc * within[:, m - 1, :m, None]).transpose(1, 2) @ vc
    return torch.cat(outputs), state


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rates: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each of B requests: q, k, v float32 [B, N, H], states [B, N, H, H] -> (o [B, N, H], new states)."""
    states = states * torch.exp(-rates)[:, None, None] + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ states).squeeze(-2), states
