"""What a model costs before anything runs: parameters, FLOPs, bytes, the claims of the M1 report, dollars. Seconds.

    python -m experiments.plan                                        # MiniMax-M1: tables, and runs/plan/flops.png
    python -m experiments.plan --model=tiny --batch=512 --context 128 1K
    python -m experiments.plan --config=configs/rl_tiny_cpu.py        # the model of a run's config
    python -m experiments.plan --accounting=full --dollars_per_gpu_hour=3
    python -m experiments.plan --aot=v5p:8x8x8 --config=configs/rl_m1.py      # compiled for 512 chips: minutes

It counts (m1jax/model/accounting.py) and, but for the last, never starts JAX. How fast a machine is it does not know:
what time and money follow from is a flag, and every flag's value and source is printed with the result.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from configs import models
from experiments import cli
from m1jax.config import build
from m1jax.errors import UserError
from m1jax.mesh import AXES, MeshConfig
from m1jax.model import accounting as count
from m1jax.model.accounting import ACCOUNTINGS, DEEPSEEK_R1, QWEN3_235B, Footprint
from m1jax.model.config import ModelConfig

MODELS = {name: make for name, make in vars(models).items() if inspect.isfunction(make)}

K = 1024
CONTEXTS = (8 * K, 32 * K, 64 * K, 128 * K, 256 * K, 512 * K, K * K)
LENGTHS = (8 * K, 16 * K, 32 * K, 64 * K, 100_000, 128 * K, 256 * K, 512 * K, K * K)

PLAIN = tuple(name for name in ACCOUNTINGS if name != "absorbed")
"""Where latent attention is absent, absorbed is causal."""

R1, QWEN3, M1 = "DeepSeek-R1", "Qwen3-235B-A22B", "MiniMax-M1"

CLAIMS = {64 * K: "under 0.50", 100_000: "about 0.25"}
"""M1's FLOPs over R1's in the text of the M1 report (arXiv 2506.13585, abstract and section 1)."""

FIGURE_1 = {R1: (7.545e10, 3.498e6), QWEN3: (4.306e10, 2.310e6), M1: (1.0455e11, 1.964e5)}
"""(b, c) of F(n) = b n + c n^2: the curves of the report's Figure 1 (right), a vector graphic, read out of the PDF and
fitted, with an error of 3e-5 of the axis; up to 128K tokens, which on its axis is 131,072."""


def assumed(value: Any, source: str) -> Any:
    """A field of `Run` with where its value comes from."""
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True)
class Run:
    """What the cost of an RL run is computed from. Each is a flag."""

    devices: int = assumed(512, "report: H800 GPUs")
    days: float = assumed(21.0, "report: three weeks")
    dollars: float = assumed(534_700.0, "report: rent of the run")
    dollars_per_gpu_hour: float = assumed(0.0, "0: what the three above imply")
    peak_tflops: float = assumed(989.0, "NVIDIA's data sheet of the H100 SXM, dense bfloat16; the H800 computes alike")
    response_tokens: int = assumed(20_000, "assumed; Figure 4 of the report: mean lengths of 12K to 28K")
    rollout_utilisation: float = assumed(0.1, "assumed; not published")
    training_utilisation: float = assumed(0.3, "assumed; not published")
    updates_per_token: float = assumed(1.0, "assumed: each token is trained on once, prompts are free")
    training_passes: int = assumed(4, "assumed: layers are computed again (remat); 3 without")
    updates: int = assumed(4250, "Figure 4 of the report: its axis ends at 4,000 to 4,500 steps, taken for updates")
    responses_per_update: int = assumed(512, "configs/rl_m1.py: DAPO's 512 x 16 in 16 updates; not published")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if not 0 <= value < float("inf") or (value == 0 and f.name != "dollars_per_gpu_hour"):
                raise UserError(f"--{f.name}={value}: must be above 0")
            if f.name.endswith("utilisation") and value > 1:
                raise UserError(f"--{f.name}={value}: a share of the peak is at most 1")

    @property
    def gpu_hours(self) -> float:
        return self.devices * self.days * 24

    @property
    def price(self) -> float:
        """US dollars of one GPU for an hour."""
        return self.dollars_per_gpu_hour or self.dollars / self.gpu_hours


def main(argv: Sequence[str] | None = None) -> int:
    return cli.guard(lambda: plan(parse(argv)), uses_jax=False)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: a flag or a value that does not exist.
    """
    parser = cli.Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", choices=tuple(MODELS), default="m1", help="a shape of configs/models.py")
    what.add_argument("--config", metavar="FILE.py[:ARGUMENT]", help="config file whose model section is meant")
    parser.add_argument("--batch", type=int, default=1, metavar="ROWS", help="sequences that decode together")
    about = "context lengths, 65536 or 64K (default: 8K to 1M)"
    parser.add_argument("--context", type=tokens, nargs="+", metavar="TOKENS", help=about)
    about = "how attention is counted (tables: causal; picture: chart)"
    parser.add_argument("--accounting", choices=tuple(ACCOUNTINGS), help=about)
    parser.add_argument("--workdir", type=Path, default=Path("runs/plan"), metavar="DIR", help="where flops.png goes")
    about = "compile the update of --config for these chips, v5p:8x8x8 for example; needs the extra `plan`"
    parser.add_argument("--aot", metavar="TOPOLOGY", help=about)
    about = "with --aot, a layout in place of the config's, fsdp=16,expert=8,tensor=4 for example"
    parser.add_argument("--mesh", type=layout, nargs="+", metavar="LAYOUT", help=about)
    parser.add_argument("--decode", action="store_true", help="with --aot, compile the decoding of a token too")
    for f in fields(Run):
        kind = type(f.default)
        parser.add_argument(f"--{f.name}", type=kind, default=f.default, metavar="N", help=f.metadata["source"])
    parser.epilog = "With --aot, any value of the config: --config.section.key=VALUE"
    flags, overrides = cli.split_overrides(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(flags, argparse.Namespace(overrides=overrides))
    if overrides and not arguments.aot:
        raise UserError(f"{overrides[0]}: overrides are for --aot=TOPOLOGY; the tables are of the model as it is")
    if arguments.batch < 1:
        raise UserError(f"--batch={arguments.batch}: must be at least 1")
    if arguments.aot:
        for name, value in vars(arguments).items():
            if name not in ("overrides", *READ_BY_AOT) and value != parser.get_default(name):
                read = ", ".join(f"--{flag}" for flag in READ_BY_AOT[1:])
                raise UserError(f"--{name}: is for the tables; with --aot act {read} and --config.section.key=VALUE")
    return arguments


READ_BY_AOT = ("aot", "config", "mesh", "decode", "dollars_per_gpu_hour", "training_utilisation")
"""The flags that `compile_ahead` reads."""


def tokens(text: str) -> int:
    """65536 of "65536", "65,536" or "64K"; K is 1024 and M is 1024 K."""
    number, unit = text.replace(",", ""), 1
    if number[-1:].upper() in ("K", "M"):
        number, unit = number[:-1], K if number[-1].upper() == "K" else K * K
    if not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 65536 or 64K")
    return int(number) * unit


def layout(text: str) -> dict[str, int]:
    """fsdp=16,expert=8 as devices along each axis; `data` takes what is left where it is not among them."""
    try:
        pairs = dict(part.split("=") for part in text.split(","))
        sizes = {"data": 0} | {axis: int(n) for axis, n in pairs.items()}
        if unknown := set(sizes) - set(AXES):
            raise ValueError(f"no axis {min(unknown)}")
        MeshConfig().of_sizes(sizes)
        return sizes
    except (ValueError, TypeError) as error:
        told = f"{text!r} is no layout ({error}); write fsdp=16,expert=8,tensor=4"
        raise argparse.ArgumentTypeError(told) from error


def compile_ahead(arguments: argparse.Namespace) -> None:
    """Compile for devices that are not here, and print what comes of it."""
    from experiments import plan_aot

    a = arguments
    if a.config is None:
        raise UserError(f"--aot={a.aot}: which run? give its --config, configs/rl_m1.py for example")
    from m1jax.rl.settings import RLConfig

    config = build(RLConfig, cli.load_config(a.config, a.overrides))
    run = Run(**{f.name: getattr(a, f.name) for f in fields(Run)})
    shown = partial(table, left=(0, 1))
    meshes = [config.mesh.of_sizes(sizes) for sizes in a.mesh or ()] or [config.mesh]
    for line in plan_aot.report(a.aot, config, meshes, run, shown, a.decode):
        print(line, flush=True)


def plan(arguments: argparse.Namespace) -> None:
    """Print every table and draw the picture."""
    a = arguments
    if a.aot:
        return compile_ahead(a)
    if a.mesh or a.decode:
        raise UserError("--mesh and --decode say what to compile; give --aot=TOPOLOGY with them")
    run = Run(**{f.name: getattr(a, f.name) for f in fields(Run)})
    name, config, moments = chosen_model(a.model, a.config)
    contexts = chosen_contexts(a.context, config)
    accounting = a.accounting or "causal"
    shapes = {name: count.footprint(config), R1: DEEPSEEK_R1.footprint(), QWEN3: count.footprint(QWEN3_235B)}
    blocks = (
        parameter_lines(name, config),
        flop_lines(shapes[name], config, contexts, accounting),
        fixed_byte_lines(config, a.batch, moments),
        cache_byte_lines(shapes, config, a.batch, contexts),
        comparison_lines(shapes, accounting),
        ratio_lines(shapes),
        cost_lines(shapes[name], run, accounting),
    )
    print("\n\n".join("\n".join(block) for block in blocks))
    path = a.workdir / "flops.png"
    try:
        a.workdir.mkdir(parents=True, exist_ok=True)
        draw(path, shapes, a.accounting or "chart")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --workdir") from error
    print(f"\nwritten: {path}")


MOMENTS = {"": "the parameters' dtypes", "float32": "float32", "bfloat16": "bfloat16"}
"""What `optimizer.moments` of a config may be, in words."""


def chosen_model(model: str, config: str | None) -> tuple[str, ModelConfig, tuple[str, ...]]:
    """Name and shape of what the flags ask for, and the dtypes of AdamW's moments: the config's, or any."""
    if config is None:
        name = M1 if model == "m1" else model
        return name, build(ModelConfig, MODELS[model]().to_dict(), f"models.{model}"), tuple(MOMENTS)
    values = cli.load_config(config)
    if "model" not in values:
        raise UserError(f"{config}: has no section model")
    optimizer = values.get("optimizer")
    moments = optimizer.get("moments", "") if isinstance(optimizer, dict) else ""
    if moments not in tuple(MOMENTS):
        raise UserError(f"config.optimizer.moments: {moments!r} must be one of {tuple(MOMENTS)}")
    return Path(config.partition(":")[0]).stem, build(ModelConfig, values["model"], "config.model"), (moments,)


def chosen_contexts(asked: Sequence[int] | None, config: ModelConfig) -> tuple[int, ...]:
    """The context lengths asked for, or those of CONTEXTS that the model was made for."""
    longest = config.max_positions or max([*CONTEXTS, *(asked or ())])
    for length in asked or ():
        if length > longest:
            raise UserError(f"--context={length}: the model was made for {longest:,} tokens at most (max_positions)")
    return tuple(asked or (n for n in CONTEXTS if n <= longest)) or (longest,)


# Tables --------------------------------------------------------------------------------------------------------------


def parameter_lines(name: str, config: ModelConfig) -> list[str]:
    p = count.parameters(config)
    rows = [[part, f"{n:,}", f"{n / p.total:.2%}"] for part, n in p.parts.items() if n]
    rows += [
        ["total", f"{p.total:,}", ""],
        ["active per token, without embedding and head", f"{p.active:,}", f"{p.active / p.total:.2%}"],
        ["active per token, with the head (N_act)", f"{p.active_with_head:,}", f"{p.active_with_head / p.total:.2%}"],
        ["active per token, with both", f"{p.active_with_both:,}", f"{p.active_with_both / p.total:.2%}"],
    ]
    return [f"Parameters of {name}", *table(["part", "parameters", "share"], rows)]


def flop_lines(shape: Footprint, config: ModelConfig, contexts: Sequence[int], accounting: str) -> list[str]:
    rows = [
        [
            length(n),
            si(count.prefill_flops(shape, n, accounting) / n),
            si(count.decode_flops(shape, n, accounting)),
            si(count.train_flops(shape, n, accounting) / n),
            si(count.train_flops(shape, n, accounting, remat="layer") / n),
            f"{count.attention_flops(shape, accounting) * n**2 / count.sequence_flops(shape, n, accounting):.1%}",
        ]
        for n in contexts
    ]
    kappa = count.attention_flops(shape, accounting)
    return [
        f"FLOPs per token, accounting {accounting}: {ACCOUNTINGS[accounting]}",
        *table(["tokens", "prefill", "decode there", "train, 3 passes", "train, remat", "softmax share"], rows),
        f"  F(n) = 2 N_act n + kappa n^2 + lin n; kappa {kappa:,}, lin {shape.lightning_flops:,}",
        "  prefill, train, share: means over n tokens; prefill has logits at its end only",
        f"  this config: remat={config.remat!r}, {count.training_passes(config.remat)} passes",
    ]


def fixed_byte_lines(config: ModelConfig, batch: int, moments: Sequence[str]) -> list[str]:
    weights = count.weight_bytes(config)
    rows = [
        [f"weights ({config.param_dtype}; router gates at least float32)", size(weights)],
        ["gradients of a micro-batch, in the parameters' dtypes", size(weights)],
        *(
            [
                f"AdamW's m and v in {MOMENTS[kind]} (optimizer.moments={kind!r})",
                size(count.optimizer_bytes(config, kind)),
            ]
            for kind in moments
        ),
        [
            "AdamW's m and v in float32, and master weights of what is narrower (no such master weights here)",
            size(count.optimizer_bytes(config, "float32", master=True)),
        ],
        [f"logits of one token a row, batch {batch}", size(count.logits_bytes(config, batch))],
        [f"lightning states, batch {batch}", size(count.state_bytes(config, batch))],
    ]
    return ["Bytes that do not grow with the context", *table(["", "size"], rows)]


def cache_byte_lines(
    shapes: dict[str, Footprint], config: ModelConfig, batch: int, contexts: Sequence[int]
) -> list[str]:
    rows = [
        [
            length(n),
            size(count.kv_bytes(config, batch, n)),
            size(count.cache_bytes(config, batch, n)),
            *(size(batch * (shapes[peer].cache_bytes * n + shapes[peer].state_bytes)) for peer in (R1, QWEN3)),
            size(count.logits_bytes(config, batch * n)),
        ]
        for n in contexts
    ]
    return [
        f"Bytes while decoding, batch {batch}, by context; keys and values in {config.dtype}",
        *table(["tokens", "keys, values", "whole cache", f"of {R1}", f"of {QWEN3}", "logits of all"], rows),
        "  whole cache: with states and slot tables. Peers in bfloat16, R1's cache latent. Logits never exist at once:",
        "  training holds ModelConfig.head_rows tokens' at a time, decoding one a row",
    ]


def comparison_lines(shapes: dict[str, Footprint], accounting: str) -> list[str]:
    own = next(iter(shapes))
    rows = [
        [length(n)] + [si(count.generation_flops(shape, n, accounting)) for shape in shapes.values()] for n in LENGTHS
    ]
    return [
        f"FLOPs of generating n tokens, accounting {accounting}",
        *table(["tokens", own, R1, QWEN3], rows),
        f"  N_act of {R1} {shapes[R1].active:,}, of {QWEN3} {shapes[QWEN3].active:,}",
    ]


def ratio_lines(shapes: dict[str, Footprint]) -> list[str]:
    own = next(iter(shapes))
    is_m1 = own == M1
    to_r1, to_qwen3 = (
        [[length(n), *(f"{ratio(shapes[own], shapes[peer], n, name):.3f}" for name in names)] for n in LENGTHS]
        for peer, names in ((R1, ACCOUNTINGS), (QWEN3, PLAIN))
    )
    if is_m1:
        for n, row in zip(LENGTHS, to_r1, strict=True):
            row += [f"{figure_1(M1, n) / figure_1(R1, n):.3f}" if n <= 128 * K else "", CLAIMS.get(n, "")]
    notes = [f"  {accounting:<9} {about}" for accounting, about in ACCOUNTINGS.items()]
    if is_m1:
        notes += figure_1_notes(shapes)
    return [
        f"FLOPs of {own} over those of {R1}, n tokens generated",
        *table(["tokens", *ACCOUNTINGS, *(["Figure 1", "the report says"] if is_m1 else [])], to_r1),
        *notes,
        "",
        f"FLOPs of {own} over those of {QWEN3}, n tokens generated",
        *table(["tokens", *PLAIN], to_qwen3),
    ]


def figure_1_notes(shapes: dict[str, Footprint]) -> list[str]:
    """Where the drawn curves and the published shapes part."""
    beyond = (f"{FIGURE_1[name][0] - 2 * shape.active:.1e} ({name})" for name, shape in shapes.items())
    quadratic = (f"{FIGURE_1[name][1] / count.attention_flops(s, 'chart'):.3f} ({name})" for name, s in shapes.items())
    return [
        "  Figure 1  the curves as drawn, up to 128K; K is 1024. Against the shapes and its own mix they have",
        f"            FLOPs per token beyond 2 N_act: {', '.join(beyond)}",
        f"            n^2 terms over ours: {', '.join(quadratic)}",
        "            (8 softmax layers instead of the released 10 would give 0.800)",
    ]


def cost_lines(shape: Footprint, run: Run, accounting: str) -> list[str]:
    assumptions = []
    for f in fields(Run):
        value = getattr(run, f.name)
        assumptions.append([f"--{f.name}", f"{value:,}", f.metadata["source"] if value == f.default else "given"])
    forward = count.generation_flops(shape, run.response_tokens, accounting)
    rollout, training = forward, forward * run.training_passes * run.updates_per_token
    responses = 1e9 / run.response_tokens
    cost = count.run_cost(
        responses * rollout,
        responses * training,
        devices=run.devices,
        peak_flops=run.peak_tflops * 1e12,
        rollout_utilisation=run.rollout_utilisation,
        training_utilisation=run.training_utilisation,
        dollars_per_gpu_hour=run.price,
    )
    bought = run.gpu_hours / cost.gpu_hours
    made = run.updates * run.responses_per_update
    share = made * (rollout + training) / (run.gpu_hours * 3600 * run.peak_tflops * 1e12)
    rows = [
        ["GPU-hours of the run: devices * days * 24", f"{run.gpu_hours:,.0f}"],
        ["dollars per GPU-hour: dollars / GPU-hours, unless given", f"{run.price:.2f}"],
        ["FLOPs of one response: rollout", si(rollout)],
        ["FLOPs of one response: training", si(training)],
        ["1e9 response tokens: GPU-hours", f"{cost.gpu_hours:,.1f}"],
        [f"1e9 response tokens: hours on {run.devices} GPUs", f"{cost.hours:,.2f}"],
        ["1e9 response tokens: dollars", f"{cost.dollars:,.0f}"],
        ["response tokens that the run's GPU-hours pay for, 1e9", f"{bought:,.0f}"],
        ["responses that the run's GPU-hours pay for, 1e6", f"{bought * responses / 1e6:,.1f}"],
        ["response tokens of the updates, 1e9", f"{made * run.response_tokens / 1e9:,.1f}"],
        ["utilisation of all GPU-hours that these imply", f"{share:.1%}"],
    ]
    return [
        f"An RL run, accounting {accounting}",
        *table(["assumption", "value", "source"], assumptions, left=(0, 2)),
        "",
        *table(["result", ""], rows),
        "  not counted: verifiers, evaluation, weight sync, idle tails of a batch, restarts, discarded groups",
    ]


def ratio(own: Footprint, other: Footprint, n: int, accounting: str) -> float:
    """FLOPs of n generated tokens over another's."""
    return count.generation_flops(own, n, accounting) / count.generation_flops(other, n, accounting)


def figure_1(model: str, n: float) -> float:
    """FLOPs of n generated tokens as the report's Figure 1 draws them."""
    linear, quadratic = FIGURE_1[model]
    return linear * n + quadratic * n**2


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of equal columns: those of `left` to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    pad = lambda i, cell: cell.ljust(widths[i]) if i in left else cell.rjust(widths[i])  # noqa: E731
    return ["  " + "  ".join(pad(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines]


def length(n: int) -> str:
    """64K for 65,536, 1M for 1024K, else the number."""
    if n % (K * K) == 0:
        return f"{n // (K * K)}M"
    return f"{n // K}K" if n % K == 0 else f"{n:,}"


def si(value: float) -> str:
    """Three digits and a decimal prefix."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E", "Z", "Y"))


def size(value: float) -> str:
    """Three digits and a binary prefix."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    number, place = float(value), 0
    while number >= 999.5 and place < len(units) - 1:
        number, place = number / base, place + 1
    digits = 0 if place == 0 and number == int(number) else 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f} {units[place]}".rstrip()


# Picture -------------------------------------------------------------------------------------------------------------


def draw(path: Path, shapes: dict[str, Footprint], accounting: str) -> None:
    """The report's Figure 1 (right) from the formula, and beside it the ratio to R1 in every accounting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = next(iter(shapes))
    figure = Figure(figsize=(11.0, 4.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    curves, ratios = figure.subplots(1, 2)

    grid = [n * K for n in range(1, 129)]
    for number, (name, shape) in enumerate(shapes.items()):
        flops = [count.generation_flops(shape, n, accounting) / 1e15 for n in grid]
        curves.plot([n / K for n in grid], flops, color=f"C{number}", lw=1.6, label=name)
        if name in FIGURE_1:
            drawn = [figure_1(name, n) / 1e15 for n in grid]
            curves.plot([n / K for n in grid], drawn, color=f"C{number}", lw=1.2, ls=":")
    curves.plot([], [], color="0.4", lw=1.2, ls=":", label="as drawn in the report's Figure 1")
    curves.set_title(f"Generating n tokens, PFLOP (accounting {accounting})", fontsize=10, loc="left")
    curves.set_xlabel("n, thousands (1024) of tokens", fontsize=9)
    curves.set_xticks(range(0, 129, 16))
    curves.set_ylim(bottom=0)

    grid = [round(8 * K * 2 ** (i / 8)) for i in range(57)]
    for number, name in enumerate(ACCOUNTINGS):
        values = [ratio(shapes[own], shapes[R1], n, name) for n in grid]
        ratios.plot([n / K for n in grid], values, color=f"C{number + 3}", lw=1.6, label=name)
    if own == M1:
        ratios.scatter([64], [0.5], color="0.2", marker="v", s=36, zorder=3, label="claim at 64K: less than this")
        ratios.scatter(
            [100_000 / K], [0.25], color="0.2", marker="o", s=28, zorder=3, label="claim at 100K: about this"
        )
    ratios.set_title(f"FLOPs of {own} over those of {R1}", fontsize=10, loc="left")
    ratios.set_xscale("log", base=2)
    ticks = [8 * 2**i for i in range(8)]
    ratios.set_xticks(ticks, [length(n * K) for n in ticks])
    ratios.set_xlabel("n, tokens", fontsize=9)
    ratios.set_ylim(bottom=0)

    for axes in (curves, ratios):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.02)
        axes.legend(fontsize=8, frameon=False)
    staging = path.with_name(path.name + ".new")
    figure.savefig(staging, format="png")
    staging.replace(path)


if __name__ == "__main__":
    sys.exit(main())
