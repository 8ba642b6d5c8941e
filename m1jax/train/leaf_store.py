"""The parameters of a checkpoint a few slices at a time, in both directions, for models that no memory holds.

Orbax lays the folder out and TensorStore reads and writes it, as for any other checkpoint: what is written here is
restored by `m1jax.train.checkpoint`, and what a run saved there is read here.

    write_leaves(folder / "state", {("embedding",): LazyLeaf((V, D), dtype, pieces)})
    leaves = StoredLeaves(folder / "state"); leaves.read(("periods", "0_lightning", "mlp", "gate"), (0, 3, 1))
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from m1jax.errors import UserError

Path_ = tuple[str, ...]
_PARAMS = "params"
# Bytes that are committed together. Every commit writes the list of all pieces so far, into a file of its own: commits
# by the piece would cost time and room by the square of their number.
_BATCH = 16 << 20

# Said whenever a folder is written without jax.Arrays in it, which is what this file is for.
logging.getLogger("absl").addFilter(lambda record: "No jax.Array in TypeHandlerRegistry" not in record.getMessage())


@dataclass(frozen=True)
class LazyLeaf:
    """A parameter that is not there yet.

    Attributes:
        shape, dtype: of the whole leaf.
        pieces: called once; yields (leading index, values at that index), each index once. What was yielded is read
            until its batch is written: it is not to be changed.
        leading: leading axes that the indices of the pieces cover.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]
    leading: int

    @property
    def size(self) -> int:
        """Number of values (Orbax asks)."""
        return math.prod(self.shape)


class _LazyLeafHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's way of saving a NumPy array, except that the array is written while it comes into being."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._one_at_a_time = asyncio.Lock()  # leaves are written together otherwise, a batch of each in memory
        # Orbax's own context keeps the lists of former commits, which nobody reads again: some 300 MB in the end.
        self._context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 0}})

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        leaf: LazyLeaf = value
        tspec["metadata"]["chunks"] = [1] * leaf.leading + [max(n, 1) for n in leaf.shape[leaf.leading :]]
        async with self._one_at_a_time:
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=self._context)
            pieces = iter(leaf.pieces())
            while await _write_batch(store, pieces):
                _give_back_memory()


async def _write_batch(store: ts.TensorStore, pieces: Iterator[tuple[tuple[int, ...], np.ndarray]]) -> bool:
    """Write pieces of `_BATCH` bytes or a little more, at least one, and commit them; whether there may be more."""
    size = 0
    async with ts.Transaction(atomic=True) as batch:
        for index, values in pieces:
            await store.with_transaction(batch)[index].write(values, can_reference_source_data_indefinitely=True)
            size += values.nbytes
            if size >= _BATCH:
                return True
    return False


def _give_back_memory() -> None:
    """Freed memory to the system: glibc keeps what compressed pieces took in the heaps of many threads."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def write_leaves(folder: Path, leaves: Mapping[Path_, LazyLeaf]) -> None:
    """Write {"params": tree of leaves} as an Orbax folder, holding 16 MiB of pieces at a time or one that is larger."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for parent in path[:-1]:
            node = node.setdefault(parent, {})
        node[path[-1]] = leaf
    registry = ocp.type_handlers.create_type_handler_registry((LazyLeaf, _LazyLeafHandler()))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as orbax:
        orbax.save(folder.absolute(), args=ocp.args.PyTreeSave(item={_PARAMS: tree}))


class StoredLeaves:
    """The parameters of a checkpoint's `state` folder, read where they lie.

    Attributes:
        shapes: {path: shape}.
        dtypes: {path: NumPy dtype}.
    """

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        with ocp.PyTreeCheckpointer() as orbax:
            tree = orbax.metadata(self._folder).item_metadata.tree
        if _PARAMS not in tree:
            raise UserError(f"{folder}: its state has no `params`; found {', '.join(sorted(tree))}")
        self.shapes: dict[Path_, tuple[int, ...]] = {}
        self.dtypes: dict[Path_, np.dtype] = {}
        self._stores: dict[Path_, Any] = {}
        self._walk(tree[_PARAMS], ())

    def _walk(self, node: Any, path: Path_) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                self._walk(child, (*path, str(key)))
        else:
            self.shapes[path] = tuple(node.shape)
            self.dtypes[path] = np.dtype(getattr(ml_dtypes, str(node.dtype), str(node.dtype)))

    def read(self, path: Path_, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The leaf at a leading index or slice, and nothing else of it (but its chunk, which a run writes whole)."""
        if path not in self._stores:
            self._stores = {path: self._store(path, len(index))}
        return np.asarray(self._stores[path][index].read().result())

    def read_as(self, path: Path_, dtype: np.dtype, slices: tuple[slice, ...]) -> np.ndarray:
        """A box of the leaf in another dtype: what `jax.make_array_from_callback` asks for."""
        return self.read(path, slices).astype(dtype, copy=False)

    def _store(self, path: Path_, leading: int) -> Any:
        name = ".".join((_PARAMS, *path))
        kvstore = {"driver": "ocdbt", "base": f"file://{self._folder}", "path": f"{name}/"}
        spec: dict[str, Any] = {"driver": "zarr", "kvstore": kvstore}
        store: Any = ts.open(spec, read=True).result()
        chunk: tuple[int, ...] = store.chunk_layout.read_chunk.shape
        if math.prod(chunk[:leading]) > 1:  # a run writes whole leaves as one chunk: keep it while it is sliced
            spec["context"] = {"cache_pool": {"total_bytes_limit": 2 * math.prod(chunk) * self.dtypes[path].itemsize}}
            store = ts.open(spec, read=True, context=ts.Context()).result()
        return store
