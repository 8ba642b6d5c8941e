"""Tensors under their original names, straight into our sharded arrays: one tensor in host memory at a time.

params = load_params(HFFolder(path), config)                        # whole, on the first device
params = load_params(HFFolder(path), config, shardings)             # every process reads what its devices hold
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m1jax.model.config import ModelConfig
from m1jax.types import Params
from m1jax.weights.hf_folder import Source
from m1jax.weights.hf_names import hf_tensors, leaf_shapes, unflatten


def load_params(
    source: Source,
    config: ModelConfig,
    shardings: Any = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Params:
    """The parameter tree of `transformer.init` with the values of `source`, in `config.param_dtype`.

    Args:
        source: an `HFFolder`, or anything that reads tensors by their original names.
        config: its decoder.
        shardings: one sharding for all leaves, or a tree of them; None is the first device.
        progress: called with the bytes of every tensor read.
    """
    targets = {leaf: _Target(*target) for leaf, target in leaf_targets(config, shardings).items()}
    for tensor in hf_tensors(config):
        target = targets[tensor.leaf]
        if target.holds(tensor.index):
            array = source.read(tensor.name)
            progress(array.nbytes)
            target.put(tensor.index, tensor.to_ours(array))
    return unflatten({leaf: target.finish() for leaf, target in targets.items()})


def leaf_targets(
    config: ModelConfig, shardings: Any = None
) -> dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype, jax.sharding.Sharding]]:
    """Shape, dtype and sharding of every leaf, by path; `shardings` as in `load_params`."""
    shapes = leaf_shapes(config)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        by_leaf = dict.fromkeys(shapes, shardings)
    else:
        by_leaf = {tuple(k.key for k in path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
    return {leaf: (shape, dtype, by_leaf[leaf]) for leaf, (shape, dtype) in shapes.items()}


@partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece, start)


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def _as_dtype(buffer: jax.Array, dtype: np.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(buffer, dtype)


class _Target:
    """One leaf while it fills: on every device of this process the buffer of its shard, updated in place.

    Values of two bytes are written as integers: XLA on CPU would convert the whole of a bfloat16 buffer at every write.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        self.bits = np.dtype(np.uint16) if dtype.itemsize == 2 else dtype
        self.shards: dict[Any, tuple[slice, ...]] = {}
        self.buffers: dict[Any, jax.Array] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            slices = tuple(slice(*s.indices(n)) for s, n in zip(index or (), shape, strict=False))
            self.shards[device] = slices
            sizes = tuple(s.stop - s.start for s in slices)
            self.buffers[device] = jnp.zeros(sizes, self.bits, device=device)

    def holds(self, index: tuple[int, ...]) -> bool:
        return any(self._inside(slices, index) for slices in self.shards.values())

    def put(self, index: tuple[int, ...], array: np.ndarray) -> None:
        lead = len(index)
        for device, slices in self.shards.items():
            if not self._inside(slices, index):
                continue
            piece = np.ascontiguousarray(array[slices[lead:]]).astype(self.dtype, copy=False).view(self.bits)
            piece = jax.device_put(piece.reshape((1,) * lead + piece.shape), device)
            start = tuple(i - s.start for i, s in zip(index, slices, strict=False)) + (0,) * (len(self.shape) - lead)
            self.buffers[device] = _write(self.buffers[device], piece, start)

    def finish(self) -> jax.Array:
        buffers = [b if self.bits == self.dtype else _as_dtype(b, self.dtype) for b in self.buffers.values()]
        self.buffers = {}
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, buffers)

    @staticmethod
    def _inside(slices: tuple[slice, ...], index: tuple[int, ...]) -> bool:
        return all(s.start <= i < s.stop for i, s in zip(index, slices, strict=False))
