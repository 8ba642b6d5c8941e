"""Meshes of real devices, and where arrays lie on them (`m1jax.mesh` has the table)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from m1jax.errors import UserError
from m1jax.mesh import AXES, ROWS, MeshConfig, flat

M = TypeVar("M", bound=Any)
T = TypeVar("T")
DATA = "data"
BATCH = P(None, ROWS)
"""Rows of [micro-batches, B, T] over their axes; every device along `context` and `tensor` has all tokens of its rows,
which are a few integers each."""


def make_mesh(sizes: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices, or those given, laid out as asked for; by default along `data`.

    Raises:
        UserError: there are too many or too few of them.
    """
    count = jax.device_count() if devices is None else len(devices)
    try:
        sizes = (sizes or MeshConfig()).on(count)
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from error
    # Along the links that there are; an axis of 4 need not be one of an 8 x 8 x 8 torus, so those may be split.
    laid_out = mesh_utils.create_device_mesh(
        tuple(sizes.sizes.values()), devices, allow_split_physical_axes=True, contiguous_submeshes=False
    )
    return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_mesh() -> Mesh:
    """All devices along `data`."""
    return make_mesh()


def check_rows(rows: int, name: str, mesh: Mesh, axes: Sequence[str] = ROWS) -> None:
    """Raise UserError where devices along `axes` do not divide a number of rows; `name` is the config key to change."""
    devices = MeshConfig().of_sizes(mesh.shape).along(axes)
    if rows % devices:
        below, above = rows // devices * devices, (rows // devices + 1) * devices
        choice = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"{name}: {rows} rows cannot be dealt out to {devices} devices; choose {choice}")


def check_tokens(tokens: int, name: str, mesh: Mesh) -> None:
    """Raise UserError where devices along `context` do not divide the tokens of a row; `name` is the key to change."""
    if tokens % (devices := mesh.shape["context"]):
        raise UserError(f"{name}: {tokens} tokens of a row cannot be dealt out to {devices} devices along mesh.context")


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device of the mesh."""
    return NamedSharding(mesh, P())


def placed(mesh: Mesh, specs: Any) -> Any:
    """A tree of PartitionSpecs as shardings over the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def deal(batch: T, mesh: Mesh, lead: int = 1, rows: Sequence[str] = ROWS) -> T:
    """A batch of the host, the same in every process, on its devices: rows, axis `lead` of every array, dealt out."""
    sharding = NamedSharding(mesh, P(*(None,) * lead, tuple(rows)))
    place = lambda x: jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)  # noqa: E731
    return jax.tree.map(place, batch)


def to_host(tree: Any) -> Any:
    """Arrays of the devices as NumPy arrays, whole in every process; all processes have to ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def on_mesh(model: M, mesh: Mesh) -> M:
    """The model config for what runs inside `jax.shard_map` over a mesh.

    Raises:
        UserError: the model cannot be dealt out like that.
    """
    try:
        return dataclasses.replace(model, mesh=model.mesh.of_sizes(mesh.shape))
    except ValueError as error:
        raise UserError(f"config.{error}") from error


def no_gradients(params: Any) -> Any:
    """Zeros to add the gradients of micro-batches to, in at least float32: in bfloat16 the small ones would be lost."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params)


def sum_gradients(grads: Any, specs: Any) -> Any:
    """Gradients of parameters, each summed over the axes along which devices hold the same part of it."""
    return jax.tree.map(lambda grad, spec: jax.lax.psum(grad, missing_axes(spec)), grads, specs)


def missing_axes(spec: P) -> tuple[str, ...]:
    """The axes along which an array of this spec is the same on every device."""
    used = {axis for entry in spec for axis in flat(entry)}
    return tuple(axis for axis in AXES if axis not in used)
