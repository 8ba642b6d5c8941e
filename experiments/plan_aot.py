"""A run's update compiled for devices that are not here: what `python -m experiments.plan --aot=v5p:8x8x8` prints.

The compiler is the real one (libtpu), and so are the program and its kernels; only numbers are missing. From it comes
the memory of a device. Messages are read off the program itself, loop by loop, FLOPs from m1jax/model/accounting.py:
XLA's own count takes every loop for one turn. How fast the devices are does not follow from any of that, and is said.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX asks libtpu for chips of this machine
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # and libtpu the network for those of a cloud's
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from m1jax.errors import UserError
from m1jax.mesh import ROWS, MeshConfig
from m1jax.model import accounting as count
from m1jax.model import cache as cache_lib
from m1jax.model import transformer
from m1jax.model.config import ModelConfig
from m1jax.pallas_kernels.compat import lowering_for
from m1jax.rl import engine_local
from m1jax.rl.engine_local import LocalEngine, sample_token
from m1jax.rl.settings import RLConfig
from m1jax.rl.update import make_update
from m1jax.sharding import make_mesh, placed
from m1jax.train.optimizer import make_optimizer
from m1jax.train.state import TrainState, state_specs
from m1jax.types import Batch, Sampling

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What a device can do, by its vendor's page.

    Attributes:
        memory: bytes of HBM.
        flops: bfloat16, dense, a second.
        link: bytes a second that it takes in over its links, all together.
        dollars: list price of an hour on demand in us regions.
        reads: bytes a second out of HBM.
    """

    memory: float
    flops: float
    link: float
    dollars: float
    reads: float


CHIPS = {
    "h100": Chip(80e9, 989e12, 450e9, 2.07, 3350e9),
    "v5p": Chip(95 * GIB, 459e12, 600e9, 4.20, 2765e9),
    "v5e": Chip(16 * GIB, 197e12, 200e9, 1.20, 819e9),
    "v6e": Chip(32 * GIB, 918e12, 400e9, 2.70, 1640e9),
}
"""Google Cloud's pages "TPU v5p", "TPU v5e" and "TPU v6e", and "Cloud TPU pricing": half of the bidirectional bandwidth
of the links each way. NVIDIA's data sheet of the H100 SXM, NVLink each way (between hosts there is less), and what the
report's rent comes to for one GPU and hour. Prices change: --dollars_per_gpu_hour says another."""

GPUS = ("h100",)
"""Counted and traced, not compiled: XLA's compiler for GPUs wants the kernels' own one and a driver's library."""

SHORT = 1.15
"""What a compiler took over what is counted, at the most: the tables of TPU slices in BUILD.md."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, for one device; its bytes are 0 where there was none.

    Attributes:
        arguments: bytes that are there before it runs.
        temporary: bytes that it takes while it runs, what it writes into its arguments' place not counted.
        peak: the most bytes at one time.
        seconds: that tracing and compiling took.
        messages: bytes that a device receives, by (kind, axes).
    """

    arguments: int
    temporary: int
    peak: int
    seconds: float
    messages: Mapping[tuple[str, str], float]


def topology(name: str) -> tuple[str, Sequence[Any]]:
    """(kind of chip, devices) of "v5p:8x8x8".

    Raises:
        UserError: no such topology, or no compiler for it.
    """
    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(f"--aot={name}: known are {', '.join(CHIPS)}, with a topology or a number: v5p:8x8x8, h100:512")
    if kind in GPUS:
        number = name.partition(":")[2]
        if not number.isdecimal() or not int(number):
            raise UserError(f"--aot={name}: write how many, {kind}:512 for example")
        jax.config.update("jax_num_cpu_devices", int(number))  # they stand in for the GPUs while programs are traced
        return kind, jax.devices()
    try:
        return kind, topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:
        told = str(error).strip().split("\n")[0][:120]
        mend = (
            'pip install "m1jax[plan]"' if "not installed" in told or "libtpu" in told else "write it as in v5p:8x8x8"
        )
        raise UserError(f"--aot={name}: {told}; {mend}") from error


def compile_update(config: RLConfig, mesh: Mesh) -> Compiled:
    """All updates of one generation batch."""
    model, optimizer = config.model, make_optimizer(config.optimizer)

    def fresh() -> TrainState:
        params = transformer.init(jax.random.key(0), model)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))

    state = _abstract(jax.eval_shape(fresh), placed(mesh, state_specs(model, optimizer)))
    shape = config.batch_shape
    lead = (shape.updates, shape.micro_batches, shape.rows, shape.tokens)
    rows = NamedSharding(mesh, P(None, None, ROWS))
    integers, floats = (jax.ShapeDtypeStruct(lead, dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))
    reference = floats if config.loss.kl_coefficient else None
    replay, experts = config.rollout.router_replay, None
    if replay != "off":
        width = (*lead, model.num_layers, model.experts_per_token)
        experts = jax.ShapeDtypeStruct(width, np.min_scalar_type(-model.num_experts), sharding=rows)
    batch = Batch(integers, integers, floats, floats, floats, integers, reference, experts)
    update = make_update(
        model, config.loss, optimizer, mesh, temperature=config.sampling.temperature, passes=config.update.passes,
        adam=config.optimizer, router=config.router, replay=replay == "use",
    )  # fmt: skip
    return _compile(update, (state, batch), mesh)


def compile_decode(config: RLConfig, mesh: Mesh) -> Compiled:
    """One token of `engine_rows` answers with a full window, weights as they are computed with."""
    model = replace(config.model, param_dtype=config.model.dtype)
    engine = LocalEngine(model, prompt_tokens=8, rows=config.rollout.engine_rows, stop_ids=(), mesh=mesh)
    rows, slots = config.rollout.engine_rows, config.batch_shape.tokens
    whole = replace(engine.config, mesh=MeshConfig(data=1))
    row = P(engine_local.ROWS)

    def layer(kind: str) -> dict[str, P]:
        heads = P(engine_local.ROWS, "tensor")
        return {"state": heads} if kind == "lightning" else {"keys": heads, "values": heads}

    cache = jax.eval_shape(lambda: cache_lib.empty(whole, rows, slots))
    cache_specs = replace(
        cache, layers=tuple(layer(kind) for kind in model.kinds), slot_positions=row, slot_segments=row,
        next_slot=P(), lengths=row,
    )  # fmt: skip
    params = jax.eval_shape(lambda: transformer.by_layer(transformer.init(jax.random.key(0), model), model))
    specs = dict(engine.specs)
    one = [jax.tree.map(lambda s: P(*s[2:]), specs["periods"][f"{i}_{kind}"]) for i, (kind, _) in enumerate(model.runs)]
    period = [one[i] for i, (_, n) in enumerate(model.runs) for _ in range(n)]
    specs = {k: s for k, s in specs.items() if k != "periods"} | {"layers": tuple(period * model.num_periods)}

    def step(params: Any, cache: Any, token_B: Any, key_B: Any) -> Any:
        ones_B1 = jnp.ones((len(token_B), 1), jnp.int32)
        hidden_BD, cache, _ = transformer.hidden_states(params, engine.config, token_B[:, None], ones_B1, cache)
        logits_BV = engine_local.logits(params, hidden_BD, engine.config)
        return *sample_token(key_B, 1, logits_BV, Sampling(1)), cache

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, cache_specs, row, row), out_specs=(row, row, cache_specs), check_vma=False
    )
    laid_out = placed(mesh, (specs, cache_specs, row, row))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    arguments = params, cache, jax.ShapeDtypeStruct((rows,), jnp.int32), keys
    return _compile(jax.jit(mapped, donate_argnums=1), _abstract(arguments, laid_out), mesh)


def _compile(function: Any, arguments: tuple[Any, ...], mesh: Mesh) -> Compiled:
    start = time.perf_counter()
    sizes = {str(axis): n for axis, n in mesh.shape.items()}
    if mesh.devices.flat[0].platform == "cpu":  # they stand in for GPUs
        with lowering_for("gpu"):
            traced = function.trace(*arguments)
        return Compiled(0, 0, 0, time.perf_counter() - start, messages(traced.jaxpr, sizes))
    with lowering_for("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = function.trace(*arguments)
        memory = traced.lower().compile().memory_analysis()
    seconds = time.perf_counter() - start
    return Compiled(
        memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes, seconds,
        messages(traced.jaxpr, sizes),
    )  # fmt: skip


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


# -- messages ----------------------------------------------------------------------------------------------------

SHARE = {
    "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0, "ragged_all_to_all": 1.0, "psum": 2.0, "pmax": 2.0,
    "ppermute": 1.0,
}  # fmt: skip
"""Times that a device receives the larger of what goes in and what comes out, but for its own part of it: a sum to all
is one that is scattered and gathered again."""


def messages(jaxpr: Any, sizes: Mapping[str, int]) -> dict[tuple[str, str], float]:
    """Bytes that one device receives, by (kind, axes), with every loop for as many turns as it has.

    A loop whose turns hang on the data (the rounds of `all_to_all`) counts one: what even routing needs. Of branches
    the one that says most counts.
    """
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for equation in jaxpr.eqns:
        name, p = equation.primitive.name, equation.params
        kind = next((k for k in SHARE if name == k or name.startswith(f"{k}_")), None)
        if kind is not None:
            axes = [axis for axis in _axes(p) if sizes.get(axis, 1) > 1]
            if axes:
                n = math.prod(sizes[axis] for axis in axes)
                # What a ragged one sends is its first operand; its buffer holds the worst case.
                sides = (equation.invars[:1],) if kind.startswith("ragged") else (equation.invars, equation.outvars)
                size = max(sum(_bytes(v) for v in side) for side in sides)
                found[kind, " x ".join(axes)] += SHARE[kind] * size * (n - 1) / n
            continue
        branches = [messages(inner, sizes) for inner in _inner(p)]
        if name == "cond":
            branches = [max(branches, key=lambda b: sum(b.values()))] if branches else []
        for branch in branches:
            for what, size in branch.items():
                found[what] += size * (p["length"] if name == "scan" else 1)
    return found


def _axes(p: Mapping[str, Any]) -> tuple[str, ...]:
    axes = p.get("axes", p.get("axis_name", ()))
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _bytes(variable: Any) -> int:
    x = variable.aval
    return int(np.prod(x.shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize if hasattr(x, "shape") else 0


def _inner(p: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs inside an equation; those of derivatives that were not asked for are no jaxprs."""
    for value in p.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(each, "eqns"):
                yield each
            elif hasattr(each, "jaxpr") and hasattr(each.jaxpr, "eqns"):
                yield each.jaxpr


# -- tables ------------------------------------------------------------------------------------------------------


def report(
    name: str, config: RLConfig, meshes: Sequence[MeshConfig], run: Any, table: Any, decode: bool
) -> Iterator[str]:
    """Lines for every layout asked for, as they are compiled."""
    kind, devices = topology(name)
    chip, shape = CHIPS[kind], config.batch_shape
    price = run.dollars_per_gpu_hour or chip.dollars
    tokens = shape.updates * shape.micro_batches * shape.rows * shape.tokens * config.update.passes
    flops = (
        tokens / shape.tokens * count.train_flops(count.footprint(config.model), shape.tokens, remat=config.model.remat)
    )
    yield f"{name}: {len(devices)} chips of {chip.memory / GIB:.0f} GiB and {chip.flops / 1e12:.0f} TFLOP/s"
    asked = f"{config.rollout.prompts} x {config.rollout.responses} answers in {shape.updates} updates"
    cut = f"{shape.micro_batches} micro-batches x {shape.rows} rows x {shape.tokens:,} tokens"
    yield f"The updates of a generation batch at its longest: {asked} x {cut}"
    for sizes in meshes:
        mesh = make_mesh(sizes, devices)
        model = replace(config.model, mesh=sizes.on(len(devices)))
        layout = " x ".join(f"{axis} {n}" for axis, n in model.mesh.sizes.items() if n > 1)
        yield ""
        try:
            made = compile_update(replace(config, mesh=model.mesh), mesh)
        except jax.errors.JaxRuntimeError as error:
            yield f"Update over {layout}: {_too_large(error)}"
            continue
        yield f"Update over {layout} ({'compiled' if made.peak else 'traced'} in {made.seconds:.0f} s)"
        yield from table(["memory of a chip", "GiB", "of it"], memory_rows(model, shape, config, made, chip))
        yield from message_table(made, table)
        yield from table(["of the batch", ""], time_rows(flops, tokens, len(devices), made, chip, run, price))
        if decode:
            yield ""
            try:
                made = compile_decode(replace(config, model=model), mesh)
            except jax.errors.JaxRuntimeError as error:
                yield f"One token of {config.rollout.engine_rows} answers over {layout}: {_too_large(error)}"
                continue
            rows = config.rollout.engine_rows
            yield (
                f"One token of {rows} answers behind {shape.tokens:,} tokens, weights in {config.model.dtype} "
                f"({'compiled' if made.peak else 'traced'} in {made.seconds:.0f} s)"
            )
            yield from message_table(made, table)
            if made.peak:
                yield from table(["memory of a chip", "GiB", "of it"], fit_rows(made, chip))
                seconds = made.arguments / chip.reads + sum(made.messages.values()) / chip.link
                least = f"seconds, at the least: all read once at {chip.reads / 1e9:,.0f} GB/s, then messages"
                yield from table(["of a token", ""], [
                    [least, f"{seconds:.2g}"],
                    ["tokens a second of all chips, at the most", f"{rows / seconds:,.0f}"],
                ])  # fmt: skip


def _too_large(error: Exception) -> str:
    """That a program does not fit, in the compiler's words; any other error is raised again."""
    told = str(error).strip().split("\n")[0]
    if "RESOURCE_EXHAUSTED" not in told:
        raise error
    return f"IT DOES NOT FIT: {told.partition('RESOURCE_EXHAUSTED: ')[2][:200]}"


def memory_rows(model: ModelConfig, shape: Any, config: RLConfig, made: Compiled, chip: Chip) -> list[list[str]]:
    parts = count.training_bytes(model, shape.rows, shape.tokens, config.optimizer.moments or model.param_dtype)
    rows = [[f"{what}, counted", f"{size / GIB:.2f}", f"{size / chip.memory:.0%}"] for what, size in parts.items()]
    total = sum(parts.values())
    if made.peak:
        rows.append(
            ["all that is counted", f"{total / GIB:.2f}", f"{total / made.peak - 1:+.0%} of the compiler's peak"]
        )
        return rows + fit_rows(made, chip)
    likely = SHORT * total
    rows.append(["all that is counted", f"{total / GIB:.2f}", f"{total / chip.memory:.0%}"])
    rows.append([f"what a compiler may make of it, x {SHORT}", f"{likely / GIB:.2f}", f"{likely / chip.memory:.0%}"])
    return [*rows, fit(likely, chip)]


def fit_rows(made: Compiled, chip: Chip) -> list[list[str]]:
    rows = [
        [f"{what}, by the compiler", f"{size / GIB:.2f}", f"{size / chip.memory:.0%}"]
        for what, size in (("arguments", made.arguments), ("temporary", made.temporary), ("peak", made.peak))
    ]
    return [*rows, fit(made.peak, chip)]


def fit(size: float, chip: Chip) -> list[str]:
    return ["it fits" if size < chip.memory else "IT DOES NOT FIT", f"{chip.memory / GIB:.2f}", "100%"]


def message_table(made: Compiled, table: Any) -> list[str]:
    total = sum(made.messages.values())
    unit, size = next((u, n) for u, n in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)) if total >= n or u == "KiB")
    large = {what: n for what, n in made.messages.items() if n > 1e-3 * total}
    rows = [[kind, axes, f"{n / size:,.2f}"] for (kind, axes), n in sorted(large.items())]
    rest = total - sum(large.values())
    rows += [["all others", "", f"{rest / size:,.2f}"], ["all", "", f"{total / size:,.2f}"]]
    return table(["messages to a chip", "along", unit], rows)


def time_rows(
    flops: float, tokens: int, devices: int, made: Compiled, chip: Chip, run: Any, price: float
) -> list[list[str]]:
    busy = flops / devices / chip.flops / run.training_utilisation
    talk = sum(made.messages.values()) / chip.link
    hours = (max(busy, talk) / 3600, (busy + talk) / 3600)
    return [
        ["FLOPs of a chip", f"{flops / devices:.3g}"],
        [
            f"seconds of computing, at {run.training_utilisation:.0%} of the peak (--training_utilisation)",
            f"{busy:,.0f}",
        ],
        [f"seconds of messages, at {chip.link / 1e9:.0f} GB/s", f"{talk:,.0f}"],
        [
            "seconds of the updates: messages all hidden, or none, on all links at once",
            " to ".join(f"{h * 3600:,.0f}" for h in hours),
        ],
        [f"dollars, at {price:.2f} for a chip and hour", " to ".join(f"{h * devices * price:,.0f}" for h in hours)],
        [
            "dollars for 1e9 places of tokens, padding included",
            " to ".join(f"{h * devices * price / tokens * 1e9:,.0f}" for h in hours),
        ],
    ]
