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
"""

from __future__ import annotations

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
    """One decoder layer of the given kind. Carry h_MD; per layer its slopes and its part of the cache."""

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, h_MD, slopes_N, cache, context):
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
        y_MD, router = mlp(c, name="mlp")(v_MD, segment_ids_BT.reshape(-1) > 0)
        h_MD = c.mlp_alpha * (v_MD if c.postnorm else a_MD) + c.mlp_beta * y_MD
        record(self, "output_MD", h_MD)
        return h_MD, (cache, router)


class Period(nn.Module):
    """The layers of one period, each run of equal kind under its own scan."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h_MD, slopes_by_run, cache_by_run, context):
        c = self.config
        layer = nn.remat(Layer, prevent_cse=False) if c.remat == "layer" else Layer
        caches, routers = [], []
        for i, (kind, count) in enumerate(c.runs):
            run = _scanned(layer, count, "layers")(c, kind, name=f"{i}_{kind}")
            h_MD, (cache, router) = run(h_MD, slopes_by_run[i], cache_by_run[i], context)
            caches.append(cache)
            routers.append(router)
        return h_MD, (tuple(caches), tuple(routers))


class Decoder(nn.Module):
    """Embedding, periods, final norm; it owns the head's weight but does not apply it (see `head`)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT, context, cache_by_run):
        c = self.config
        D, V, init = c.hidden_size, c.vocab_size, nn.initializers.normal(c.init_std)
        table_VD = parameter(self, "embedding", (V, D), ("vocab", "embed"), c.param_dtype, init)
        if not c.tied_embeddings:
            parameter(self, "head", (D, V), ("embed", "vocab"), c.param_dtype, init)

        h_MD = table_VD[tokens_BT.reshape(-1)].astype(c.dtype)
        periods = _scanned(Period, c.num_periods, "periods")(c, name="periods")
        h_MD, (caches, routers) = periods(h_MD, _slopes_by_run(c), cache_by_run, context)
        return RMSNorm(c, c.norm_eps, name="norm_final")(h_MD), caches, routers


def _scanned(module: Any, length: int, axis_name: str) -> Any:
    return nn.scan(
        module,
        length=length,
        variable_axes={"params": 0, TRACE: 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # one per argument is fine
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


def _boxed_init(key: jax.Array, config: ModelConfig) -> Any:
    one_BT = jnp.ones((1, 1), jnp.int32)
    context = (one_BT, one_BT, None)
    return Decoder(config).init(key, one_BT, context, (None,) * len(config.runs))["params"]


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Parameters drawn N(0, init_std), norms 1, as a tree of plain arrays stacked [periods, run, ...]."""
    return nn.meta.unbox(_boxed_init(key, config))


def logical_axes(config: ModelConfig) -> Any:
    """The tree of `init` with, for every parameter, its PartitionSpec of logical axis names."""
    return nn.get_partition_spec(jax.eval_shape(lambda key: _boxed_init(key, config), jax.random.key(0)))


@overload
def hidden_states(
    params: Params, config: ModelConfig, tokens_BT: Array, segment_ids_BT: Array, cache: Cache
) -> tuple[jax.Array, Cache, dict[str, jax.Array]]: ...


@overload
def hidden_states(
    params: Params, config: ModelConfig, tokens_BT: Array, segment_ids_BT: Array, cache: None = None
) -> tuple[jax.Array, None, dict[str, jax.Array]]: ...


def hidden_states(params, config, tokens_BT, segment_ids_BT, cache=None):
    """Run the decoder up to the final norm.

    Args:
        params: from `init`.
        config: the same that made `params`.
        tokens_BT: int32 token ids.
        segment_ids_BT: int32, 0 on padding, else the packed segment's number. With a cache: 0 or 1.
        cache: memory of the rows' earlier tokens, or None to start (and end) without one.

    Returns:
        hidden_MD [B * T, D] in the compute dtype, the grown cache (None without one), and router statistics averaged
        over layers: {"balance_loss": [], "expert_load": [E]}.
    """
    hidden_MD, cache, routers = _run(params, config, tokens_BT, segment_ids_BT, cache, traced=False)
    return hidden_MD, cache, jax.tree.map(lambda x: x.mean(axis=0), routers)


def _run(params, config: ModelConfig, tokens_BT, segment_ids_BT, cache, *, traced: bool):
    """(hidden_MD, cache, per layer the router statistics or, traced, what the modules record), in order of layers."""
    if cache is None:
        positions_BT = positions_in_segments(segment_ids_BT)
        context, by_run = (positions_BT, segment_ids_BT, None), (None,) * len(config.runs)
    else:
        first_slot = cache.next_slot
        cache, positions_BT = cache_lib.claim_slots(cache, segment_ids_BT)
        slots = (first_slot, cache.slot_positions, cache.slot_segments)
        context, by_run = (positions_BT, segment_ids_BT, slots), cache.layers
    result: Any = Decoder(config).apply(
        {"params": params}, tokens_BT, context, by_run, mutable=[TRACE] if traced else False
    )
    (hidden_MD, layers, routers), recorded = result if traced else (result, None)
    if cache is not None:
        cache = Cache(layers, cache.slot_positions, cache.slot_segments, cache.next_slot, cache.lengths)
    if recorded is not None:
        routers = [
            {"_L".join(name.rsplit("_", 1)): x for name, x in {**run, **run.get("mlp", {})}.items() if name != "mlp"}
            for run in (recorded[TRACE]["periods"][f"{i}_{kind}"] for i, (kind, _) in enumerate(config.runs))
        ]
    return hidden_MD, cache, _in_order(routers)


def _in_order(runs: Any) -> Any:
    """Trees of [periods, run, ...] as one of [L, ...], layers in their order."""
    join = lambda *parts: jnp.concatenate(parts, axis=1).reshape(-1, *parts[0].shape[2:])  # noqa: E731
    return jax.tree.map(join, *runs)


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
