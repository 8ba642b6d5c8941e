"""Leaves written in pieces: the same values as any checkpoint's, and memory that neither bytes nor pieces raise."""

from __future__ import annotations

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from m1jax.train import leaf_store
from m1jax.train.leaf_store import LazyLeaf, StoredLeaves, write_leaves

MEASURED = """
import json, re, sys, threading
from pathlib import Path
import numpy as np
from m1jax.train.leaf_store import LazyLeaf, write_leaves

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, own())
        over.wait(0.002)

def write(name, pieces, values):
    draw = np.random.default_rng(0).standard_normal
    made = lambda: (((i,), draw(values, np.float32)) for i in range(pieces))
    write_leaves(Path(sys.argv[1]) / name, {("leaf",): LazyLeaf((pieces, values), np.dtype(np.float32), made, 1)})

over = threading.Event()
write("first", 4, 1024)  # what the libraries take once
threading.Thread(target=watch, daemon=True).start()
grown = {}
for name, pieces, values in (("64 MB", 64, 1 << 18), ("256 MB", 256, 1 << 18), ("4096 pieces", 4096, 1024)):
    before = peak = own()
    write(name, pieces, values)
    grown[name] = (peak - before) / 1e6
print(json.dumps(grown))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_bounded_by_a_batch(tmp_path):
    """With a commit for every piece and Orbax's cache, 4,096 small pieces took 250 MB; a buffered leaf takes 256."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert max(grown.values()) < 100, grown
    # By the piece each commit would write the list of all pieces anew: room by the square of their number.
    room = sum(f.stat().st_size for f in (tmp_path / "4096 pieces").rglob("*") if f.is_file())
    assert room < 1.2 * 4096 * 4096, room


@pytest.mark.parametrize("batch", [1, 100, 1 << 20])
def test_values_by_the_piece_by_a_few_and_all_at_once(batch, tmp_path, monkeypatch):
    """Pieces of 24 and of 40 bytes and a whole leaf; read here by the piece, by Orbax as a tree."""
    monkeypatch.setattr(leaf_store, "_BATCH", batch)
    draw = np.random.default_rng(0)
    wanted = {
        ("layers", "up"): draw.standard_normal((3, 4, 6)).astype(np.float32),
        ("layers", "down"): draw.standard_normal((5, 4, 5)).astype(ml_dtypes.bfloat16),
        ("head",): draw.standard_normal((7, 2)).astype(np.float32),
    }
    leading = {("layers", "up"): 2, ("layers", "down"): 1, ("head",): 0}

    def pieces(path):
        for index in np.ndindex(wanted[path].shape[: leading[path]]):
            yield index, wanted[path][index]

    leaves = {
        path: LazyLeaf(leaf.shape, leaf.dtype, lambda path=path: pieces(path), leading[path])
        for path, leaf in wanted.items()
    }
    write_leaves(tmp_path / "state", leaves)
    stored = StoredLeaves(tmp_path / "state")
    with ocp.PyTreeCheckpointer() as orbax:
        tree = orbax.restore(tmp_path / "state")["params"]
    whole = {
        ("layers", "up"): tree["layers"]["up"],
        ("layers", "down"): tree["layers"]["down"],
        ("head",): tree["head"],
    }
    for path, leaf in wanted.items():
        assert stored.shapes[path] == leaf.shape and stored.dtypes[path] == leaf.dtype == whole[path].dtype
        assert np.asarray(whole[path]).tobytes() == leaf.tobytes()
        for index, piece in pieces(path):
            assert stored.read(path, index).tobytes() == piece.tobytes()


def test_pieces_that_fail_end_the_writing(tmp_path):
    """The error of whoever makes the pieces comes out; what was not committed stays away."""

    def pieces():
        yield (0,), np.ones(3, np.float32)
        raise RuntimeError("no second piece")

    with pytest.raises(RuntimeError, match="no second piece"):
        write_leaves(tmp_path / "state", {("leaf",): LazyLeaf((2, 3), np.dtype(np.float32), pieces, 1)})
    assert not (tmp_path / "state").exists()
