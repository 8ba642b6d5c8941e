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
from m1jax.mesh import AXES, GATHERED, ROWS, MeshConfig
from m1jax.model import accounting as count
from m1jax.model import cache as cache_lib
from m1jax.model import transformer
from m1jax.model.kernels import check_kernels
from m1jax.pallas_kernels.compat import lowering_for
from m1jax.rl import engine_local
from m1jax.rl.engine_local import LocalEngine, sample_token
from m1jax.rl.settings import RLConfig
from m1jax.rl.update import make_update
from m1jax.sharding import check_rows, check_tokens, make_mesh, on_mesh, placed
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
        host: chips that `link` joins; 0 for all that there are.
        between: bytes a second that one takes in from chips of other hosts.
    """

    memory: float
    flops: float
    link: float
    dollars: float
    reads: float
    host: int = 0
    between: float = 0.0


CHIPS = {
    "h100": Chip(80e9, 989e12, 450e9, 2.07, 3350e9, host=8, between=50e9),
    "v5p": Chip(95 * GIB, 459e12, 600e9, 4.20, 2765e9),
    "v5e": Chip(16 * GIB, 197e12, 200e9, 1.20, 819e9),
    "v6e": Chip(32 * GIB, 918e12, 400e9, 2.70, 1640e9),
}
"""Google Cloud's pages "TPU v5p", "TPU v5e" and "TPU v6e", and "Cloud TPU pricing": half of the bidirectional bandwidth
of the links each way; a slice is one torus. NVIDIA's data sheets of the H100 SXM, NVLink each way, and of the DGX H100,
hosts of 8 with 400 Gb/s of InfiniBand for each GPU; and what the report's rent comes to for one GPU and hour. Prices
change: --dollars_per_gpu_hour says another."""

GPUS = ("h100",)
"""Counted and traced, not compiled: XLA's compiler for GPUs wants the kernels' own one and a driver's library."""

SHORT = 1.15
"""What libtpu's compiler took for the updates of MiniMax-M1 over what is counted, rounded up: the two windows of the
table in BUILD.md. Of other models and of XLA's compiler for GPUs nothing is known."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, for one device; its bytes are 0 where there was none.

    Attributes:
        arguments: bytes that are there before it runs.
        temporary: bytes that it takes while it runs, what it writes into its arguments' place not counted.
        peak: the most bytes at one time.
        seconds: that tracing and compiling took.
        messages: bytes that a device receives, by (kind, axes).
        splash: a kernel serves softmax attention, which then writes no scores to memory.
    """

    arguments: int
    temporary: int
    peak: int
    seconds: float
    messages: Mapping[tuple[str, str], float]
    splash: bool = False

    @property
    def how(self) -> str:
        return f"{'compiled' if self.peak else 'traced'} in {self.seconds:.0f} s"


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


def laid_out(config: RLConfig, sizes: MeshConfig, devices: Sequence[Any]) -> tuple[RLConfig, Mesh]:
    """The config on a mesh of these sizes, and that mesh.

    Raises:
        UserError: a run would refuse it, in the run's own words.
    """
    mesh = make_mesh(sizes, devices)
    model = on_mesh(config.model, mesh)
    check_tokens(config.batch_shape.tokens, "config.update.row_tokens", mesh)
    check_rows(config.update.micro_batch_rows, "config.update.micro_batch_rows", mesh)
    with lowering_for(_platform(mesh)):
        check_kernels(model)
    return replace(config, mesh=model.mesh), mesh


def _platform(mesh: Mesh) -> str:
    return "gpu" if mesh.devices.flat[0].platform == "cpu" else "tpu"  # CPUs stand in for GPUs


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
    """One token of `engine_rows` answers with a full window, weights as they are computed with.

    Raises:
        UserError: the local engine of a run would not take so many rows on this mesh: it deals out their prompts.
    """
    responses = config.rollout.responses
    try:
        prompts = config.rollout.engine_rows // responses
        check_rows(prompts, "config.rollout.engine_rows / responses", mesh, engine_local.ROWS)
    except UserError as error:
        multiple = responses * config.mesh.along(engine_local.ROWS)
        raise UserError(f"{error}: engine_rows has to be a multiple of {multiple}") from error
    model = config.model
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

    def fresh() -> Any:
        params = engine_local.computed_with(transformer.init(jax.random.key(0), model), model.dtype)
        return transformer.by_layer(params, model)

    params = jax.eval_shape(fresh)
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
    if _platform(mesh) == "gpu":
        with lowering_for("gpu"):
            traced = function.trace(*arguments)
        return Compiled(0, 0, 0, time.perf_counter() - start, messages(traced.jaxpr, sizes), has_splash(traced.jaxpr))
    with lowering_for("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = function.trace(*arguments)
        memory = traced.lower().compile().memory_analysis()
    seconds = time.perf_counter() - start
    return Compiled(
        memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes, seconds,
        messages(traced.jaxpr, sizes), has_splash(traced.jaxpr),
    )  # fmt: skip


def has_splash(jaxpr: Any) -> bool:
    """Whether a program calls a kernel of splash attention, which serves all softmax layers or none."""
    return any(
        (
            e.primitive.name == "pallas_call"
            and "splash" in f"{e.params.get('name')} {e.params.get('name_and_src_info')}"
        )
        or any(has_splash(inner) for inner in _inner(e.params))
        for e in jaxpr.eqns
    )


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
    """Lines for every layout asked for, as they are compiled.

    Raises:
        UserError: a run would refuse every one of them. One of several that it would refuse is told in a line.
    """
    kind, devices = topology(name)
    chip, shape = CHIPS[kind], config.batch_shape
    yield f"{name}: {len(devices)} chips of {chip.memory / GIB:.0f} GiB and {chip.flops / 1e12:.0f} TFLOP/s"
    asked = f"{config.rollout.prompts} x {config.rollout.responses} answers in {shape.updates} updates"
    cut = f"{shape.micro_batches} micro-batches x {shape.rows} rows x {shape.tokens:,} tokens"
    yield f"The updates of a generation batch at its longest: {asked} x {cut}"
    refused = 0
    for sizes in meshes:
        yield ""
        what = f"Update over {shown(sizes)}"
        try:
            here, mesh = laid_out(config, sizes, devices)
            what = f"Update over {shown(here.mesh)}"
            made = compile_update(here, mesh)
        except UserError as error:
            if len(meshes) == 1:
                raise
            refused += 1
            yield f"{what}: A RUN WOULD REFUSE IT: {error}"
            continue
        except jax.errors.JaxRuntimeError as error:
            yield f"{what}: {_too_large(error)}"
            continue
        yield f"{what} ({made.how})"
        moments = config.optimizer.moments
        parts = count.training_bytes(here.model, shape.rows, shape.tokens, moments, blocked=not made.splash)
        yield from table(["memory of a chip", "GiB", "of it"], memory_rows(parts, made, chip, SHORT))
        yield from message_table(made, table)
        yield from table(["of the batch", ""], time_rows(here, made, chip, run))
        yield from reference_lines(here, parts["parameters"])
        if decode:
            yield ""
            peak = made.peak or SHORT * sum(parts.values())
            state = parts["parameters"] + parts["AdamW's moments"]
            yield from decode_lines(here, mesh, chip, peak, state, table)
    if refused == len(meshes):
        raise UserError(f"--mesh: a run would refuse all {refused} layouts; the line of each says why")


def decode_lines(
    config: RLConfig, mesh: Mesh, chip: Chip, update_peak: float, state: float, table: Any
) -> Iterator[str]:
    """Lines about a token of decoding; a trainer beside it has `state` bytes, and at its fullest `update_peak`."""
    rows, slots, model = config.rollout.engine_rows, config.batch_shape.tokens, config.model
    what = f"One token of {rows} answers"
    try:
        made = compile_decode(config, mesh)
    except UserError as error:
        yield f"{what} over {shown(config.mesh)}: A RUN'S OWN ENGINE WOULD REFUSE IT: {error}"
        return
    except jax.errors.JaxRuntimeError as error:
        yield f"{what} over {shown(config.mesh)}: {_too_large(error)}"
        return
    yield f"{what} behind {slots:,} tokens, weights in {model.dtype}, no trainer's state beside them ({made.how})"
    yield from message_table(made, table)
    parts = count.decoding_bytes(model, rows, slots)
    yield from table(["memory of a chip", "GiB", "of it"], memory_rows(parts, made, chip))
    # While it updates a trainer finds the engine's weights in place, while answers are sampled its state is.
    weights, peak = next(iter(parts.values())), made.peak or sum(parts.values())
    together = max(update_peak + weights, state + peak)
    if config.mesh.along(GATHERED) == 1 and model.param_dtype == model.dtype:
        together -= weights  # they are the trainer's
    fits = "beside" if together < chip.memory else "NOT beside"
    yield f"  {fits} a trainer on the same chips: together {together / GIB:.2f} GiB of {chip.memory / GIB:.2f}"
    if made.peak:
        seconds = made.arguments / chip.reads + sum(talk(config.mesh, made, chip))
        least = f"seconds, at the least: all read once at {chip.reads / 1e9:,.0f} GB/s, then messages"
        yield from table(["of a token", ""], [
            [least, f"{seconds:.2g}"],
            ["tokens a second of all chips, at the most", f"{rows / seconds:,.0f}"],
        ])  # fmt: skip


def shown(sizes: MeshConfig) -> str:
    return " x ".join(f"{axis} {n}" for axis, n in sizes.sizes.items() if n > 1) or "one device"


def _too_large(error: Exception) -> str:
    """That a program does not fit, in the compiler's words; any other error is raised again."""
    told = str(error).strip().split("\n")[0]
    if "RESOURCE_EXHAUSTED" not in told:
        raise error
    return f"IT DOES NOT FIT: {told.partition('RESOURCE_EXHAUSTED: ')[2][:200]}"


def memory_rows(parts: Mapping[str, float], made: Compiled, chip: Chip, short: float = 1.0) -> list[list[str]]:
    """What is counted, and what the compiler says; where there was none, `short` times what is counted."""
    rows = [[f"{what}, counted", f"{size / GIB:.2f}", f"{size / chip.memory:.0%}"] for what, size in parts.items()]
    total = sum(parts.values())
    if made.peak:
        rows.append(
            ["all that is counted", f"{total / GIB:.2f}", f"{total / made.peak - 1:+.0%} of the compiler's peak"]
        )
        compiled = (("arguments", made.arguments), ("temporary", made.temporary), ("peak", made.peak))
        rows += [[f"{what}, by the compiler", f"{n / GIB:.2f}", f"{n / chip.memory:.0%}"] for what, n in compiled]
        return [*rows, fit(made.peak, chip)]
    rows.append(["all that is counted", f"{total / GIB:.2f}", f"{total / chip.memory:.0%}"])
    if short > 1:
        likely = f"x {short}, as much as the TPU compiler took over it for MiniMax-M1"
        rows.append([likely, f"{short * total / GIB:.2f}", f"{short * total / chip.memory:.0%}"])
    return [*rows, fit(short * total, chip)]


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


def talk(mesh: MeshConfig, made: Compiled, chip: Chip) -> tuple[float, float]:
    """Seconds of messages: of groups of chips that `link` joins, and of groups that reach beyond.

    Chips are numbered with the last axis of the mesh the fastest, so a group lies within its slowest axis and all axes
    behind that one.
    """
    joined = beyond = 0.0
    for (_, axes), size in made.messages.items():
        slowest = min(AXES.index(axis) for axis in axes.split(" x "))
        span = mesh.along(AXES[slowest:])
        if not chip.host or mesh.devices <= chip.host or chip.host % span == 0:
            joined += size / chip.link
        else:
            beyond += size / chip.between
    return joined, beyond


def forward_flops(config: RLConfig) -> float:
    """Of one forward pass over a generation batch at its longest."""
    shape = config.batch_shape
    rows = shape.updates * shape.micro_batches * shape.rows
    return rows * count.sequence_flops(count.footprint(config.model), shape.tokens)


def time_rows(config: RLConfig, made: Compiled, chip: Chip, run: Any) -> list[list[str]]:
    shape, devices, price = config.batch_shape, config.mesh.devices, run.dollars_per_gpu_hour or chip.dollars
    tokens = shape.updates * shape.micro_batches * shape.rows * shape.tokens * config.update.passes
    passes, which = count.training_passes(config.model.remat) * config.update.passes, ""
    if config.loss.ratio_anchor == "trainer":
        passes, which = passes + 1, ", a forward pass for the trainer's anchor among them"
    flops = forward_flops(config) * passes
    busy = flops / devices / chip.flops / run.training_utilisation
    joined, beyond = talk(config.mesh, made, chip)
    said = [f"seconds of messages, at {chip.link / 1e9:.0f} GB/s", f"{joined:,.0f}"]
    if chip.host:
        said[0] += f" within {chip.host} chips + at {chip.between / 1e9:.0f} GB/s beyond"
        said[1] += f" + {beyond:,.0f}"
    hours = (max(busy, joined + beyond) / 3600, (busy + joined + beyond) / 3600)
    return [
        [f"FLOPs of a chip{which}", f"{flops / devices:.3g}"],
        [
            f"seconds of computing, at {run.training_utilisation:.0%} of the peak (--training_utilisation)",
            f"{busy:,.0f}",
        ],
        said,
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


def reference_lines(config: RLConfig, parameters: float) -> list[str]:
    """What the frozen reference adds, whose program is another one; `parameters` are the bytes of a chip's."""
    if not config.loss.kl_coefficient:
        return []
    flops = forward_flops(config) / config.mesh.devices
    return [
        f"  not in it: the forward pass of the reference (loss.kl_coefficient), {flops:.3g} FLOPs of a chip, and its "
        f"copy of the parameters, {parameters / GIB:.2f} GiB"
    ]
