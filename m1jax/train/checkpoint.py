"""Checkpoints that a kill, a full disk or a damaged file cannot take away: Orbax for the arrays, a manifest for trust.

    checkpoints/
        00000040/  state/          the tree, written by Orbax
                   meta.json       plain JSON beside it: step, prompt cursor, config
                   manifest.json   size and CRC-32 of every other file, written last
        .saving-00000060/          a save in flight, or what a kill left of one
        00000050.damaged/          failed its manifest when read; never picked again, kept for the curious

A folder gets its final name by one rename, after everything in it is on disk; so a name of digits means a whole
checkpoint, and the manifest finds what went wrong with the disk afterwards. This file does not know what a model is:
any tree of arrays will do, NumPy arrays and typed PRNG keys included.

Where several processes share a folder each writes and reads what its devices hold, and takes its share of the files to
the manifest and from it; the first names and deletes. A save is not in the background then: all wait for the last.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from m1jax.errors import UserError
from m1jax.train.hosts import anywhere, exchange, from_first
from m1jax.types import Params

STATE, _META, _MANIFEST = "state", "meta.json", "manifest.json"
_Fingerprints = dict[str, tuple[int, int]]
"""{relative name: (bytes, CRC-32)}"""
_SAVING, _REPLACED, _DAMAGED = ".saving-", ".replaced-", ".damaged"

# Orbax logs an error of its background threads with a traceback, then raises it to us: once is enough.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in record.getMessage())


class Checkpoints:
    """The checkpoints of one run: written in the background, the last `keep` kept.

    Args:
        directory: folder that holds them; made if absent.
        keep: how many good ones stay.
        log: takes one line whenever something is worth telling.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3, log: Callable[[str], None] = print):
        if keep < 1:
            raise UserError(f"keep: {keep} checkpoints cannot resume a run; keep at least 1")
        self._dir, self._keep, self._log = Path(directory).absolute(), keep, log
        self._orbax = ocp.StandardCheckpointer()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

        def open_folder() -> None:
            self._dir.mkdir(parents=True, exist_ok=True)
            _tidy(self._dir)

        from_first(open_folder)

    def save(self, step: int, tree: Any, meta: Mapping[str, Any], wait: bool = False) -> None:
        """Write `tree` and `meta` as the checkpoint of `step`, replacing one of the same step.

        Returns once the arrays are copied, so the caller may donate them; `wait` returns once all is on disk.

        Raises:
            UserError: the disk is full, for this save or the one before; earlier checkpoints are untouched.
        """
        self.wait()
        meta = json.loads(json.dumps(meta))  # here, so that what is not JSON fails with the caller's traceback
        staging = self._dir / f"{_SAVING}{step:08d}"
        from_first(lambda: shutil.rmtree(staging, ignore_errors=True))
        if jax.process_count() > 1:
            self._save_together(step, staging, tree, meta)
            return
        try:
            self._orbax.save(staging / STATE, jax.tree.map(_array, tree))
        except Exception as error:
            raise self._failure(error, staging) from error
        self._thread = threading.Thread(target=self._finish, args=(step, staging, meta), name=f"save-{step}")
        self._thread.start()
        if wait:
            self.wait()

    def _save_together(self, step: int, staging: Path, tree: Any, meta: Mapping[str, Any]) -> None:
        """All processes write what they hold and seal it; the first names the folder, once everybody has."""
        problem: BaseException | None = None
        found: _Fingerprints = {}
        try:
            self._orbax.save(staging / STATE, jax.tree.map(_array, tree))
            self._orbax.wait_until_finished()
        except Exception as error:
            problem = error
        if not anywhere(problem is not None):
            try:
                found = _fingerprints_together(staging)
            except OSError as error:
                problem = error
        full = anywhere(is_disk_full(problem))
        failed = anywhere(problem is not None)

        def finish() -> None:
            if failed:
                told = OSError(errno.ENOSPC, "No space left on device") if full else problem
                raise self._failure(told or RuntimeError("another process could not save"), staging)
            self._finish(step, staging, meta, found)
            self.wait()

        from_first(finish)

    def wait(self) -> None:
        """Return when no save is in flight; raise what the last one failed with (once)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def restore_latest(self, abstract_tree: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """`(step, tree, meta)` of the newest good checkpoint, or None where nothing was ever saved.

        A damaged one is renamed to `NAME.damaged`, said in one line, and the one before it is tried.

        Args:
            abstract_tree: the wanted structure, with arrays or `jax.ShapeDtypeStruct` leaves.

        Raises:
            UserError: only damaged checkpoints are left, or the checkpoint has other shapes than `abstract_tree`.
        """
        self.wait()
        step = self._newest_good()
        if step is None:
            return None
        folder = self._dir / f"{step:08d}"
        return step, _restore(self._orbax, folder, abstract_tree), read_meta(folder)

    def _newest_good(self) -> int | None:
        """Step of the newest good checkpoint; damaged ones are put aside."""
        for step in from_first(lambda: steps(self._dir)[::-1]):
            folder = self._dir / f"{step:08d}"
            damage = self._find_damage(folder)
            if damage is None:
                return step
            aside = from_first(lambda folder=folder: _put_aside(folder))
            self._log(f"checkpoint of step {step} is damaged ({damage}): kept as {aside}, trying the one before")
        from_first(lambda: _refuse_if_only_damaged(self._dir))
        return None

    def _find_damage(self, folder: Path) -> str | None:
        """`find_damage`, where each process reads its share."""
        try:
            found = _fingerprints_together(folder)
        except OSError as error:
            return _damage(error)
        return from_first(lambda: find_damage(folder, found))

    def close(self) -> None:
        """Finish the save in flight and let go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, step: int, staging: Path, meta: Mapping[str, Any], found: _Fingerprints | None = None) -> None:
        """The background half of a save: wait for the arrays, seal the folder, give it its name, drop old ones."""
        try:
            self._orbax.wait_until_finished()
            seal(staging, meta, found)
            final, replaced = self._dir / f"{step:08d}", self._dir / f"{_REPLACED}{step:08d}"
            if final.exists():
                final.rename(replaced)  # a kill before the next line is mended by `_tidy`
            staging.rename(final)
            _sync(self._dir)
            shutil.rmtree(replaced, ignore_errors=True)
            for old in steps(self._dir)[: -self._keep]:
                # Renamed first, so that a kill half-way through the deletion leaves no half checkpoint with a name.
                leaving = self._dir / f"{_SAVING}{old:08d}"
                (self._dir / f"{old:08d}").rename(leaving)
                shutil.rmtree(leaving, ignore_errors=True)
        except BaseException as error:
            self._error = self._failure(error, staging)

    def _failure(self, error: BaseException, staging: Path) -> BaseException:
        """What to raise for a save that failed: one line for a full disk, anything else as it is."""
        shutil.rmtree(staging, ignore_errors=True)
        if not is_disk_full(error):
            return error
        good = steps(self._dir)
        kept = f"the last good checkpoint, step {good[-1]}, stays" if good else "there is no earlier checkpoint"
        return UserError(f"{self._dir}: no space left for a checkpoint; {kept}; free some space and resume")


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    return sorted(int(p.name) for p in Path(directory).glob("*") if p.name.isdigit() and p.is_dir())


def newest_checkpoint(path: str | os.PathLike[str], log: Callable[[str], None] = print) -> Path:
    """The newest good checkpoint folder of a run folder, or `path` itself where it is one.

    Nothing is renamed or deleted: the run that owns the folder may be alive.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run folder or one of its checkpoints/NUMBER folders")
    if (path / _MANIFEST).exists() or path.name.isdigit():
        candidates = [path]
    else:
        inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        candidates = [inside / f"{step:08d}" for step in reversed(steps(inside))]
    if not candidates:
        raise UserError(f"{path}: holds no checkpoint; give a run folder or one of its checkpoints/NUMBER folders")
    damage = None
    for folder in candidates:
        damage = find_damage(folder)
        if damage is None:
            return folder
        log(f"{folder}: damaged ({damage})")
    raise UserError(f"{path}: no readable checkpoint; the oldest one is damaged too ({damage})")


def restore_params(path: str | os.PathLike[str], log: Callable[[str], None] = print) -> tuple[Params, dict[str, Any]]:
    """`(params, meta)` of a run folder (its newest good checkpoint) or of one checkpoint folder; NumPy leaves.

    Raises:
        UserError: as `newest_checkpoint`.
    """
    folder = newest_checkpoint(path, log)
    return _restore_params(folder), read_meta(folder)


def read_meta(folder: Path) -> dict[str, Any]:
    """The plain values beside a checkpoint's arrays."""
    return json.loads((folder / _META).read_text())


def seal(folder: Path, meta: Mapping[str, Any], found: _Fingerprints | None = None) -> None:
    """Make a folder with a `state/` in it a checkpoint: its meta.json, then its manifest.

    Args:
        folder: the folder.
        meta: plain JSON.
        found: the fingerprints of what is there so far; read from there by default.
    """
    found = _fingerprints(folder) if found is None else found
    _write(folder / _META, json.dumps(meta))
    _write(folder / _MANIFEST, json.dumps(found | _fingerprints(folder, [_META])))


def find_damage(folder: Path, found: _Fingerprints | None = None) -> str | None:
    """What is wrong with a checkpoint folder in a few words, or None: every file has the size and CRC it had.

    Args:
        folder: the checkpoint.
        found: the fingerprints of its files; read from there by default.

    Raises:
        UserError: a file is there and cannot be read.
    """
    try:
        expected = json.loads((folder / _MANIFEST).read_text())
        found = _fingerprints(folder) if found is None else found
    except OSError as error:
        return _damage(error)
    except ValueError as error:
        return f"{_MANIFEST} is unreadable: {error}"
    for name, (size, crc) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes instead of {size}"
        if found[name][1] != crc:
            return f"{name} has changed since it was written"
    return None


def _damage(error: OSError) -> str:
    """What an error says of a checkpoint: a file that is missing is damage, one that cannot be read may be whole."""
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    told = f"{error.filename}: cannot be read ({error.strerror})"
    raise UserError(f"{told}; mend that, or move its checkpoint away, and start again") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is ENOSPC; the array writer reports it as text in errors of its own."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _restore(orbax: ocp.StandardCheckpointer, folder: Path, abstract_tree: Any) -> Any:
    try:
        return orbax.restore(folder / STATE, jax.tree.map(_abstract, abstract_tree))
    except (ValueError, KeyError, TypeError) as error:
        # The bytes are sound, so what differs is the model or the optimizer.
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: does not fit the state of this run: {reason}") from error


def _restore_params(folder: Path) -> Params:
    with ocp.PyTreeCheckpointer() as orbax:
        tree = orbax.metadata(folder / STATE).item_metadata.tree
        if "params" not in tree:
            raise UserError(f"{folder}: its state has no `params`; found {', '.join(sorted(tree))}")
        wanted = {"params": tree["params"]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        return orbax.restore(folder / STATE, args=args)["params"]


def _array(leaf: Any) -> Any:
    """A leaf as Orbax can take it: scalars of NumPy as 0-d arrays, which it also reads back; its arrays as copies.

    Orbax refers to NumPy's memory until the save is done, and the caller may write into it. JAX arrays need no copy:
    memory that is referred to is not given to a donating computation.
    """
    return np.array(leaf) if isinstance(leaf, np.generic | np.ndarray) else leaf


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
    return _array(leaf)


def _fingerprints(folder: Path, names: Iterable[str] | None = None) -> _Fingerprints:
    """Of the files below a folder with these relative names, by default of all, the manifest aside."""
    result = {}
    for name in _names(folder) if names is None else names:
        size = crc = 0
        with (folder / name).open("rb") as stream:
            while block := stream.read(1 << 20):
                size, crc = size + len(block), zlib.crc32(block, crc)
        result[name] = (size, crc)
    return result


def _names(folder: Path) -> list[str]:
    """Relative names of all files below a folder, the manifest aside."""
    files = (p for p in folder.rglob("*") if p.is_file() and p != folder / _MANIFEST)
    return sorted(p.relative_to(folder).as_posix() for p in files)


def _fingerprints_together(folder: Path) -> _Fingerprints:
    """Of all files below a folder, each read by one process; an OSError of one is raised in all."""
    mine = from_first(lambda: _names(folder))[jax.process_index() :: jax.process_count()]
    part, problem = {}, None
    try:
        part = _fingerprints(folder, mine)
    except OSError as error:
        host = f" on host {socket.gethostname()}" if jax.process_count() > 1 else ""
        problem = OSError(error.errno, f"{error.strerror}{host}", error.filename)
    told = exchange((part, problem))
    for _, problem in told:
        if problem is not None:
            raise problem
    return {name: fingerprint for part, _ in told for name, fingerprint in part.items()}


def _tidy(directory: Path) -> None:
    """Remove what a kill left behind; put back a checkpoint that was caught while being replaced."""
    for leftover in directory.glob(f"{_REPLACED}*"):
        home = directory / leftover.name.removeprefix(_REPLACED)
        if home.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.rename(home)
    for leftover in directory.glob(f"{_SAVING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _refuse_if_only_damaged(directory: Path) -> None:
    damaged = sorted(p.name for p in directory.glob(f"*{_DAMAGED}*"))
    if damaged:
        raise UserError(f"{directory}: no readable checkpoint, only {', '.join(damaged)}; delete them to start over")


def _put_aside(folder: Path) -> str:
    """Rename a damaged checkpoint, and return its new name."""
    return folder.rename(_free_name(folder.with_name(folder.name + _DAMAGED))).name


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number, candidate = number + 1, path.with_name(f"{path.name}.{number}")
    return candidate


def _write(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(directory: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
