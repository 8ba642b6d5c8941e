"""Who may import whom, read from the source: an arrow that points the wrong way fails here, not in a year."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("m1jax", "configs", "experiments", "launch", "tests")

STAGES = (
    "prompts", "engine_local", "recorded", "shaping", "collect", "stream", "advantage", "batch", "loss", "diagnostics",
    "update", "evaluate", "monitors", "run", "loop",
)  # fmt: skip

ARROWS = {
    # room: what it must not import, itself excepted.
    "m1jax": ("configs", "experiments", "launch", "tests", "ml_collections", "absl"),
    "m1jax/types.py": (*OURS, "flax"),
    "m1jax/errors.py": (*OURS, "jax", "numpy"),
    "m1jax/config.py": ("jax", "flax", "m1jax.model", "m1jax.data", "m1jax.rewards", "m1jax.train", "m1jax.rl"),
    "m1jax/pallas_kernels": OURS,
    "m1jax/model": ("m1jax.weights", "m1jax.data", "m1jax.rewards", "m1jax.train", "m1jax.rl"),
    "m1jax/weights": ("m1jax.data", "m1jax.rewards", "m1jax.train", "m1jax.rl", "m1jax.pallas_kernels"),
    "m1jax/weights/gguf.py": ("jax", "flax", "m1jax.model", "m1jax.types", "m1jax.config"),
    "m1jax/data": ("jax", "flax", "m1jax.model", "m1jax.train", "m1jax.rl", "m1jax.pallas_kernels"),
    "m1jax/rewards": ("jax", "flax", "m1jax.model", "m1jax.data", "m1jax.train", "m1jax.rl", "m1jax.pallas_kernels"),
    "m1jax/train": ("m1jax.rl",),
    "m1jax/rl/advantage.py": ("jax", "m1jax.model", "m1jax.rl"),
    "m1jax/rl/batch.py": ("jax", "m1jax.model", "m1jax.rl"),
    "m1jax/rl/prompts.py": ("jax", "m1jax.model", "m1jax.rl"),
    "m1jax/rl/evaluate.py": ("jax", "m1jax.model", "m1jax.rl"),
    "m1jax/rl/loss.py": ("m1jax.model", "m1jax.data", "m1jax.train", "m1jax.rl"),
    "m1jax/rl/engine_local.py": ("m1jax.rl", "m1jax.train", "m1jax.rewards", "m1jax.data"),
    "m1jax/rl/stream.py": (
        "m1jax.data",
        "m1jax.rewards",
        "m1jax.train",
        *(f"m1jax.rl.{s}" for s in STAGES if s != "engine_local"),
    ),  # fmt: skip
    "m1jax/rl/update.py": (
        "m1jax.data",
        "m1jax.rewards",
        *(f"m1jax.rl.{s}" for s in STAGES if s not in ("loss", "diagnostics")),
    ),
    "m1jax/rl/diagnostics.py": (
        "m1jax.model",
        "m1jax.data",
        "m1jax.rewards",
        *(f"m1jax.rl.{s}" for s in STAGES if s != "loss"),
    ),
    # A server's environment has neither jax nor the rest of ours, and ours has neither torch nor sglang.
    "m1jax/serving": (*OURS, "jax", "flax", "numpy"),
    "configs": ("jax", "flax", "m1jax", "experiments", "launch", "tests"),
    "experiments": ("launch", "tests"),
}


def imported(source: str, package: str = "") -> set[str]:
    """Dotted names that a module imports anywhere, inside functions too; `from a import b` is both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def wrong_imports(room: str) -> list[str]:
    place = ROOT / room
    inside = room.removesuffix(".py").replace("/", ".")
    found = []
    for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
        package = ".".join(file.relative_to(ROOT).parent.parts)
        for name in sorted(imported(file.read_text(), package)):
            if not within(name, inside) and any(within(name, taboo) for taboo in ARROWS[room]):
                found.append(f"{file.relative_to(ROOT)} imports {name}")
    return found


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_point_one_way(room):
    assert (ROOT / room).exists(), f"{room} is gone: mend this table"
    assert wrong_imports(room) == []


def test_the_reader_sees_every_form_of_import():
    source = "import a.b as c\nfrom d import e\ndef f():\n    from ..g import h\n    from . import i\n"
    assert imported(source, "m1jax.rl") == {"a.b", "d", "d.e", "m1jax.g", "m1jax.g.h", "m1jax.rl", "m1jax.rl.i"}
    assert within("m1jax.rl.loop", "m1jax.rl") and not within("m1jax.rlhf", "m1jax.rl")


def test_only_serving_imports_what_a_server_brings():
    server, serving = ("torch", "sglang", "transformers", "m1jax.serving"), ROOT / "m1jax" / "serving"
    found = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted((ROOT / "m1jax").rglob("*.py"))
        if not file.is_relative_to(serving)
        for name in sorted(imported(file.read_text(), ".".join(file.relative_to(ROOT).parent.parts)))
        if any(within(name, taboo) for taboo in server)
    ]
    assert found == []


def test_only_experiments_read_the_environment():
    """A copy of it for a child process is no reading: what is asked for by name would be a hidden setting."""
    asks = re.compile(r"environ\s*(\[|\.get)|getenv")
    found = [str(f.relative_to(ROOT)) for f in sorted((ROOT / "m1jax").rglob("*.py")) if asks.search(f.read_text())]
    assert found == []
    assert asks.search((ROOT / "experiments" / "cli.py").read_text()), "the pattern sees what it should"
