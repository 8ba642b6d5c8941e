"""The decoder: embedding, periods of lightning and softmax layers under a scan, final norm, float32 head.

Pure functions over a parameter tree:

    params = init(key, config)
    hidden_MD, cache, router = hidden_states(params, config, tokens_BT, segment_ids_BT)        # training
    hidden_MD, cache, router = hidden_states(params, config, tokens_BT, segment_ids_BT, cache) # prefill and decode
    logits_MV = head(params, hidden_MD)

One layer, post-norm with DeepNorm weights (the residual carries the *normalised* tensor, so no raw skip path crosses
the stack and the embedding is normalised before layer 0):

    u  = RMSNorm(h);   a  = alpha * u + beta * Attention(u)
    v  = RMSNorm(a);   h' = alpha * v + beta * MLP(v)

With `postnorm` False the residual is h and a: the pre-norm layer of Qwen2 and Llama.

Parameters are stacked, so that training scans over equal layers and compiles one of them. With a cache the layers run
one after another on their own slices: a scan would copy every weight and every cache at every decoded token.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from m1jax.model import cache as cache_lib
from m1jax.model.attention import SoftmaxAttention
from m1jax.model.cache import Cache
from m1jax.model.config import ModelConfig
from m1jax.model.layers import TRACE, RMSNorm, at_least_float32, parameter, record
from m1jax.model.lightning import LightningAttention
from m1jax.model.moe import DenseMLP, MixtureOfExperts
from m1jax.pallas_kernels.lightning_attention.slopes import slopes
from m1jax.types import Array, Params


class Layer(nn.Module):
    """One decoder layer of the given kind.

    Of h_MD, its slopes, its part of the cache or None, the experts that have to serve or None, what all layers share.
    """

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, h_MD, slopes_N, cache, recorded_MA, context):
        c = self.config
        positions_BT, segment_ids_BT, slots = context
        u_MD = RMSNorm(c, c.norm_eps, name="norm_attention")(h_MD)
        if self.kind == "lightning":
            alpha, beta = c.lightning_alpha, c.lightning_beta
            y_MD, cache = LightningAttention(c, name="attention")(u_MD, slopes_N, cache, segment_ids_BT)
        else:
            alpha, beta = c.softmax_alpha, c.softmax_beta
            y_MD, cache = SoftmaxAttention(c, name="attention")(u_MD, cache, positions_BT, segment_ids_BT, slots)
        a_MD = alpha * (u_MD if c.postnorm else h_MD) + beta * y_MD
        v_MD = RMSNorm(c, c.norm_eps, name="norm_mlp")(a_MD)
        mlp = MixtureOfExperts if c.num_experts else DenseMLP
        y_MD, router = mlp(c, name="mlp")(v_MD, segment_ids_BT.reshape(-1) > 0, recorded_MA)
        h_MD = c.mlp_alpha * (v_MD if c.postnorm else a_MD) + c.mlp_beta * y_MD
        record(self, "output_MD", h_MD)
        return h_MD, (cache, router)


class Period(nn.Module):
    """The layers of one period, each run of equal kind under its own scan."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h_MD, slopes_by_run, _, recorded_by_run, context):
        c = self.config
        layer = nn.remat(Layer, prevent_cse=False) if c.remat == "layer" else Layer
        routers = []
        for i, (kind, count) in enumerate(c.runs):
            run = _scanned(layer, count, "layers")(c, kind, name=f"{i}_{kind}")
            h_MD, (_, router) = run(h_MD, slopes_by_run[i], None, recorded_by_run[i], context)
            routers.append(router)
        return h_MD, tuple(routers)


class Decoder(nn.Module):
    """Embedding, periods, final norm; it owns the head's weight but does not apply it (see `head`)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT, recorded_LMA, context):
        c = self.config
        D, V, init = c.hidden_size, c.vocab_size, nn.initializers.normal(c.init_std)
        table_VD = parameter(self, "embedding", (V, D), ("vocab", "embed"), c.param_dtype, init)
        if not c.tied_embeddings:
            parameter(self, "head", (D, V), ("embed", "vocab"), c.param_dtype, init)

        h_MD = table_VD[tokens_BT.reshape(-1)].astype(c.dtype)
        periods = _scanned(Period, c.num_periods, "periods")(c, name="periods")
        h_MD, routers = periods(h_MD, _slopes_by_run(c), None, _by_run(c, recorded_LMA), context)
        return RMSNorm(c, c.norm_eps, name="norm_final")(h_MD), routers


def _one_after_another(
    params: Params, config: ModelConfig, tokens_BT: Array, recorded_LMA: Any, context: Any, caches: Any, *, traced: bool
) -> tuple[jax.Array, tuple[Any, ...], list[dict[str, jax.Array]]]:
    """What `Decoder` computes, without a scan; `params` from `by_layer`, one cache and one router for each layer."""
    h_MD: Any = params["embedding"][tokens_BT.reshape(-1)].astype(config.dtype)
    new_caches, routers = [], []
    for i, kind in enumerate(config.kinds):
        layer = partial(Layer(config, kind).apply, mutable=[TRACE] if traced else False)
        if config.remat == "layer":
            layer = jax.checkpoint(layer)
        slopes_N = jnp.asarray(slopes(config.num_heads, i, config.num_layers)) if kind == "lightning" else None
        recorded_MA = None if recorded_LMA is None else recorded_LMA[i]
        result: Any = layer({"params": params["layers"][i]}, h_MD, slopes_N, caches[i], recorded_MA, context)
        (h_MD, (cache, router)), recorded = result if traced else (result, None)
        new_caches.append(cache)
        routers.append(router if recorded is None else _by_name(recorded[TRACE]))
    hidden_MD: Any = RMSNorm(config, config.norm_eps).apply({"params": params["norm_final"]}, h_MD)
    return hidden_MD, tuple(new_caches), routers


def by_layer(params: Params, config: ModelConfig) -> Params:
    """`params` with "layers", the tree of every layer in order, in place of the stacked "periods".

    `hidden_states` takes either. It copies every weight once, so a loop over tokens does it before it begins.
    """
    if "layers" in params:
        return params
    runs = []
    for i, (kind, count) in enumerate(config.runs):
        leaves, tree = jax.tree.flatten(params["periods"][f"{i}_{kind}"])
        # A split, because the gradient of one is a concatenation, and that of slices a sum of padded arrays.
        sizes = (1,) * (config.num_periods * count)
        split = [jax.lax.split(x.reshape(-1, *x.shape[2:]), sizes) for x in leaves]
        one_by_one = [tree.unflatten([x.reshape(x.shape[1:]) for x in layer]) for layer in zip(*split, strict=True)]
        runs.append([one_by_one[p * count : (p + 1) * count] for p in range(config.num_periods)])
    layers = tuple(layer for period in zip(*runs, strict=True) for run in period for layer in run)
    return {**{name: x for name, x in params.items() if name != "periods"}, "layers": layers}


def _scanned(module: Any, length: int, axis_name: str) -> Any:
    return nn.scan(
        module,
        length=length,
        variable_axes={"params": 0, TRACE: 0},
        split_rngs={"params": True},
        in_axes=(0, 0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # one per argument is fine
        metadata_params={nn.PARTITION_NAME: axis_name},
    )


def _slopes_by_run(config: ModelConfig) -> tuple[jax.Array | None, ...]:
    """Per run the decay slopes [periods, run, N] by *global* layer index, None for softmax runs."""
    first, table = 0, []
    for kind, count in config.runs:
        if kind == "softmax":
            table.append(None)
        else:
            layer_index = [
                [period * len(config.layer_pattern) + first + i for i in range(count)]
                for period in range(config.num_periods)
            ]
            rows = [[slopes(config.num_heads, i, config.num_layers) for i in row] for row in layer_index]
            table.append(jnp.asarray(np.array(rows)))
        first += count
    return tuple(table)


def _by_run(config: ModelConfig, x_L: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """[L, ...] as one [periods, run, ...] for each run."""
    if x_L is None:
        return (None,) * len(config.runs)
    ends = np.cumsum([count for _, count in config.runs])
    return tuple(jnp.split(x_L.reshape(config.num_periods, -1, *x_L.shape[1:]), ends[:-1], axis=1))


def _boxed_init(key: jax.Array, config: ModelConfig) -> Any:
    one_BT = jnp.ones((1, 1), jnp.int32)
    return Decoder(config).init(key, one_BT, None, (one_BT, one_BT, None))["params"]


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Parameters drawn N(0, init_std), norms 1, as a tree of plain arrays stacked [periods, run, ...]."""
    return nn.meta.unbox(_boxed_init(key, config))


def logical_axes(config: ModelConfig) -> Any:
    """The tree of `init` with, for every parameter, its PartitionSpec of logical axis names."""
    return nn.get_partition_spec(jax.eval_shape(lambda key: _boxed_init(key, config), jax.random.key(0)))


@overload
def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    segment_ids_BT: Array,
    cache: Cache,
    expert_ids_BTLA: Array | None = None,
) -> tuple[jax.Array, Cache, dict[str, jax.Array]]: ...


@overload
def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    segment_ids_BT: Array,
    cache: None = None,
    expert_ids_BTLA: Array | None = None,
) -> tuple[jax.Array, None, dict[str, jax.Array]]: ...


def hidden_states(params, config, tokens_BT, segment_ids_BT, cache=None, expert_ids_BTLA=None):
    """Run the decoder up to the final norm.

    Args:
        params: from `init`, or from `by_layer`.
        config: the same that made `params`.
        tokens_BT: int32 token ids.
        segment_ids_BT: int32, 0 on padding, else the packed segment's number. With a cache: 0 or 1.
        cache: memory of the rows' earlier tokens, or None to start (and end) without one.
        expert_ids_BTLA: integers, the experts that serve each token in each layer in place of the router's choice
            (`replay` of `m1jax.pallas_kernels.moe.router`), -1 where it chooses itself. None: everywhere.

    Returns:
        hidden_MD [B * T, D] in the compute dtype, the grown cache (None without one), and what the routers did, layers
        first: the sums over live tokens of `routing_sums` (same file), [L] or [L, E], which add up over micro-batches
        and devices, and "expert_ids" int32 [L, B * T, A], their own choice, best first. {} for a dense model.
    """
    return _run(params, config, tokens_BT, segment_ids_BT, cache, expert_ids_BTLA, traced=False)


def _run(params, config: ModelConfig, tokens_BT, segment_ids_BT, cache, expert_ids_BTLA=None, *, traced: bool):
    """(hidden_MD, cache, what the routers or, traced, the modules tell of themselves), in order of layers."""
    recorded_LMA = None
    if expert_ids_BTLA is not None:
        recorded_LMA = jnp.moveaxis(expert_ids_BTLA.reshape(-1, *expert_ids_BTLA.shape[2:]), 1, 0)
    if cache is None:
        context, caches = (positions_in_segments(segment_ids_BT), segment_ids_BT, None), (None,) * config.num_layers
    else:
        first_slot = cache.next_slot
        cache, positions_BT = cache_lib.claim_slots(cache, segment_ids_BT)
        context = positions_BT, segment_ids_BT, (first_slot, cache.slot_positions, cache.slot_segments)
        caches = cache.layers
    if cache is None and config.scan_layers and "layers" not in params:
        result: Any = Decoder(config).apply(
            {"params": params}, tokens_BT, recorded_LMA, context, mutable=[TRACE] if traced else False
        )
        (hidden_MD, routers), recorded = result if traced else (result, None)
        if recorded is not None:
            routers = [_by_name(recorded[TRACE]["periods"][f"{i}_{kind}"]) for i, (kind, _) in enumerate(config.runs)]
        # Trees of [periods, run, ...] as one of [L, ...].
        join = lambda *parts: jnp.concatenate(parts, axis=1).reshape(-1, *parts[0].shape[2:])  # noqa: E731
        return hidden_MD, None, jax.tree.map(join, *routers)
    hidden_MD, layers, routers = _one_after_another(
        by_layer(params, config), config, tokens_BT, recorded_LMA, context, caches, traced=traced
    )
    if cache is not None:
        cache = dataclasses.replace(cache, layers=layers)
    return hidden_MD, cache, jax.tree.map(lambda *rows: jnp.stack(rows), *routers)


def _by_name(recorded: Any) -> dict[str, jax.Array]:
    """What the modules of a layer recorded, as `trace` names it."""
    flat = {**recorded, **recorded.get("mlp", {})}
    return {"_L".join(name.rsplit("_", 1)): x for name, x in flat.items() if name != "mlp"}


def trace(
    params: Params, config: ModelConfig, tokens_BT: Array, segment_ids_BT: Array, cache: Cache | None = None
) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
    """`hidden_states` with what happens inside: (hidden_MD, cache, layers), every array with the layers first.

    `layers` holds output_LMD, the raw output of each layer, and of a mixture of experts router_probabilities_LME
    (at least float32).
    """
    return _run(params, config, tokens_BT, segment_ids_BT, cache, traced=True)


def positions_in_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: each token's distance from its segment's start, counted in live tokens."""
    live_BT = segment_ids_BT > 0
    before_BT = jnp.cumsum(live_BT, axis=1, dtype=jnp.int32) - live_BT
    starts_BT = segment_ids_BT != jnp.pad(segment_ids_BT, ((0, 0), (1, 0)))[:, :-1]
    origin_BT = jax.lax.cummax(jnp.where(starts_BT & live_BT, before_BT, 0), axis=1)
    return (before_BT - origin_BT).astype(jnp.int32)


def head(params: Params, hidden_MD: jax.Array) -> jax.Array:
    """logits_MV, weights and product in at least float32 whatever the model's dtype.

    MiniMax-M1 (section 3.2) traced the gap between trainer and engine probabilities to a bfloat16 head.
    """
    w_DV = at_least_float32(head_weight(params))
    return jnp.dot(at_least_float32(hidden_MD), w_DV, precision=jax.lax.Precision.HIGHEST)


def head_weight(params: Params) -> jax.Array:
    """The LM head [D, V] as it is stored: its own, or the embedding where the two are tied."""
    return params["head"] if "head" in params else params["embedding"].T
