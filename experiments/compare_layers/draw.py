"""The pictures of compare_layers: what was measured by layer, on logarithmic axes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.compare_layers.goldens import Check
from experiments.compare_layers.modes import Comparison
from m1jax.errors import UserError
from m1jax.train.checkpoint import is_disk_full

FLOOR = 1e-9
"""Where an error of nothing is drawn."""


def draw_checks(checks: Sequence[Check], path: str) -> None:
    """Error as a share of the tolerance, by layer for arrays that have layers, one point for those that have none."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.add_subplot()
    groups: dict[str, list[Check]] = {}
    for check in checks:
        kind = "gradients" if check.array.startswith("gradient of") else check.array
        groups.setdefault(f"{kind}, {check.path}", []).append(check)
    last = max((c.layer for c in checks if c.layer is not None), default=0)
    single = 0
    for name, group in groups.items():
        by_layer: dict[int, float] = {}
        for check in group:
            if check.layer is None:
                continue
            by_layer[check.layer] = max(by_layer.get(check.layer, 0.0), _height(check))
        if by_layer:
            axes.semilogy(list(by_layer), list(by_layer.values()), marker=".", lw=1, label=name)
        for check in group:
            if check.layer is None and "gradient" not in check.array:
                single += 1
                axes.semilogy([last + single], [_height(check)], marker="x", ls="", label=name)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set(xlabel="layer; to the right of the layers: what comes after them", ylabel="error / tolerance")
    axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def draw_modes(comparisons: Mapping[str, Comparison], kinds: Sequence[str], path: str) -> None:
    """Relative error and largest activation by layer, and how far the token probabilities part under either head."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    errors, activations, heads = figure.subplots(1, 3)
    places = np.arange(len(kinds) + 1)
    for name, c in comparisons.items():
        errors.semilogy(places, [max(e, FLOOR) for e in c.errors], marker=".", label=name)
        activations.semilogy(places, [max(a, FLOOR) for a in c.largest], marker=".", label=name)
    for axes, title in ((errors, "relative error of the output"), (activations, "largest activation")):
        axes.set(xlabel="layer; the last point is the head's input", title=title)
        for i, kind in enumerate(kinds):
            if kind == "softmax" and "lightning" in kinds:
                axes.axvline(i, color="0.85", zorder=0)
    errors.legend(fontsize=7)
    width = 0.35
    for i, dtype in enumerate(("float32", "bfloat16")):
        gaps = [max(1 - c.heads[dtype].correlation, FLOOR) for c in comparisons.values()]
        heads.bar(np.arange(len(gaps)) + (i - 0.5) * width, gaps, width, label=f"{dtype} head")
    heads.set_yscale("log")
    heads.set_xticks(np.arange(len(comparisons)), [n.replace(", ", ",\n") for n in comparisons], fontsize=6)
    heads.set(title="1 - correlation of token probabilities")
    heads.legend(fontsize=7)
    _save(figure, path)


def require_writable(path: str) -> None:
    """Refuse a picture's path before anything is computed.

    Raises:
        UserError: a folder lies there, or none can be made or written to.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"--out={path}: is a folder; give the name of a file")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(target if target.exists() else above, os.W_OK):
        raise UserError(f"--out={path}: cannot be written; give a file in a folder that you can write to")


def _height(check: Check) -> float:
    """Where a check is drawn: what has no share of its tolerance stands just beyond it."""
    return max(check.share, FLOOR) if np.isfinite(check.share) else 2.0


def _save(figure: Figure, path: str) -> None:
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(target)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--out={path}: cannot be written ({error.strerror})") from error
