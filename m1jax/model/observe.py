"""Everything that a decoder computes on the way from tokens to logits, by each of the paths that should agree.

    chunked   the training forward: whole sequences, nothing remembered between calls
    packed    the same with all sequences in one row, told apart by their segments
    prefill   the same as the first call with an empty cache, which keeps the lightning states
    decode    token by token through the cache, as the rollout engine goes

Two implementations of one model, or two precisions of it, are compared by what this file returns
(experiments/compare_layers.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from m1jax.model import cache as cache_lib
from m1jax.model.cache import Cache
from m1jax.model.config import ModelConfig
from m1jax.model.transformer import head, head_weight, trace
from m1jax.types import Array, Params

Path = Literal["chunked", "packed", "prefill", "decode"]
PATHS: tuple[Path, ...] = ("chunked", "packed", "prefill", "decode")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """What was computed for B sequences of T tokens in L layers; positions of padding hold nothing of meaning.

    Attributes:
        output_LBTD: raw output of each layer, before any following norm.
        final_BTD: output of the last norm, which the head reads.
        logits_BTV: at least float32, whatever dtype the head was computed in.
        router_probabilities_LBTE: softmax of the router over all experts, or None in a dense model.
        states: lightning states after all tokens [lightning layers, B, N, H, H], or None where the path keeps none.
    """

    output_LBTD: jax.Array
    final_BTD: jax.Array
    logits_BTV: jax.Array
    router_probabilities_LBTE: jax.Array | None
    states: jax.Array | None


@partial(jax.jit, static_argnames=("config", "path", "head_dtype"))
def observe(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    segment_ids_BT: Array,
    path: Path = "chunked",
    head_dtype: str = "float32",
) -> Observation:
    """Run `tokens_BT` along one path.

    Args:
        params, config: the decoder.
        tokens_BT: int32.
        segment_ids_BT: int32, 1 on tokens and 0 on padding, which may stand on either side.
        path: see the top of the file.
        head_dtype: "float32", what m1jax trains and samples with, or "bfloat16": weights, inputs and logits rounded,
            as the released code computes them.
    """
    B, T = tokens_BT.shape
    cache: Cache | None = None
    if path == "decode":
        final_BTD, cache, layers = _decode(params, config, tokens_BT, segment_ids_BT)
    elif path == "packed":
        rows = jnp.arange(1, B + 1)[:, None] * (segment_ids_BT > 0)
        final_MD, _, layers = trace(params, config, tokens_BT.reshape(1, B * T), rows.reshape(1, B * T))
        final_BTD, layers = final_MD.reshape(B, T, -1), _rows(layers, B)
    else:
        cache = cache_lib.empty(config, B, T) if path == "prefill" else None
        final_MD, cache, layers = trace(params, config, tokens_BT, segment_ids_BT, cache)
        final_BTD, layers = final_MD.reshape(B, T, -1), _rows(layers, B)
    return Observation(
        output_LBTD=layers["output_LMD"],
        final_BTD=final_BTD,
        logits_BTV=logits(params, final_BTD, head_dtype),
        router_probabilities_LBTE=layers.get("router_probabilities_LME"),
        states=None if cache is None else _states(cache),
    )


def logits(params: Params, final_BTD: jax.Array, head_dtype: str = "float32") -> jax.Array:
    """logits_BTV by a head of the given precision, widened to at least float32."""
    B, T, D = final_BTD.shape
    final_MD = final_BTD.reshape(B * T, D)
    if head_dtype == "bfloat16":
        logits_MV = final_MD.astype(jnp.bfloat16) @ head_weight(params).astype(jnp.bfloat16)
        logits_MV = logits_MV.astype(jnp.float32)
    else:
        logits_MV = head(params, final_MD)
    return logits_MV.reshape(B, T, -1)


def _rows(layers: dict[str, jax.Array], B: int) -> dict[str, jax.Array]:
    """[L, B * T, ...] as [L, B, T, ...]."""
    return {name: x.reshape(x.shape[0], B, -1, x.shape[-1]) for name, x in layers.items()}


def _decode(params, config, tokens_BT, segment_ids_BT):
    def step(cache, column):
        token_B, segment_B = column
        final_BD, cache, layers = trace(params, config, token_B[:, None], segment_B[:, None], cache)
        return cache, (final_BD, layers)

    B, T = tokens_BT.shape
    cache = cache_lib.empty(config, B, T)
    cache, (final_TBD, layers) = jax.lax.scan(step, cache, (jnp.asarray(tokens_BT).T, jnp.asarray(segment_ids_BT).T))
    layers = {name: jnp.moveaxis(x, 0, 2) for name, x in layers.items()}  # [T, L, B, ...] as [L, B, T, ...]
    return jnp.swapaxes(final_TBD, 0, 1), cache, layers


def _states(cache: Cache) -> jax.Array | None:
    """The lightning states in order of layers."""
    kept = [layer["state"] for layer in cache.layers if "state" in layer]
    return jnp.stack(kept) if kept else None
