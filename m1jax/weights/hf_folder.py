"""A Hugging Face folder on disk: config.json and safetensors, checked whole, then read or written tensor by tensor.

Nothing is read before everything is known to be right: the headers of all shards are held against the tensors that
the config asks for, and what is missing, unknown, misshaped, doubled or of another dtype is told in one line.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from m1jax.errors import UserError
from m1jax.model.config import ModelConfig
from m1jax.weights.hf_config import MODEL_TYPES, from_hf
from m1jax.weights.hf_names import IGNORED, HFTensor, hf_tensors, tensor_dtype

CONFIG, INDEX, GENERATION = "config.json", "model.safetensors.index.json", "generation_config.json"

_NUMPY = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F64": np.dtype(np.float64),
          "F16": np.dtype(np.float16)}  # fmt: skip
_STORED = {dtype: name for name, dtype in _NUMPY.items()}
_MAPPED = 256 << 20
"""Bytes read of a shard before it is opened anew."""
_SHOWN = 20
"""Names of one kind of fault that a message lists before it counts."""


class Source(Protocol):
    """Where tensors come from under their original names: a folder, a GGUF file."""

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor in torch's layout."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor as a shard's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class HFFolder:
    """A folder that was found to hold exactly the weights that its config.json asks for.

    Attributes:
        folder: where it is.
        config: the decoder; `param_dtype` is that of the stored tensors (router gates aside).
        values: config.json as it is.
        notes: what was left aside, one line each.
    """

    def __init__(self, folder: Path, dtype: str = ""):
        """Open and check `folder`; `dtype` converts while reading ("" keeps, which takes one dtype throughout).

        Raises:
            UserError: something is wrong with it; everything that is, in one line.
        """
        self.folder = folder
        self.values = read_json(folder / CONFIG)
        self.config = from_hf(self.values, str(folder / CONFIG))
        wanted = hf_tensors(self.config)
        stored, unread, problems = _headers(folder)
        self.notes: list[str] = []
        extra = sorted(name for name in stored if IGNORED.fullmatch(name))
        if extra:
            self.notes.append(f"ignored {len(extra)} buffers that follow from the config ({extra[0]}, ...)")
        self._stored = {name: entry for name, entry in stored.items() if not IGNORED.fullmatch(name)}
        self._open: dict[Path, Any] = {}
        self._mapped = 0
        known = {t.name for t in wanted}
        problems += _name_problems(self._stored, known - unread if unread is not None else (), known)
        problems += _shape_problems(self._stored, wanted)
        found = {self._stored[t.name].dtype for t in wanted if t.name in self._stored and not t.wide}
        if not dtype:
            problems += _dtype_problems(self._stored, wanted)
            dtype = _NUMPY.get(next(iter(found), "F32"), np.dtype(np.float32)).name
        if problems:
            raise UserError(f"{folder}: " + "; ".join(problems))
        self.config = with_dtype(self.config, dtype)
        gates = [self._stored[t.name].dtype for t in wanted if t.wide]
        narrow = [stored for stored in gates if _NUMPY[stored].itemsize < 4]
        if narrow:
            self.notes.append(f"widened {len(narrow)} router gates from {'/'.join(sorted(set(narrow)))} to float32")

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, in the dtype that they are stored in."""
        file = self._stored[name].file
        # What was read of a mapped file counts as memory until the file is closed: one shard, and not for long.
        if file not in self._open or self._mapped > _MAPPED:
            self._open, self._mapped = {file: _open(file)}, 0
        array = self._open[file].get_tensor(name)
        self._mapped += array.nbytes
        return array

    def close(self) -> None:
        """Let go of the files."""
        self._open = {}


def check_index(folder: Path, dtype: str = "") -> tuple[ModelConfig, list[str]]:
    """Check a folder of which only config.json and the index have been downloaded: `(config, what was checked)`.

    The config is in `dtype`; "" takes the one that the total size, or else config.json, speaks of.

    Raises:
        UserError: names are missing or unknown, or the total size is not that of bfloat16 or float32 weights with
            float32 router gates.
    """
    values = read_json(folder / CONFIG)
    config = from_hf(values, str(folder / CONFIG))
    weight_map, total = _read_index(folder / INDEX)
    wanted = hf_tensors(config)
    names = {name for name in weight_map if not IGNORED.fullmatch(name)}
    known = {t.name for t in wanted}
    problems = _name_problems(names, known, known)
    sizes = {name: hf_bytes(wanted, name) for name in ("bfloat16", "float32")}
    fitting, said = next(((name, name) for name, size in sizes.items() if size == total), ("", ""))
    if not fitting and total == sum(2 * int(np.prod(t.shape)) for t in wanted):
        fitting, said = "bfloat16", "bfloat16, router gates too"
    if total is not None and not fitting and not problems:
        problems.append(
            f"metadata.total_size is {total:,} bytes; the tensors of {CONFIG} take "
            + " or ".join(f"{size:,} in {name}" for name, size in sizes.items())
        )
    if problems:
        raise UserError(f"{folder / INDEX}: " + "; ".join(problems))
    stored = next((values[key] for key in ("torch_dtype", "dtype") if values.get(key) in tuple(sizes)), "float32")
    size = f"{total:,} bytes, which is {said}" if total is not None else "no total size given"
    checked = [f"{len(names):,} names in {len(set(weight_map.values()))} shards", size]
    return with_dtype(config, dtype or fitting or stored), checked


def what_is_missing(folder: Path) -> str:
    """Why a folder that looks like a Hugging Face one cannot be read as such; "" where it does not look like one."""
    weights = [INDEX] if (folder / INDEX).is_file() else [file.name for file in sorted(folder.glob("*.safetensors"))]
    if not (folder / CONFIG).is_file():
        return f"{folder}: holds {weights[0]} but no {CONFIG}; fetch that too" if weights else ""
    values = read_json(folder / CONFIG)
    if "model_type" not in values and (weights or {"architectures", "hidden_size"} & set(values)):
        return f"{folder / CONFIG}: model_type is missing; add it, one of {', '.join(MODEL_TYPES)}"
    return ""


def hf_bytes(tensors: Iterable[HFTensor], dtype: str) -> int:
    """Bytes of the tensors stored as `dtype`, the wide ones at least in float32."""
    return sum(int(np.prod(t.shape)) * tensor_dtype(t, dtype).itemsize for t in tensors)


def with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    """`config` with activations and parameters in `dtype`."""
    if dtype not in ("float32", "bfloat16", "float64"):
        raise UserError(f"dtype: {dtype!r} is not stored here; give --dtype=float32 or --dtype=bfloat16")
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def write_hf(
    folder: Path,
    config: ModelConfig,
    values: Mapping[str, Any],
    read: Callable[[HFTensor], np.ndarray],
    progress: Callable[[int], None] = lambda _: None,
    shard_bytes: int = 4 << 30,
    tensors: Sequence[HFTensor] | None = None,
) -> None:
    """Write config.json, shards of at most about `shard_bytes` and their index, one tensor in memory at a time.

    Args:
        folder: made here.
        values: the keys of config.json.
        read: a tensor's values in torch's layout; stored in `tensor_dtype(tensor, config.param_dtype)`.
        progress: called with the bytes of every tensor written.
        tensors: those of `hf_tensors(config)`, with others of them wide; None takes them as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[HFTensor]] = [[]]
    size = 0
    for tensor in tensors or hf_tensors(config):
        count = hf_bytes([tensor], config.param_dtype)
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += count
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, config.param_dtype, read, progress)
        weight_map |= {tensor.name: name for tensor in shard}
    total = hf_bytes((t for shard in shards for t in shard), config.param_dtype)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    for file, content in ((CONFIG, values), (INDEX, index)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: no such file, or no JSON object in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a Hugging Face folder has one") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with keys, found {type(values).__name__}")
    return values


def _write_shard(
    path: Path,
    tensors: Sequence[HFTensor],
    dtype: str,
    read: Callable[[HFTensor], np.ndarray],
    progress: Callable[[int], None],
) -> None:
    """The safetensors format, written while the tensors come: the library's own writer takes a whole shard at once.

    Wider dtypes first, so that every tensor is aligned.
    """
    tensors = sorted(tensors, key=lambda t: -tensor_dtype(t, dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + hf_bytes([tensor], dtype)
        kind = _STORED[tensor_dtype(tensor, dtype)]
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            array = np.ascontiguousarray(read(tensor), tensor_dtype(tensor, dtype))
            if array.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: shape {array.shape}, expected {tensor.shape}")
            stream.write(array.reshape(-1).view(np.uint8).data)
            progress(array.nbytes)


def _read_index(path: Path) -> tuple[dict[str, str], int | None]:
    """An index: `(tensor -> file, total size)`."""
    index = read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in weight_map.values()
    ):
        raise UserError(f"{path}: weight_map must give every tensor a file name; fetch the index again")
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: metadata is {metadata!r:.80}; it must be an object, or leave it out")
    total = metadata.get("total_size")
    if isinstance(total, float) and total.is_integer():  # some writers have divided
        total = int(total)
    if total is not None and (type(total) is not int or total < 0):
        raise UserError(f"{path}: metadata.total_size is {total!r:.80}; it must be a number of bytes, or leave it out")
    return weight_map, total


def _headers(folder: Path) -> tuple[dict[str, Stored], set[str] | None, list[str]]:
    """Every tensor of a folder's shards, those of shards that cannot be read, and what is wrong with the set of them.

    Without an index nobody knows what an unreadable shard holds: then the second is None.
    """
    problems: list[str] = []
    claimed: dict[str, str] | None = None
    if (folder / INDEX).is_file():
        claimed, _ = _read_index(folder / INDEX)
        files = sorted({folder / name for name in claimed.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: holds no *.safetensors and no {INDEX}")
    gone = {file.name for file in files if not file.is_file()}
    if gone:
        problems.append(f"{INDEX} names shards that are not there: {_list(sorted(gone))}")
    found: dict[str, Stored] = {}
    doubled = []
    for file in files:
        if file.name in gone:
            continue
        try:
            shard = _open(file)
        except UserError as error:
            problems.append(str(error).removeprefix(f"{folder}/"))
            gone.add(file.name)
            continue
        with shard:
            for name in shard.keys():  # noqa: SIM118  # no mapping, the handle of a file
                piece = shard.get_slice(name)
                if name in found:
                    doubled.append(f"{name} (in {found[name].file.name} and {file.name})")
                found[name] = Stored(file, tuple(piece.get_shape()), piece.get_dtype())
    if doubled:
        problems.append(f"duplicate tensors: {_list(doubled)}")
    if claimed is not None:
        moved = [
            f"{name} (said to be in {file})"
            for name, file in claimed.items()
            if file not in gone and (name not in found or found[name].file.name != file)
        ]
        if moved:
            problems.append(f"not where {INDEX} says: {_list(moved)}")
        if unlisted := [name for name in found if name not in claimed]:
            problems.append(f"in a shard but not in {INDEX}: {_list(unlisted)}")
    unread = None if gone and claimed is None else {name for name, file in (claimed or {}).items() if file in gone}
    return found, unread, problems


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or damaged ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def _name_problems(found: Iterable[str], wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """What of `wanted` was not found, and what was found though it is not `known`."""
    found = set(found)
    problems = []
    if missing := sorted(set(wanted) - found, key=_natural):
        problems.append(f"missing tensors: {_list(missing)}")
    if unknown := sorted(found - set(known), key=_natural):
        problems.append(f"unknown tensors: {_list(unknown)}")
    return problems


def _shape_problems(stored: Mapping[str, Stored], wanted: Sequence[HFTensor]) -> list[str]:
    problems = []
    misshaped = [
        f"{t.name} is {stored[t.name].shape}, {CONFIG} asks for {t.shape}"
        for t in wanted
        if t.name in stored and stored[t.name].shape != t.shape
    ]
    odd = [f"{name} is {entry.dtype}" for name, entry in stored.items() if entry.dtype not in _NUMPY]
    if misshaped:
        problems.append(f"misshaped tensors: {_list(misshaped)}")
    if odd:
        problems.append(f"not floating-point: {_list(odd)}")
    return problems


def _dtype_problems(stored: Mapping[str, Stored], wanted: Sequence[HFTensor]) -> list[str]:
    """What keeps the tensors from being stored as they are: half precision, or a mixture of dtypes."""
    by_dtype: dict[str, list[str]] = {}
    for tensor in wanted:
        if tensor.name in stored and not tensor.wide:
            by_dtype.setdefault(stored[tensor.name].dtype, []).append(tensor.name)
    if len(by_dtype) > 1:
        told = ", ".join(f"{len(names)} {dtype} ({names[0]}, ...)" for dtype, names in by_dtype.items())
        return [f"several dtypes: {told}; give --dtype=float32 or --dtype=bfloat16"]
    if "F16" in by_dtype:
        return ["the tensors are float16, which is not stored here; give --dtype=float32"]
    return []


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _natural(name: str) -> list[Any]:
    """A sort key by which layer 10 comes after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
