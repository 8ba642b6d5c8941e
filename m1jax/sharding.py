"""The device mesh. One axis so far: `data`, over which rows of a batch are dealt out and parameters are replicated."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from m1jax.errors import UserError

DATA = "data"


def data_mesh() -> Mesh:
    """All devices along `data`."""
    return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(AxisType.Auto,))


def check_rows(rows: int, name: str, mesh: Mesh) -> None:
    """Raise UserError where the devices do not divide a number of rows; `name` is the config key to change."""
    if rows % mesh.size:
        below, above = rows // mesh.size * mesh.size, (rows // mesh.size + 1) * mesh.size
        choice = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"{name}: {rows} rows cannot be dealt out to {mesh.size} devices; choose {choice}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device of the mesh."""
    return NamedSharding(mesh, P())
