"""Every tensor of a Hugging Face folder: its name, its shape, and where it lies in our parameter tree.

A tensor of theirs is torch's (out, in) matrix of one layer (of one expert); a leaf of ours stacks the layers as
[periods, run, (experts,) in, ...]. So a tensor is a leaf at an index, transposed and reshaped, in both directions:

    model.layers.9.self_attn.qkv_proj.weight    (N * 3 * H, D)
        = periods/0_lightning/attention/qkv     [periods, 7, D, N, 3, H] at [1, 1]

This file knows names and shapes; it reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from m1jax.model.config import ModelConfig

IGNORED = re.compile(
    r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay|rotary_emb\.inv_freq)"
)
"""Buffers that Transformers saves beside the weights. They follow from the config, and may be rounded to bfloat16."""


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the folder.

    Attributes:
        name: its original name.
        shape: its shape there, torch's (out, in) for a matrix.
        leaf: path of the leaf of ours that holds it.
        index: its place in the leaf's leading (periods, run, expert) axes.
        tail: shape of the leaf at that index.
        transposed: whether (out, in) becomes (in, out).
        wide: at least float32 whatever the rest is; a router gate is.
    """

    name: str
    shape: tuple[int, ...]
    leaf: tuple[str, ...]
    index: tuple[int, ...]
    tail: tuple[int, ...]
    transposed: bool
    wide: bool = False

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """The values as they lie in the leaf, contiguous."""
        return np.ascontiguousarray(array.T if self.transposed else array).reshape(self.tail)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """`to_ours` undone."""
        shape = self.shape[::-1] if self.transposed else self.shape
        array = array.reshape(shape)
        return np.ascontiguousarray(array.T) if self.transposed else array


def hf_tensors(config: ModelConfig) -> list[HFTensor]:
    """All tensors of a folder for this decoder, in the order of its layers."""
    return list(_tensors(config))


def leaf_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every leaf of `transformer.init`, by path."""
    ranges: dict[tuple[str, ...], HFTensor] = {}
    for tensor in _tensors(config):  # the last tensor of a leaf has its largest index
        ranges[tensor.leaf] = tensor
    return {
        leaf: (tuple(i + 1 for i in last.index) + last.tail, tensor_dtype(last, config.param_dtype))
        for leaf, last in ranges.items()
    }


def tensor_dtype(tensor: HFTensor, dtype: str) -> np.dtype:
    """The dtype of a tensor in a model stored as `dtype`."""
    named = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.promote_types(named, np.float32) if tensor.wide else named


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """{path: leaf} as nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _tensors(c: ModelConfig) -> Iterator[HFTensor]:
    D, V = c.hidden_size, c.vocab_size
    yield HFTensor("model.embed_tokens.weight", (V, D), ("embedding",), (), (V, D), False)
    for layer in range(c.num_layers):
        yield from _layer(c, layer)
    yield HFTensor("model.norm.weight", (D,), ("norm_final", "scale"), (), (D,), False)
    if not c.tied_embeddings:
        yield HFTensor("lm_head.weight", (V, D), ("head",), (), (D, V), True)


def _layer(c: ModelConfig, layer: int) -> Iterator[HFTensor]:
    period, place = divmod(layer, len(c.layer_pattern))
    run = first = 0
    for i, (_, count) in enumerate(c.runs):
        if place < first + count:
            run = i
            break
        first += count
    kind, _ = c.runs[run]
    index, room = (period, place - first), ("periods", f"{run}_{kind}")
    D, N, K, H, E, F = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.num_experts, c.expert_dim

    def vector(name: str, leaf: tuple[str, ...], *tail: int) -> HFTensor:
        shape = (int(np.prod(tail)),)
        return HFTensor(f"model.layers.{layer}.{name}", shape, room + leaf, index, tail, False)

    def matrix(name: str, leaf: tuple[str, ...], tail: tuple[int, ...], outputs: int, **more: Any) -> HFTensor:
        shape = (outputs, int(np.prod(tail)) // outputs)
        at = index + more.pop("expert", ())
        return HFTensor(f"model.layers.{layer}.{name}.weight", shape, room + leaf, at, tail, True, **more)

    yield vector("input_layernorm.weight", ("norm_attention", "scale"), D)
    if kind == "lightning":
        yield matrix("self_attn.qkv_proj", ("attention", "qkv"), (D, N, 3, H), N * 3 * H)
        yield matrix("self_attn.output_gate", ("attention", "gate"), (D, N, H), N * H)
        yield matrix("self_attn.out_proj", ("attention", "out"), (N, H, D), D)
        yield vector("self_attn.norm.weight", ("attention", "norm", "scale"), N * H)
    else:
        for ours, letter, heads in (("query", "q", N), ("key", "k", K), ("value", "v", K)):
            yield matrix(f"self_attn.{letter}_proj", ("attention", ours), (D, heads, H), heads * H)
            if c.qkv_bias:
                yield vector(f"self_attn.{letter}_proj.bias", ("attention", f"{ours}_bias"), heads, H)
        yield matrix("self_attn.o_proj", ("attention", "out"), (N, H, D), D)
    yield vector("post_attention_layernorm.weight", ("norm_mlp", "scale"), D)
    if E:
        yield matrix("block_sparse_moe.gate", ("mlp", "router"), (D, E), E, wide=True)
        for e in range(E):
            name = f"block_sparse_moe.experts.{e}"
            yield matrix(f"{name}.w1", ("mlp", "gate"), (D, F), F, expert=(e,))
            yield matrix(f"{name}.w3", ("mlp", "up"), (D, F), F, expert=(e,))
            yield matrix(f"{name}.w2", ("mlp", "down"), (F, D), D, expert=(e,))
    else:
        yield matrix("mlp.gate_proj", ("mlp", "gate"), (D, F), F)
        yield matrix("mlp.up_proj", ("mlp", "up"), (D, F), F)
        yield matrix("mlp.down_proj", ("mlp", "down"), (F, D), D)
