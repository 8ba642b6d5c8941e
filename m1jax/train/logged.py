"""A run as one small file that can be committed: a line about it, then a line of metrics a step. NumPy only.

write_logged(path, {"seed": 0, "config": config}, rows)
read_logged(path).curve("reward/mean")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DIGITS = 5


@dataclass(frozen=True)
class Logged:
    """One run: `about` it, and its rows of metrics."""

    about: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, where it was recorded."""
        points = [(row["step"], row[name]) for row in self.rows if name in row]
        return np.array([s for s, _ in points]), np.array([v for _, v in points], float)


def read_logged(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`(about, rows)` of a file.

    Raises:
        ValueError: it has no first line, or one that is not JSON.
    """
    about, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    return about, rows


def write_logged(path: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a run, whole or not at all; of the rows' numbers five digits, and nothing of those that are None."""
    short = lambda v: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v  # noqa: E731
    lines = [about, *({k: short(v) for k, v in row.items() if v is not None} for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".new")
    staging.write_text("".join(json.dumps(line) + "\n" for line in lines))
    staging.replace(path)
