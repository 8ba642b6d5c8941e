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
import functools
from functools import partial
from typing import Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from m1jax.mesh import GATHERED, ONE, axes_of
from m1jax.model import cache as cache_lib
from m1jax.model.attention import SoftmaxAttention
from m1jax.model.cache import Cache
from m1jax.model.collectives import gathered, own_part, sum_of_parts
from m1jax.model.config import ModelConfig
from m1jax.model.context import Where, without_cache
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
    def __call__(self, h_MD, slopes_N, cache, recorded_MA, where: Where):
        c = self.config
        u_MD = RMSNorm(c, c.norm_eps, name="norm_attention")(h_MD)
        if self.kind == "lightning":
            alpha, beta = c.lightning_alpha, c.lightning_beta
            y_MD, cache = LightningAttention(c, name="attention")(u_MD, slopes_N, cache, where)
        else:
            alpha, beta = c.softmax_alpha, c.softmax_beta
            y_MD, cache = SoftmaxAttention(c, name="attention")(u_MD, cache, where)
        a_MD = alpha * (u_MD if c.postnorm else h_MD) + beta * y_MD
        v_MD = RMSNorm(c, c.norm_eps, name="norm_mlp")(a_MD)
        mlp = MixtureOfExperts if c.num_experts else DenseMLP
        y_MD, router = mlp(c, name="mlp")(v_MD, where.segment_ids_BT.reshape(-1) > 0, recorded_MA)
        h_MD = c.mlp_alpha * (v_MD if c.postnorm else a_MD) + c.mlp_beta * y_MD
        record(self, "output_MD", h_MD)
        return h_MD, (cache, router)


class Period(nn.Module):
    """The layers of one period, each run of equal kind under its own scan."""

    config: ModelConfig
    drawn: bool = False

    @nn.compact
    def __call__(self, h_MD, slopes_by_run, _, recorded_by_run, where: Where):
        c = self.config
        keep = kept_for_backward(c)
        layer = Layer if keep is None else nn.remat(Layer, prevent_cse=False, policy=keep)
        routers = []
        for i, (kind, count) in enumerate(c.runs):
            run = _scanned(layer, count, "layers", self.drawn)(c, kind, name=f"{i}_{kind}")
            h_MD, (_, router) = run(h_MD, slopes_by_run[i], None, recorded_by_run[i], where)
            routers.append(router)
        return h_MD, tuple(routers)


class Decoder(nn.Module):
    """Embedding, periods, final norm; it owns the head's weight but does not apply it (see `head`)."""

    config: ModelConfig
    drawn: bool = False  # initial parameters are, with their values and not only their shapes

    @nn.compact
    def __call__(self, tokens_BT, recorded_LMA, where: Where):
        c = self.config
        D, V, init = c.hidden_size, c.vocab_size, nn.initializers.normal(c.init_std)
        table_VD = parameter(self, "embedding", (V, D), ("vocab", "embed"), c.param_dtype, init, c.mesh)
        if not c.tied_embeddings:
            parameter(self, "head", (D, V), ("embed", "vocab"), c.param_dtype, init, c.mesh)

        h_MD = embedded(table_VD, tokens_BT, c)
        periods = _scanned(Period, c.num_periods, "periods", self.drawn)(c, self.drawn, name="periods")
        h_MD, routers = periods(h_MD, _slopes_by_run(c), None, _by_run(c, recorded_LMA), where)
        return RMSNorm(c, c.norm_eps, name="norm_final")(h_MD), routers


def _one_after_another(
    params: Params, config: ModelConfig, tokens_BT: Array, recorded_LMA: Any, where: Where, caches: Any, *, traced: bool
) -> tuple[jax.Array, tuple[Any, ...], list[dict[str, jax.Array]]]:
    """What `Decoder` computes, without a scan; `params` from `by_layer`, one cache and one router for each layer."""
    h_MD: Any = embedded(params["embedding"], tokens_BT, config)
    keep = kept_for_backward(config)
    new_caches, routers = [], []
    for i, kind in enumerate(config.kinds):
        layer = partial(Layer(config, kind).apply, mutable=[TRACE] if traced else False)
        if keep is not None:
            layer = jax.checkpoint(layer, policy=keep)
        slopes_N = jnp.asarray(slopes(config.num_heads, i, config.num_layers)) if kind == "lightning" else None
        recorded_MA = None if recorded_LMA is None else recorded_LMA[i]
        result: Any = layer({"params": params["layers"][i]}, h_MD, slopes_N, caches[i], recorded_MA, where)
        (h_MD, (cache, router)), recorded = result if traced else (result, None)
        new_caches.append(cache)
        routers.append(router if recorded is None else _by_name(recorded[TRACE]))
    hidden_MD: Any = RMSNorm(config, config.norm_eps).apply({"params": params["norm_final"]}, h_MD)
    return hidden_MD, tuple(new_caches), routers


def embedded(table_VD: jax.Array, tokens_BT: Array, config: ModelConfig) -> jax.Array:
    """h_MD: the rows of the embedding, of which this device has a part, in the compute dtype."""
    mesh, token_M = config.mesh, tokens_BT.reshape(-1)
    if mesh.along(GATHERED) > 1:
        table_VD = gathered(table_VD, ("vocab", "embed"), mesh, config.dtype)
    if mesh.tensor > 1:
        token_M = token_M - jax.lax.axis_index("tensor") * len(table_VD)
        elsewhere_M1 = ((token_M < 0) | (token_M >= len(table_VD)))[:, None]
        h_MD = jnp.where(elsewhere_M1, 0, table_VD[jnp.clip(token_M, 0, len(table_VD) - 1)])
    else:
        h_MD = table_VD[token_M]
    return sum_of_parts(h_MD.astype(config.dtype), mesh)


def kept_for_backward(config: ModelConfig) -> Any:
    """The policy of `jax.checkpoint` for a layer; None where nothing is computed again."""
    policies = jax.checkpoint_policies
    if config.remat == "none":
        return _all_but_gathered_weights if config.mesh.along(GATHERED) > 1 else None
    return policies.nothing_saveable if config.remat == "layer" else policies.dots_with_no_batch_dims_saveable


def _all_but_gathered_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """A weight that was gathered is not kept, nor what is only another view of it: they would be the whole model."""
    return primitive.name not in ("all_gather", "reshape", "convert_element_type", "transpose", "slice", "squeeze")


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


def _scanned(module: Any, length: int, axis_name: str, drawn: bool) -> Any:
    return nn.scan(
        module,
        length=length,
        variable_axes={"params": 0, TRACE: 0},
        split_rngs={"params": True},
        in_axes=(0, 0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # one per argument is fine
        # A check that traces everything once more, here twice nested: four times. Initial parameters are drawn with it,
        # since a seed would draw others without.
        check_constancy_invariants=drawn,
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


def _boxed_init(key: jax.Array, config: ModelConfig, drawn: bool) -> Any:
    one_BT, config = jnp.ones((1, 1), jnp.int32), dataclasses.replace(config, mesh=ONE)  # of whole parameters
    return Decoder(config, drawn).init(key, one_BT, None, without_cache(one_BT, config.mesh))["params"]


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Parameters drawn N(0, init_std), norms 1, as a tree of plain arrays stacked [periods, run, ...]."""
    return nn.meta.unbox(_boxed_init(key, config, drawn=True))


@functools.cache
def _boxed_shapes(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda key: _boxed_init(key, config, drawn=False), jax.random.key(0))


def shapes(config: ModelConfig) -> Params:
    """The tree of `init` with shape and dtype of every parameter; nothing is drawn."""
    return nn.meta.unbox(_boxed_shapes(config))


@functools.cache
def logical_axes(config: ModelConfig) -> Any:
    """The tree of `init` with, for every parameter, its PartitionSpec of logical axis names."""
    return nn.get_partition_spec(_boxed_shapes(config))


def parameter_specs(config: ModelConfig) -> Any:
    """The tree of `init` with, for every parameter, its PartitionSpec over the axes of a mesh (`m1jax.mesh.RULES`)."""
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda dims: PartitionSpec(*axes_of(dims)), logical_axes(config), is_leaf=is_spec)


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

        Where the tokens of a row are dealt out (`config.mesh.context`), these are of this device's part of T.
    """
    return _run(params, config, tokens_BT, segment_ids_BT, cache, expert_ids_BTLA, traced=False)


def _run(params, config: ModelConfig, tokens_BT, segment_ids_BT, cache, expert_ids_BTLA=None, *, traced: bool):
    """(hidden_MD, cache, what the routers or, traced, the modules tell of themselves), in order of layers."""
    recorded_LMA = None
    if expert_ids_BTLA is not None:
        recorded_LMA = jnp.moveaxis(expert_ids_BTLA.reshape(-1, *expert_ids_BTLA.shape[2:]), 1, 0)
    if cache is None:
        where, caches = without_cache(segment_ids_BT, config.mesh), (None,) * config.num_layers
        tokens_BT, recorded_LMA = _own_tokens(tokens_BT, recorded_LMA, config)
    else:
        first_slot = cache.next_slot
        cache, positions_BT = cache_lib.claim_slots(cache, segment_ids_BT)
        where = Where(positions_BT, segment_ids_BT, cache.slot_positions, cache.slot_segments, first_slot)
        caches = cache.layers
    if cache is None and config.scan_layers and "layers" not in params:
        result: Any = Decoder(config).apply(
            {"params": params}, tokens_BT, recorded_LMA, where, mutable=[TRACE] if traced else False
        )
        (hidden_MD, routers), recorded = result if traced else (result, None)
        if recorded is not None:
            routers = [_by_name(recorded[TRACE]["periods"][f"{i}_{kind}"]) for i, (kind, _) in enumerate(config.runs)]
        # Trees of [periods, run, ...] as one of [L, ...].
        join = lambda *parts: jnp.concatenate(parts, axis=1).reshape(-1, *parts[0].shape[2:])  # noqa: E731
        return hidden_MD, None, jax.tree.map(join, *routers)
    hidden_MD, layers, routers = _one_after_another(
        by_layer(params, config), config, tokens_BT, recorded_LMA, where, caches, traced=traced
    )
    if cache is not None:
        cache = dataclasses.replace(cache, layers=layers)
    return hidden_MD, cache, jax.tree.map(lambda *rows: jnp.stack(rows), *routers)


def _own_tokens(tokens_BT: Array, recorded_LMA: Any, config: ModelConfig) -> tuple[Any, Any]:
    """This device's part of tokens, and of the experts that have to serve them."""
    mesh, (B, T) = config.mesh, tokens_BT.shape
    if recorded_LMA is not None:
        L, _, A = recorded_LMA.shape
        recorded_LMA = own_part(recorded_LMA.reshape(L, B, T, A), "context", mesh, 2).reshape(L, -1, A)
    return own_part(jnp.asarray(tokens_BT), "context", mesh, 1), recorded_LMA


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


def head(params: Params, hidden_MD: jax.Array) -> jax.Array:
    """logits_MV, weights and product in at least float32 whatever the model's dtype.

    MiniMax-M1 (section 3.2) traced the gap between trainer and engine probabilities to a bfloat16 head.
    """
    w_DV = at_least_float32(head_weight(params))
    return jnp.dot(at_least_float32(hidden_MD), w_DV, precision=jax.lax.Precision.HIGHEST)


def head_weight(params: Params) -> jax.Array:
    """The LM head [D, V] as it is stored: its own, or the embedding where the two are tied."""
    return params["head"] if "head" in params else params["embedding"].T
