"""What is measured on a machine: cases of an operation at a shape, in groups that are measured together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from experiments.bench.kernels.ops import FORWARD, GROWTH, OPS, Op, Shape
from experiments.bench.kernels.roofline import Work
from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.shapes import TARGET_SHAPES, Decode, Experts, GatedNorm, Lightning, Softmax

SMOKE_SHAPES = {
    "lightning": (Lightning(B=1, T=64, N=2, H=16), Lightning(B=1, T=70, N=2, H=16, segments=2)),
    "decode": (Decode(B=2, S=3, N=2, H=16),),
    "gated_norm": (GatedNorm(M=5, N=2, H=16),),
    "softmax": (Softmax(B=1, T=64, N=2, K=1, H=16), Softmax(B=1, T=70, N=2, K=1, H=16, segments=2)),
    "experts": (Experts(T=40, D=16, F=24, E=4, A=2), Experts(T=40, D=16, F=24, E=4, A=2, routing="zipf")),
    GROWTH: (Lightning(B=1, T=64, N=2, H=16), Lightning(B=1, T=128, N=2, H=16)),
}


@dataclass(frozen=True)
class Sizes:
    """What a machine can be asked.

    Attributes:
        dtype: of all inputs.
        shapes: of each operation.
        limit: the most that one call may compute and move; nothing holds back `GROWTH`.
        product, copied: sizes of what the roofline is measured by (`roofline.ceilings`).
        seconds: calls are repeated until a measurement takes as long, so that launches hide behind one another.
        rest: pause after each measurement, in its own seconds. On a CPU the memory of a program is given back in the
            background when it has ended, gigabytes for up to half a second, which would fall on the next one.
    """

    dtype: str
    shapes: Mapping[str, Sequence[Shape]]
    limit: Work
    product: int
    copied: int
    seconds: float
    rest: float

    def work(self, op: Op, shape: Shape, way: str) -> Work:
        return op.work(shape, way != FORWARD, jnp.dtype(self.dtype).itemsize)

    def allow(self, work: Work) -> bool:
        return work.flops <= self.limit.flops and work.bytes <= self.limit.bytes


@dataclass(frozen=True)
class Case:
    """What implementations and peers are compared on."""

    name: str
    shape: Shape
    way: str

    @property
    def op(self) -> Op:
        return OPS[self.name]

    @property
    def packed(self) -> bool:
        return bool(getattr(self.shape, "segments", 0))

    def __str__(self):
        return f"{self.name}, {self.shape}, {self.way}"


def sizes(smoke: bool) -> Sizes:
    """Those of this machine; for `smoke` the least that runs."""
    shapes = lambda heads, powers: TARGET_SHAPES | {GROWTH: [Lightning(1, 2**p, heads, H=128) for p in powers]}  # noqa: E731
    if compat.platform() == "cpu":
        # About two seconds of two cores, and one of their memory.
        chosen = Sizes("float32", shapes(8, range(11, 17)), Work(1.25e11, 2e9), 1536, 2**25, seconds=0.0, rest=0.4)
    else:
        memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 16e9)
        limit = Work(5e14, memory / 2)  # half a second of an H100; what is moved is held, and as much in between
        chosen = Sizes("bfloat16", shapes(64, range(11, 18)), limit, 8192, 2**29, seconds=0.01, rest=0.0)
    return replace(chosen, shapes=SMOKE_SHAPES, product=64, copied=2**12, rest=0.0) if smoke else chosen


def groups(names: Sequence[str], text: str, here: Sizes, notes: list[str]) -> Iterator[list[Case]]:
    """The cases of each shape whose name holds `text`; what is too large is noted.

    The lengths of growth are measured together, and so are the routings of experts of one size.
    """
    for name in names:
        shapes = [shape for shape in here.shapes[name] if text in str(shape)]
        cases = [Case(name, shape, way) for shape in shapes for way in OPS[name].passes]
        if name == GROWTH:
            yield from [cases] if cases else []
            continue
        together: dict[str, list[Case]] = {}
        for shape in shapes:
            fits = {way: here.allow(here.work(OPS[name], shape, way)) for way in OPS[name].passes}
            if large := [way for way in fits if not fits[way]]:
                notes.append(f"{name}, {shape}, {' and '.join(large)}: too large for this machine")
            alike = str(replace(shape, routing="")) if isinstance(shape, Experts) else str(shape)
            together.setdefault(alike, []).extend(case for case in cases if case.shape == shape and fits[case.way])
        yield from filter(None, together.values())
