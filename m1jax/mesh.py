"""How devices are laid out, and what lies along which axis of them: the one table that says so.

    axis      what is dealt out along it                      what moves between its devices
    data      rows of a batch                                 gradients, summed once an update
    fsdp      rows of a batch; the width of every weight      weights, gathered layer by layer; gradients, scattered
    expert    rows of a batch; whole experts                  tokens to their experts and back
    context   the tokens of a row; weights, as along fsdp     lightning states, keys and values; weights and gradients
    tensor    heads, columns of MLPs, the vocabulary          the sums of each branch's output

Axes are named from the slowest links to the fastest. An axis of size 1 costs nothing and moves nothing. This file knows
no arrays: `m1jax.sharding` makes a mesh of it, `m1jax.model.collectives` moves what has to move.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

AXES = ("data", "fsdp", "expert", "context", "tensor")
ROWS = ("data", "fsdp", "expert")
"""The axes along which rows of a batch are dealt out."""
TOKENS = (*ROWS, "context")
"""The axes along which no two devices have the same token."""

GATHERED = ("fsdp", "context")
"""The axes whose devices compute with whole weights, and keep a part of them each."""

RULES: dict[str, str | tuple[str, ...] | None] = {
    # dimension of a parameter: the axis, or axes, along which it is dealt out; None: whole on every device
    "embed": GATHERED,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "heads_and_dims": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "head_dim": None,
    "router": None,
    "norm": None,
    "layers": None,
    "periods": None,
}
"""The table. The model gathers what is dealt out along GATHERED before it computes; along `tensor` and `expert` every
device computes with its part, so a dimension can be moved there only together with the code that computes it."""

EXCHANGES = ("all_to_all", "all_gather", "ragged")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, and how tokens reach their experts.

    Attributes:
        data, fsdp, expert, context, tensor: devices along each axis; 0 for one of them is what the others leave.
        expert_exchange: with more than one device along `expert`. "all_to_all": every token goes to the devices that
            hold its experts, in rounds of a fixed size, as many as it takes. "all_gather": every device gets all tokens
            of its group and computes those that are its own; for groups of a few. "ragged": as the first, in one round
            of exactly the right size, where the backend has `ragged_all_to_all`.
        expert_capacity: places of a round of "all_to_all", over what even routing would fill. More takes memory, fewer
            takes rounds.
    """

    data: int = 0
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    expert_exchange: str = "all_to_all"
    expert_capacity: float = 1.25

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 0:
                raise ValueError(f"{axis}: {getattr(self, axis)} devices; write a number, or 0 for what is left")
        if len(open_axes := [axis for axis in AXES if not getattr(self, axis)]) > 1:
            raise ValueError(f"{open_axes[1]}: 0, as {open_axes[0]}; only one axis can take what is left")
        if self.expert_exchange not in EXCHANGES:
            raise ValueError(f"expert_exchange: {self.expert_exchange!r} must be one of {EXCHANGES}")
        if not 0 < self.expert_capacity < math.inf:
            raise ValueError(f"expert_capacity: {self.expert_capacity} must be above 0 and finite")

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, in the order of AXES."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def devices(self) -> int:
        """All of them; 0 while one axis is open."""
        return math.prod(self.sizes.values())

    def along(self, axes: Iterable[str]) -> int:
        """Devices along several axes together."""
        return math.prod(getattr(self, axis) for axis in axes)

    def on(self, devices: int) -> MeshConfig:
        """The same with the open axis filled in.

        Raises:
            ValueError: so many devices cannot be laid out like this.
        """
        given = math.prod(n for n in self.sizes.values() if n)
        shown = " x ".join(f"{axis} {n}" for axis, n in self.sizes.items() if n != 1) or "1 device"
        open_axis = next((axis for axis, n in self.sizes.items() if not n), None)
        if open_axis is None and given != devices:
            raise ValueError(f"{shown} makes {given} devices, and there are {devices}; set one of them to 0")
        if devices % given:
            raise ValueError(
                f"{shown} is for a multiple of {given} devices, and there are {devices}; choose factors of that"
            )
        return self if open_axis is None else dataclasses.replace(self, **{open_axis: devices // given})

    def of_sizes(self, sizes: Mapping[str, int]) -> MeshConfig:
        """The same choices over other numbers of devices; an axis without a size has 1."""
        return dataclasses.replace(self, **{axis: sizes.get(axis, 1) for axis in AXES})

    def local(self, shape: Sequence[int], dims: Sequence[str | None]) -> tuple[int, ...]:
        """The part of an array that one device holds; `dims` are the names of its dimensions."""
        return tuple(n // self.parts(dim) for n, dim in zip(shape, dims, strict=True))

    def parts(self, dim: str | None) -> int:
        """How many parts a dimension of this name is cut into."""
        return self.along(flat(RULES[dim] if dim else None))


ONE = MeshConfig(data=1)
"""A single device: what a model without a mesh computes on."""


def flat(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of an entry of the table, or of a PartitionSpec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def axes_of(dims: Sequence[str | None]) -> tuple[str | tuple[str, ...] | None, ...]:
    """The mesh axis, or axes, of each dimension of a parameter.

    Raises:
        ValueError: two of them lie along the same one, or a name is not in the table.
    """
    if unknown := [dim for dim in dims if dim is not None and dim not in RULES]:
        raise ValueError(f"dimension {unknown[0]!r} is not in the table; it has {', '.join(RULES)}")
    axes = tuple(RULES[dim] if dim else None for dim in dims)
    used = [(axis, dim) for entry, dim in zip(axes, dims, strict=True) for axis in flat(entry)]
    for n, (axis, dim) in enumerate(used):
        if clash := [other for same, other in used[:n] if same == axis]:
            raise ValueError(f"dimensions {clash[0]!r} and {dim!r} of one parameter both lie along {axis!r}")
    return axes
