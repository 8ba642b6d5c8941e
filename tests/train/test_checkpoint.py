"""Checkpoints: what comes back, and what a kill, a full disk or a damaged file leaves."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.errors import UserError
from m1jax.train import checkpoint
from m1jax.train.checkpoint import Checkpoints, find_damage, restore_params, steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: Any
    opt_state: Any
    key: jax.Array
    counts: np.ndarray
    updates: Any


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(value: float = 1.0) -> State:
    params = {"layer": {"w": jnp.full((40, 50), value), "b": jnp.full(3, value, jnp.bfloat16)}}
    moments = OPTIMIZER.update(params, OPTIMIZER.init(params), params)[1]
    return State(params, moments, jax.random.key(int(value)), np.arange(5), np.int64(7))


def latest(checkpoints: Checkpoints, abstract: Any) -> tuple[int, Any, dict[str, Any]]:
    found = checkpoints.restore_latest(abstract)
    assert found is not None
    return found


def leaves(tree: Any) -> list[np.ndarray]:
    data = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [np.asarray(x) for x in jax.tree.leaves(data)]


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(leaves(found), leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def biggest_file(folder: Path) -> Path:
    return max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated": (lambda file: os.truncate(file, file.stat().st_size // 2), "bytes instead of"),
    "zero_filled": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "has changed"),
    "bit_flipped": (flip_a_bit, "has changed"),
    "deleted": (Path.unlink, "is missing"),
}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = make_state(3.0)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(state) is None
        checkpoints.save(4, state, {"cursor": 64, "config": {"betas": [0.9, 0.95]}})
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, make_state(0.0)
        )
        step, restored, meta = latest(checkpoints, abstract)
    assert (step, meta) == (4, {"cursor": 64, "config": {"betas": [0.9, 0.95]}})
    assert_same(restored, state)
    # The restored key is a key: it draws what the saved one would have drawn.
    assert jax.random.uniform(restored.key) == jax.random.uniform(jax.random.key(3))


def test_the_caller_may_donate_or_overwrite_the_state_at_once(tmp_path, monkeypatch):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    wanted = np.arange(1_000_000, dtype=np.float32)
    array = jnp.asarray(wanted.copy())
    on_host, handed_over = wanted.copy(), []
    with Checkpoints(tmp_path) as checkpoints:
        save = checkpoints._orbax.save
        monkeypatch.setattr(checkpoints._orbax, "save", lambda path, tree: (handed_over.append(tree), save(path, tree)))
        checkpoints.save(1, {"params": {"device": array, "host": on_host}}, {})
        overwrite(array).block_until_ready()
        on_host[:] = -1
        checkpoints.wait()
    # Whether the write was quicker than this test is luck; that it reads other memory is not.
    assert not np.shares_memory(handed_over[0]["params"]["host"], on_host)
    params = restore_params(tmp_path)[0]
    np.testing.assert_array_equal(params["device"], wanted)
    np.testing.assert_array_equal(params["host"], wanted)


def test_the_last_n_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 15):
            checkpoints.save(step, {"params": np.full(3, step)}, {"step": step})
    assert steps(tmp_path) == [10, 15]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000010", "00000015"]


def test_saving_a_step_again_replaces_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"params": np.zeros(3)}, {"try": 1})
        checkpoints.save(5, {"params": np.ones(3)}, {"try": 2}, wait=True)
    params, meta = restore_params(tmp_path)
    assert meta == {"try": 2} and params.tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["00000005"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path, kind):
    lines = []
    with Checkpoints(tmp_path, log=lines.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": np.full(5000, step)}, {"step": step}, wait=True)
        hurt, phrase = DAMAGE[kind]
        hurt(biggest_file(tmp_path / "00000002"))
        step, tree, meta = latest(checkpoints, {"params": np.zeros(5000, int)})
        assert (step, meta["step"], tree["params"][0]) == (1, 1, 1)
        assert len(lines) == 1 and "step 2 is damaged" in lines[0] and phrase in lines[0] and "\n" not in lines[0]
        # Kept for the curious, never picked again, and no hindrance to the step when the run gets there again.
        assert (tmp_path / "00000002.damaged").is_dir() and steps(tmp_path) == [1]
        checkpoints.save(2, {"params": np.full(5000, 9)}, {"step": 2}, wait=True)
        assert latest(checkpoints, {"params": np.zeros(5000, int)})[1]["params"][0] == 9
        assert len(lines) == 1


def test_every_single_file_is_guarded(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": np.arange(50)}, {"step": 1}, wait=True)
    folder = tmp_path / "00000001"
    assert find_damage(folder) is None
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {"meta.json", "manifest.json"} <= {p.name for p in files}
    for file in files:
        content = file.read_bytes()
        if content:
            file.write_bytes(content[:-1])
            assert find_damage(folder), f"{file.name} truncated by a byte"
        file.unlink()
        assert find_damage(folder), f"{file.name} deleted"
        file.write_bytes(content)
        assert find_damage(folder) is None


def test_only_damaged_ones_is_an_error_not_a_fresh_start(tmp_path):
    with Checkpoints(tmp_path, log=lambda _: None) as checkpoints:
        checkpoints.save(1, {"params": np.zeros(3)}, {}, wait=True)
        (tmp_path / "00000001" / "meta.json").unlink()
        for _ in range(2):  # the same command once more must not start over either
            with pytest.raises(UserError, match="only 00000001.damaged; delete them to start over"):
                checkpoints.restore_latest({"params": np.zeros(3)})


def test_another_shape_is_an_error_not_damage(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": jnp.zeros((4, 3))}, {}, wait=True)
        with pytest.raises(UserError, match="does not fit the state of this run"):
            checkpoints.restore_latest({"params": jnp.zeros((4, 2))})
        with pytest.raises(UserError, match="does not fit the state of this run"):
            checkpoints.restore_latest({"params": jnp.zeros((4, 3)), "more": jnp.zeros(1)})
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device [OS error 28: ENOSPC]'),
    ],
    ids=["python", "array_writer"],
)
@pytest.mark.parametrize("where", ["save", "wait_until_finished"])
def test_a_full_disk_is_one_line_and_the_last_good_one_stays(tmp_path, monkeypatch, error, where):
    def fail(*_, **__):
        raise error

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": np.ones(3)}, {"step": 1}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._orbax, where, fail)
            with pytest.raises(UserError, match="no space left.*the last good checkpoint, step 1, stays"):
                checkpoints.save(2, {"params": np.ones(3)}, {"step": 2}, wait=True)
        assert steps(tmp_path) == [1]
        assert latest(checkpoints, {"params": np.zeros(3)})[2] == {"step": 1}
        checkpoints.save(2, {"params": np.ones(3)}, {"step": 2}, wait=True)  # with space again, it goes on
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "00000002"]


def test_an_error_of_the_background_save_surfaces_at_the_next_call(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr("m1jax.train.checkpoint._write", lambda *_: (_ for _ in ()).throw(PermissionError("x")))
        checkpoints.save(1, {"params": np.ones(3)}, {})
        with pytest.raises(PermissionError):
            checkpoints.save(2, {"params": np.ones(3)}, {})
        assert steps(tmp_path) == []


def test_what_a_kill_leaves_is_tidied(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": np.ones(3)}, {"step": 1}, wait=True)
    (tmp_path / "00000001").rename(tmp_path / ".replaced-00000001")  # killed between the two renames of a re-save
    (tmp_path / ".saving-00000002" / "state").mkdir(parents=True)  # killed while writing
    Checkpoints(tmp_path).close()
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
    assert restore_params(tmp_path)[1] == {"step": 1}


def test_restore_params_from_run_folder_checkpoint_or_nothing(tmp_path):
    state = make_state(2.0)
    with Checkpoints(tmp_path / "checkpoints", log=lambda _: None) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"step": step}, wait=True)
    for path, step in ((tmp_path, 2), (tmp_path / "checkpoints", 2), (tmp_path / "checkpoints" / "00000001", 1)):
        params, meta = restore_params(path)
        assert meta == {"step": step}
        assert_same(params, jax.tree.map(np.asarray, state.params))

    lines = []
    flip_a_bit(biggest_file(tmp_path / "checkpoints" / "00000002"))
    assert restore_params(tmp_path, log=lines.append)[1] == {"step": 1} and len(lines) == 1
    assert steps(tmp_path / "checkpoints") == [1, 2], "a reader renames nothing"
    with pytest.raises(UserError, match="no readable checkpoint"):
        restore_params(tmp_path / "checkpoints" / "00000002", log=lambda _: None)
    with pytest.raises(UserError, match="no such folder; give a run folder"):
        restore_params(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        restore_params(tmp_path / "empty")


SAVER = """
import sys, numpy as np
from m1jax.train import checkpoint
from m1jax.train.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    found = checkpoints.restore_latest({"params": np.zeros(200_000)})
    print("ready", flush=True)
    for step in range(found[0] if found else 1, 10_000):
        checkpoints.save(step, {"params": np.full(200_000, float(step))}, {"step": step})
        checkpoints.wait()
        print(step, flush=True)
"""


@pytest.mark.slow
def test_sigkill_at_any_time_leaves_the_last_good_one(tmp_path):
    """Ten kills at moments spread over the life of a save; each time what was reported as saved is there, whole."""
    rng, saved = np.random.default_rng(0), 0
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVER, tmp_path], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.6))
        child.send_signal(signal.SIGKILL)
        reported = [int(line) for line in child.stdout.read().splitlines() if line.endswith(tuple("0123456789"))]
        child.wait()
        lines = []
        with Checkpoints(tmp_path, log=lines.append) as checkpoints:
            found = checkpoints.restore_latest({"params": np.zeros(200_000)})
        assert lines == []
        if reported or saved:
            assert found is not None and found[0] >= max([saved, *reported])
        if found:
            step, tree, meta = found
            assert meta == {"step": step} and (tree["params"] == step).all()
            saved = step
    assert saved > 3


@pytest.fixture
def many(monkeypatch):
    """Speaks for three processes: what each says is exchanged, one after another, in this one."""

    def ask(function, *arguments):
        """What `function` gives where three processes call it: they take turns, and repeat it once all are heard."""
        said: list[list[Any]] = [[], [], []]
        results: list[Any] = [None] * 3
        for _ in range(3):  # an exchange more is answered in each round
            for process in range(3):
                turn = iter(range(9))
                monkeypatch.setattr(jax, "process_index", lambda process=process: process)

                def exchange(value, process=process, turn=turn):
                    n = next(turn)
                    said[process][n:] = [value]
                    return [heard[n] if n < len(heard) else value for heard in said]

                monkeypatch.setattr(checkpoint, "exchange", exchange)
                try:
                    results[process] = function(*arguments)
                except OSError as error:
                    results[process] = error
        return results

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(checkpoint, "from_first", lambda make: make())
    return ask


def test_every_file_is_read_by_one_of_the_processes(tmp_path, many, monkeypatch):
    for n in range(7):
        (tmp_path / "state" / f"{n % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "state" / f"{n % 2}" / f"{n}").write_bytes(bytes(range(n + 1)))
    whole = {f"state/{n % 2}/{n}": (n + 1, zlib.crc32(bytes(range(n + 1)))) for n in range(7)}
    read: list[tuple[int, str]] = []
    fingerprints = checkpoint._fingerprints
    monkeypatch.setattr(
        checkpoint, "_fingerprints",
        lambda folder, names: read.extend((jax.process_index(), n) for n in names) or fingerprints(folder, names),
    )  # fmt: skip
    assert many(checkpoint._fingerprints_together, tmp_path) == [whole] * 3
    assert sorted(name for _, name in set(read)) == sorted(whole), "nobody reads what another one reads"
    assert {process for process, _ in read} == {0, 1, 2}

    def broken(folder, names):
        if jax.process_index() == 1:
            raise OSError(errno.EIO, "Input/output error", str(folder / "state"))
        return fingerprints(folder, names)

    monkeypatch.setattr(checkpoint, "_fingerprints", broken)
    for error in many(checkpoint._fingerprints_together, tmp_path):
        assert (error.errno, error.strerror) == (5, f"Input/output error on host {socket.gethostname()}")


def test_a_checkpoint_that_cannot_be_read_now_is_not_put_aside(tmp_path, monkeypatch):
    """A mount that hangs on one host, or a permission, is no damage: all checkpoints would go, one after another."""
    tree = {"params": np.arange(3.0)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree, {}, wait=True)

        def refused(*_):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "00000002" / "state"))

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_fingerprints", refused)
            with pytest.raises(UserError, match=r"00000002/state: cannot be read \(Permission denied\); mend that, or"):
                checkpoints.restore_latest(tree)
        assert steps(tmp_path) == [1, 2]
        found = checkpoints.restore_latest(tree)
        assert found is not None and found[0] == 2


@pytest.mark.parametrize("full", [True, False])
def test_what_another_process_cannot_save_none_has_saved(tmp_path, monkeypatch, full):
    """The first process could write its share; what it hears of another ends the save here as there."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": np.zeros(3)}, {}, wait=True)
        heard = iter([True, full, True])  # whether another failed; whether its disk is full; whether anything failed
        monkeypatch.setattr(checkpoint, "anywhere", lambda flag: flag or next(heard))
        error = UserError if full else RuntimeError
        with pytest.raises(error, match="no space left for a checkpoint; the last good" if full else "another process"):
            checkpoints._save_together(2, tmp_path / ".saving-00000002", {"params": np.ones(3)}, {})
        assert steps(tmp_path) == [1] and [p.name for p in tmp_path.iterdir()] == ["00000001"]
