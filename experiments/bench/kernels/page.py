"""What was measured, as lines for the terminal and as a picture; the same plain values as the JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def lines(results: dict[str, Any]) -> list[str]:
    """The table of everything in `results`."""
    machine, rows = results["machine"], results["rows"]
    width = 2 + max(len(row["shape"]) for row in rows)
    rates = [(row["flops_per_second"] / 1e12, row["bytes_per_second"] / 1e9) for row in rows]
    tflops, gigabytes = ([min(each), max(each)] for each in zip(*rates, strict=True))
    out = [
        f"{machine['cpu']}, {machine['cores']} cores to run on; {machine['devices']} {machine['backend']} device(s)",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"{results['dtype']}; medians of {results['rounds']} interleaved rounds; roofline of a dense product at "
        f"{tflops[0]:.3g} to {tflops[1]:.3g} TFLOP/s and a copy at {gigabytes[0]:.3g} to {gigabytes[1]:.3g} GB/s",
        "",
        f"{'':<{width + 42}}{'ms':>10}{'floor ms':>10}{'of floor':>10}   times as fast as",
    ]
    operation = None
    for row in rows:
        out += [row["op"]] * (row["op"] != operation)
        operation = row["op"]
        floor = f"{'peer':>20}" if row["peer"] else f"{1e3 * row['floor']:>10.3f}{row['fraction']:>10.0%}"
        ratios = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in row["ratios"].items())
        name = f"  {row['shape']:<{width}}{row['pass']:<17}{row['program']:<23}"
        out.append(f"{name}{1e3 * row['seconds']:>10.3f}{floor}   {ratios}".rstrip())
    if results["growth"]:
        out += ["", "lightning against length, seconds ~ tokens^p"]
        out += [f"  {name:<40}p = {slope:.2f}" for name, slope in results["growth"].items()]
    return out + (["", "notes:", *(f"  {line}" for line in results["notes"])] if results["notes"] else [])


def draw(path: Path, results: dict[str, Any]) -> None:
    """Shares of the roofline as bars, and lightning attention and its peers against length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if not row["peer"]]
    figure = Figure(figsize=(14, max(4.0, 0.24 * len(rows) + 1.2)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    machine = results["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['backend']}, jax {machine['versions']['jax']}", fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(dict.fromkeys(row["program"] for row in rows))
    places = range(len(rows))[::-1]
    bars = left.barh(
        places, [100 * row["fraction"] for row in rows], color=[f"C{names.index(r['program'])}" for r in rows]
    )
    left.bar_label(bars, [_times(row) for row in rows], fontsize=7, padding=3)
    left.set_yticks(places, [f"{r['op']} {r['shape']}, {r['pass']}, {r['program']}" for r in rows], fontsize=7)
    left.set_xlabel("% of the roofline; times as fast as peers")
    left.margins(x=0.3)
    grown = [row for row in results["rows"] if row["op"] == "growth"]
    programs, lengths = (
        list(dict.fromkeys(each)) for each in ([r["program"] for r in grown], [r["dims"]["T"] for r in grown])
    )
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in grown:
        curves.setdefault((row["program"], row["pass"]), []).append((row["dims"]["T"], 1e3 * row["seconds"]))
    for (name, way), points in curves.items():
        style = {"color": f"C{programs.index(name)}", "ls": "-" if way == "forward" else "--"}
        right.plot(*zip(*points, strict=True), marker="o", ms=4, label=f"{name} {way}", **style)
    right.set_yscale("log")
    right.set_xscale("log", base=2)
    right.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths], fontsize=8)
    right.set_xlabel("tokens")
    right.set_ylabel("milliseconds")
    right.set_title("Lightning attention against length", fontsize=10, loc="left")
    if curves:
        right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _times(row: dict[str, Any]) -> str:
    return ", ".join(f"{peer} {ratio:.1f}x" for peer, ratio in row["ratios"].items())
