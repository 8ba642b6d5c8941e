"""What was measured, as lines for the terminal and as a picture; the same plain values as the JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def lines(results: dict[str, Any]) -> list[str]:
    """The table of everything in `results`."""
    machine = results["machine"]
    out = [
        f"{machine['cpu']}, {machine['cores']} cores to run on; {machine['devices']} {machine['backend']} device(s)",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    ]
    if core := results.get("core"):
        shape = core["shape"]
        out += [
            "",
            f"attention cores, {shape['heads']} heads of {shape['head_dim']}, block {shape['block']}, "
            f"{shape['dtype']}; milliseconds, medians of {shape['rounds']} interleaved runs",
        ]
        lengths = sorted({row["tokens"] for row in core["rows"]})
        out.append(f"{'':<28}" + "".join(f"{tokens:>9}" for tokens in lengths) + f"{'slope':>9}")
        for name, seconds in _by_name(core["rows"]).items():
            cells = (f"{1e3 * seconds[t]:>9.1f}" if t in seconds else f"{'-':>9}" for t in lengths)
            slope = f"{core['slopes'][name]:.2f}" if name in core["slopes"] else "-"
            out.append(f"{name:<28}" + "".join(cells) + f"{slope:>9}")
        out.append(f"compiling and first calls: {core['compile_seconds']:.1f} s")
    if sft := results.get("stages", {}).get("sft"):
        out += [
            "",
            f"the demo's SFT update, medians of {sft['updates']}; compiling {sft['compile_seconds']:.1f} s apart",
        ]
        out.append(f"  {'seconds':<26}{sft['seconds_per_update']:>10.3f}")
        out.append(f"  {'tokens/s':<26}{_number(sft['tokens_per_second']):>10}")
    if values := results.get("stages", {}).get("rl"):
        out += ["", f"the demo's generation batch, medians; compiling {values['compile_seconds']:.1f} s apart"]
        for stage, seconds in values["seconds_per_batch"].items():
            out.append(f"  {stage + ', seconds':<26}{seconds or 0:>10.3f}")
        out.append(f"  {'one evaluation, seconds':<26}{values['seconds_per_evaluation']:>10.3f}")
        for what in ("rollout", "update"):
            rate, tokens = values[f"{what}_tokens_per_second"], values[f"{what}_tokens"]
            out.append(f"  {what + ', tokens/s':<26}{_number(rate):>10}   {_number(tokens)} tokens a batch")
        out.append(f"  {'tokens a response':<26}{values['response_tokens']:>10.1f}")
    return out


def draw(path: Path, results: dict[str, Any]) -> None:
    """The cores on logarithmic axes, and a generation batch as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [part for part in ("core", "stages") if part in results]
    figure = Figure(figsize=(5.6 * len(parts), 4.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    machine = results["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores, jax {machine['versions']['jax']}", fontsize=10)
    for place, part in enumerate(parts, 1):
        axes = figure.add_subplot(1, len(parts), place)
        axes.spines[["top", "right"]].set_visible(False)
        if part == "core":
            for number, (name, seconds) in enumerate(_by_name(results["core"]["rows"]).items()):
                slope = results["core"]["slopes"].get(name)
                axes.loglog(
                    list(seconds), [1e3 * s for s in seconds.values()], color=f"C{number // 2}", marker="o", ms=4,
                    ls="-" if number % 2 == 0 else "--", label=name if slope is None else f"{name}, slope {slope:.2f}",
                )  # fmt: skip
            axes.set_xlabel("tokens")
            axes.set_ylabel("milliseconds")
            axes.set_title("Attention cores against length", fontsize=10, loc="left")
            axes.legend(fontsize=8, frameon=False)
        else:
            seconds = {k: v or 0.0 for k, v in results["stages"]["rl"]["seconds_per_batch"].items()}
            bars = axes.barh(list(seconds)[::-1], list(seconds.values())[::-1], color="C0")
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=3)
            axes.set_xlabel("seconds")
            axes.set_title("One generation batch of the demo", fontsize=10, loc="left")
    figure.savefig(path, format="png")


def _by_name(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Seconds by tokens of each core and pass."""
    named: dict[str, dict[int, float]] = {}
    for row in rows:
        named.setdefault(f"{row['kind']} {row['pass']}", {})[row["tokens"]] = row["seconds"]
    return named


def _number(value: float | None) -> str:
    """Thousands with commas; a dash where no group of responses had variance, so that nothing was trained on."""
    return "-" if value is None else f"{value:,.0f}"
