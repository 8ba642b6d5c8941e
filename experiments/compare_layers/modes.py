"""Two ways of computing one model, layer by layer: the training forward against step decode, bfloat16 against float32.

MiniMax-M1 (section 3.2) found by such a comparison that the probabilities of its trainer and of its sampler drifted
apart in the LM head, whose inputs are large, and mended it with a float32 head. Here every pair is taken with either
head, so that the table shows where the gap comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compare_layers.goldens import cast, next_logprobs, pearson
from m1jax.errors import UserError
from m1jax.model.config import ModelConfig
from m1jax.model.observe import Observation, logits, observe
from m1jax.types import Params

HEADS = ("float32", "bfloat16")
PAIRS = {
    "chunked against decode, float32": (("chunked", "float32"), ("decode", "float32")),
    "chunked against decode, bfloat16": (("chunked", "bfloat16"), ("decode", "bfloat16")),
    "bfloat16 against float32, chunked": (("chunked", "bfloat16"), ("chunked", "float32")),
}
"""Name -> (path, dtype) of either side. The second side of the last one is the truth, and keeps its float32 head."""


@dataclass(frozen=True)
class Head:
    """Probabilities of the next tokens on the two sides of a pair, with one kind of head.

    Attributes:
        correlation: Pearson's, of p(next token); NaN where all of them are the same.
        largest_gap, mean_gap: of |difference of log p(next token)|.
    """

    correlation: float
    largest_gap: float
    mean_gap: float


@dataclass(frozen=True)
class Comparison:
    """One pair.

    Attributes:
        errors: ||a - b|| / ||b|| of each layer's output, then of the head's input.
        largest: largest activation of each, on the second side.
        heads: by dtype of the head.
    """

    errors: list[float]
    largest: list[float]
    heads: dict[str, Head]

    @property
    def culprit(self) -> str:
        """ "head" where its precision makes most of the gap, else "layers"."""
        return "head" if self.heads["bfloat16"].mean_gap > 2 * self.heads["float32"].mean_gap else "layers"


def compare_modes(params: Params, config: ModelConfig, tokens_BT: np.ndarray) -> dict[str, Comparison]:
    """Every pair of `PAIRS` on these tokens.

    Raises:
        UserError: an output is not finite.
    """
    tokens_BT = tokens_BT.astype(np.int32)
    ones_BT = np.ones_like(tokens_BT)
    trees = {dtype: cast(params, config, dtype) for dtype in ("float32", "bfloat16")}
    seen: dict[tuple[str, str], Observation] = {}
    for side in {side for pair in PAIRS.values() for side in pair}:
        path, dtype = side
        tree, dtyped = trees[dtype]
        seen[side] = observe(tree, dtyped, tokens_BT, ones_BT, path)
        _require_finite(seen[side], f"{path}, {dtype}", config)
    result = {}
    for name, (one, other) in PAIRS.items():
        a, b = seen[one], seen[other]
        errors, largest = [], []
        for mine, theirs in zip((*a.output_LBTD, a.final_BTD), (*b.output_LBTD, b.final_BTD), strict=True):
            x, y = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
            errors.append(float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)))
            largest.append(float(np.abs(y).max()))
        heads = {}
        for dtype in HEADS:
            truth = dtype if other[1] == one[1] else "float32"
            p = next_logprobs(logits(trees[one[1]][0], a.final_BTD, dtype), tokens_BT)
            q = next_logprobs(logits(trees[other[1]][0], b.final_BTD, truth), tokens_BT)
            gap = np.abs(p - q)
            heads[dtype] = Head(pearson(np.exp(p), np.exp(q)), float(gap.max()), float(gap.mean()))
        result[name] = Comparison(errors, largest, heads)
    return result


def sampled_tokens(params: Params, config: ModelConfig, rows: int, length: int, seed: int) -> np.ndarray:
    """Tokens that the model itself samples [rows, length], as in a rollout; text of others it finds improbable."""
    from m1jax.rl.engine_local import sample
    from m1jax.types import Sampling

    first = np.random.default_rng(seed).integers(config.vocab_size, size=(rows, 1)).astype(np.int32)
    run: Any = jax.jit(sample, static_argnames=("config", "sampling", "responses", "stop_ids"))
    (ids, *_), _ = run(
        params, first, np.ones_like(first), np.arange(rows, dtype=np.uint32), seed,
        config=config, sampling=Sampling(max_tokens=length - 1), responses=1, stop_ids=(),
    )  # fmt: skip
    return np.concatenate([first, np.asarray(ids)], axis=1)


def with_loud_channel(params: Params, gain: float) -> Params:
    """A proxy of a model with large activations before its head: one channel `gain` times louder.

    Trained models have such channels, and what they add to the logits is much the same for every token: here exactly
    the same, so that exact arithmetic gives the same probabilities with any gain.
    """
    if "head" not in params:
        raise UserError("--head_gain: the head of this model is its embedding, which a loud channel would change too")
    w_DV = params["head"]
    level = jnp.sqrt(jnp.mean(w_DV[0] ** 2))
    scale_D = params["norm_final"]["scale"]
    return {
        **params,
        "head": w_DV.at[0].set(level),
        "norm_final": {"scale": scale_D.at[0].multiply(gain)},
    }


def _require_finite(seen: Observation, side: str, config: ModelConfig) -> None:
    places = [*(f"layer {i} ({kind})" for i, kind in enumerate(config.kinds)), "the last norm", "the head"]
    for place, x in zip(places, (*seen.output_LBTD, seen.final_BTD, seen.logits_BTV), strict=True):
        if not np.isfinite(np.asarray(x, np.float64)).all():
            raise UserError(f"{side}: the output of {place} is not finite, so nothing can be compared")
