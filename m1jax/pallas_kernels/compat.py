"""Where a kernel will run, and the names of Pallas that differ between JAX 0.10.2 and 0.12.

    with interpreted():            # run the kernels of GPUs and TPUs step by step on a CPU: slow, for tests
    with lowering_for("gpu"):      # make programs for a device that this machine does not have (jax.export, AOT)

Both act while a program is traced, and JAX keeps what it has traced: make a new `jax.jit` inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams  # pyright: ignore  # public since 0.11
except ImportError:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

_LOAD_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # an index of its own until 0.11

_INTERPRETED: ContextVar[bool] = ContextVar("interpreted", default=False)
_PLATFORM: ContextVar[str | None] = ContextVar("platform", default=None)


@contextmanager
def interpreted() -> Iterator[None]:
    """Interpret every Pallas kernel that is traced inside, on the CPU."""
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


@contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Take `platform` ("gpu" or "tpu") for the one that programs traced inside will run on."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def is_interpreted() -> bool:
    """Whether kernels traced now are interpreted."""
    return _INTERPRETED.get()


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": what programs traced now are for."""
    return _PLATFORM.get() or jax.default_backend()


def why_not(implementation: str) -> str | None:
    """Return why a Pallas implementation, "mosaic_tpu" or "mosaic_gpu", cannot run here; None where it can."""
    needed = implementation.removeprefix("mosaic_")
    if is_interpreted() or _PLATFORM.get() == needed:
        return None
    if needed == platform() == "gpu":
        device = jax.devices()[0]  # its products are instructions of Hopper that later generations do not have either
        found = getattr(device, "compute_capability", "")
        is_hopper = str(found).startswith("9.")
        return None if is_hopper else f"it needs a Hopper GPU (compute capability 9), and found {device.device_kind}"
    if needed == platform():
        return None
    return f"it needs a {needed.upper()}, and programs are made for a {platform().upper()} here"


# -- Mosaic GPU --------------------------------------------------------------------------------------------------


def gpu_kernel(
    body: Any, *, name: str, grid: tuple[int, ...], grid_names: tuple[str, ...], out_type: Any, threads: int = 1
) -> Any:
    """Return the function that launches `body(*inputs, *outputs)`; an input that is a `jax.Ref` changes in place.

    With several `threads` a program has as many warpgroups, along the axis "warpgroup".
    """
    # Not plgpu.kernel: that of 0.10.2 takes no references. Lane semantics: layouts are the ones that a kernel names,
    # in every version; 0.11 made the other the default.
    return pl.kernel(
        body,
        out_type=out_type,
        mesh=plgpu.Mesh(
            grid=grid,
            grid_names=grid_names,
            num_threads=threads if threads > 1 else None,
            thread_name="warpgroup" if threads > 1 else None,
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=InterpretGPUParams() if is_interpreted() else False,
        name=name,
    )


def changing(x: jax.Array) -> Any:
    """Return a reference to `x` that a kernel may change in place; `jax.freeze` gives the array back."""
    # The interpreter of 0.10.2 wants to hear where it lies, which JAX takes under a jit only.
    return jax.new_ref(x, memory_space=plgpu.GMEM) if is_interpreted() else jax.new_ref(x)


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """Return what `ref` holds, in the registers' `layout`, which an interpreter does not know."""
    if is_interpreted():
        return ref[...]
    return plgpu.load(ref, *_LOAD_INDEX, layout=layout, optimized=optimized)


def zeros(shape: tuple[int, ...], dtype: Any, layout: Any) -> jax.Array:
    """Return zeros in the registers' `layout`."""
    x = jnp.zeros(shape, dtype)
    return x if is_interpreted() else plgpu.layout_cast(x, layout)


def product(
    a: Any, b: Any, *, onto: jax.Array | None = None, transpose_a: bool = False, transpose_b: bool = False
) -> jax.Array:
    """Return a @ b (+ onto) in float32 by the tensor cores; `b` lies in shared memory, `a` there or in registers.

    An interpreter multiplies what they hold: that of 0.10.2 knows neither transposed references nor registers.
    """
    if is_interpreted():
        turned = lambda x, yes: x[...].T if yes else x[...]  # noqa: E731
        ab = jnp.dot(turned(a, transpose_a), turned(b, transpose_b), preferred_element_type=jnp.float32)
        return ab if onto is None else onto + ab
    a, b = _turned(a, transpose_a), _turned(b, transpose_b)
    if onto is not None:
        total: Any = pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.WGMMAAccumulatorRef.init(onto))
        return total

    def multiply(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def sums_of_products(count: int, shape: tuple[int, int], steps: Any, step: Any) -> tuple[jax.Array, ...]:
    """Return `count` float32 sums that `step(c, add)` adds to in order: `add(i, a, b, transpose_a=, transpose_b=)`.

    The tensor cores work on while a step goes on: `a` and `b` are free once `plgpu.wgmma_wait` says so.
    """
    if is_interpreted():

        def interpret(c, sums):
            sums = list(sums)

            def add(i, a, b, **transposed):
                sums[i] = product(a, b, onto=sums[i], **transposed)

            step(c, add)
            return tuple(sums)

        return jax.lax.fori_loop(0, steps, interpret, tuple(jnp.zeros(shape, jnp.float32) for _ in range(count)))

    def scoped(*sums):
        def add(i, a, b, *, transpose_a=False, transpose_b=False):
            plgpu.wgmma(sums[i], _turned(a, transpose_a), _turned(b, transpose_b))

        jax.lax.fori_loop(0, steps, lambda c, _: step(c, add), None)
        plgpu.wgmma_wait(0)
        return tuple(x[...] for x in sums)

    found: Any = pl.run_scoped(scoped, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * count)
    return found


def _turned(ref: Any, transpose: bool) -> Any:
    return ref.transpose((1, 0)) if transpose else ref
