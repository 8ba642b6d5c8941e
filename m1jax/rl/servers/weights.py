"""Weights for rollout servers: parameters to a folder that they read, and the update of one server.

    weights/00000012-3f9a1c07/   config.json, safetensors and tokenizer files under the names that Hugging Face uses
            00000011-b5d0e2f4/   the two before it stay: a server may be reading, and a run may want to look back

A folder appears under its name when all of it is on disk. Its name is the label of the weights: the step, and some
digits drawn by the run, so that no server passes for ours that has another run's step 12, or comes up with what it was
started with. Whether an update landed is not taken from its answer alone: the server has to name the label, and its
checksums have to have changed, on each of its ranks, if the tensors did, and only then.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from m1jax.model.config import ModelConfig
from m1jax.rl.servers.protocol import Fault, new_id
from m1jax.rl.servers.server import Checksums, Server
from m1jax.types import Params
from m1jax.weights.hf_config import to_hf
from m1jax.weights.hf_folder import hf_bytes, with_dtype, write_hf
from m1jax.weights.hf_names import HFTensor, hf_tensors, tensor_dtype

KEPT = 3
"""Folders that stay: the current one and two before it."""

_LABEL = "[0-9]" * 8 + "-" + "[0-9a-f]" * 8


def new_label(version: int) -> str:
    """A name for weights that no other ones have."""
    return f"{version:08d}-{new_id()[:8]}"


@dataclass(frozen=True)
class Published:
    """Weights on disk.

    Attributes:
        version, label, folder: which, under what name, where.
        digest: CRC-32 over the tensors as stored; equal digests are taken for equal weights.
        bytes, seconds: what writing them took.
    """

    version: int
    label: str
    folder: Path
    digest: int
    bytes: int
    seconds: float


def publish(
    root: Path,
    params: Params,
    config: ModelConfig,
    version: int,
    label: str,
    dtype: str = "",
    files: Path | None = None,
    read: Callable[[Params, HFTensor], np.ndarray] | None = None,
) -> Published:
    """Write `params` as `root/label`, whole or not at all.

    Args:
        params: of `config`, on whatever devices; one leaf at a time comes to the host.
        dtype: of the tensors there; routers, scales and the head, which decide what a token's probability is, are at
            least float32. "" is that of the parameters.
        files: folder of tokenizer files that go along.
        read: gets a tensor of parameters that are not all here, as the leaf has it; None reads leaf by leaf.
    """
    start = time.perf_counter()
    config = with_dtype(config, dtype or config.param_dtype)
    tensors = [replace(t, wide=t.wide or t.leaf[-1] in ("scale", "head")) for t in hf_tensors(config)]
    staging = root / f".{label}.writing"
    reader = _Reader(params, config.param_dtype, read)
    try:
        write_hf(staging, config, to_hf(config), reader.read, tensors=tensors)
        if files is not None and files.is_dir():
            for file in files.iterdir():
                if file.is_file() and not (staging / file.name).exists():
                    shutil.copyfile(file, staging / file.name)
        for file in staging.iterdir():
            _sync(file)
        staging.rename(root / label)
    except BaseException:  # a full disk, Ctrl-C
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync(root)
    size = hf_bytes(tensors, config.param_dtype)
    return Published(version, label, root / label, reader.digest, size, time.perf_counter() - start)


def prune(root: Path, keep: int = KEPT, reading: Collection[Path] = ()) -> None:
    """Delete all but the newest `keep` versions and those being read, and what a killed run left half written."""
    for folder in root.glob(f".{_LABEL}.writing"):
        shutil.rmtree(folder, ignore_errors=True)
    folders = list(root.glob(_LABEL))
    for folder in sorted(folders, key=lambda f: (f.stat().st_mtime_ns, f.name))[:-keep]:
        if folder not in reading:
            shutil.rmtree(folder, ignore_errors=True)


async def update(
    server: Server,
    published: Published,
    folder_there: str,
    mode: str,
    timeout_s: float,
    inspect: Callable[[Mapping[str, Any]], None] = lambda info: None,
    asked: Sequence[Server] = (),
) -> Checksums | None:
    """Make a server use published weights; its `checksums` after that.

    Args:
        server: one that answers; what it has under way is dealt with by `mode`.
        folder_there: the folder as the server sees it.
        mode: of the pause; `ServersConfig.update_mode`.
        timeout_s: for reading the weights.
        inspect: looks at /server_info and /model_info; what it raises is raised.
        asked: whose answers are this server's: itself, or the gateway before it.

    Raises:
        Fault: it did not, for the reason given; it must not be asked before it has been updated.
    """
    before = await server.checksums()
    try:
        await server.call("/pause_generation", {"mode": mode})
        if mode == "abort":
            await _idle(asked or [server])
        await _load(server, published, folder_there, flush=mode != "in_place", timeout_s=timeout_s)
        info = await server.info()
        inspect(info)
        if (label := info.get("weight_version")) != published.label:
            raise Fault("version", f"{server.url}: says {label!r} after an update to {published.label!r}")
        after = await server.checksums()
        if server.digest is not None and before is not None and after is not None:
            wrong = ""
            if server.digest == published.digest:
                wrong = "others" if before != after else ""
            elif kept := [rank for rank, sums in enumerate(after.sums) if sums in before.sums[rank : rank + 1]]:
                wrong = f"the same on rank {kept[0]}"
            if wrong or not after.sums:
                told = f"its checksums are {wrong or 'of no rank'} after an update to {published.label}"
                raise Fault("version", f"{server.url}: {told}")
        server.label, server.digest = published.label, published.digest
        return after
    finally:
        await wake(server)


async def wake(server: Server) -> None:
    """End a pause, where there is one; a connection that was closed under the call is no reason to leave it paused."""
    for wait_s in (0.1, 0.5, None):
        try:
            await server.call("/continue_generation", {})
            return
        except Fault as fault:
            if fault.kind != "unreachable" or wait_s is None:
                raise
        await asyncio.sleep(wait_s)


async def _load(server: Server, published: Published, folder_there: str, flush: bool, timeout_s: float) -> None:
    """/update_weights_from_disk; a server that still has something running while it flushes is given a moment."""
    body = {
        "model_path": folder_there,
        "weight_version": published.label,
        "flush_cache": flush,
        "abort_all_requests": False,
    }
    for wait_s in (0.2, 0.5, 1.0, 2.0, None):
        try:
            answer = await server.call("/update_weights_from_disk", body, timeout_s=timeout_s)
            if not (isinstance(answer, dict) and answer.get("success")):
                raise Fault("refused", str(answer)[:200])
            return
        except Fault as fault:
            if fault.kind != "refused" or wait_s is None or "flush" not in fault.detail.lower():
                raise
        await asyncio.sleep(wait_s)


async def _idle(servers: Sequence[Server]) -> None:
    """Wait, for ten seconds at the most, until the answers that were cut off have come back."""
    for _ in range(200):
        if not any(server.in_flight for server in servers):
            return
        await asyncio.sleep(0.05)


class _Reader:
    """Tensors of parameters in memory under their original names; the leaf that was read last stays on the host."""

    def __init__(self, params: Params, dtype: str, read: Callable[[Params, HFTensor], np.ndarray] | None):
        self._params, self._dtype, self._leaf, self._host, self.digest = params, dtype, (), np.zeros(0), 0
        self._read = read or self._from_leaf

    def read(self, tensor: HFTensor) -> np.ndarray:
        array = tensor.to_theirs(self._read(self._params, tensor)).astype(tensor_dtype(tensor, self._dtype), copy=False)
        self.digest = zlib.crc32(array.reshape(-1).view(np.uint8).data, self.digest)
        return array

    def _from_leaf(self, params: Params, tensor: HFTensor) -> np.ndarray:
        if tensor.leaf != self._leaf:
            node = params
            for name in tensor.leaf:
                node = node[name]
            self._leaf, self._host = tensor.leaf, np.asarray(node)
        return self._host[tensor.index]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
