"""Weights from one form into the other: Hugging Face folder or GGUF file to checkpoint, checkpoint to HF folder.

Tensor by tensor in both directions (into a checkpoint: 16 MiB of them at a time), so that a model need not fit into
memory; a checkpoint that a run saved is read by whole leaf, which is all layers of one kind of weight. The target
appears under its name when it is whole: until then it is a hidden folder beside it, which goes when the conversion
fails.

config.json of an export is the one that came with the weights where it still describes them. A model without a bound
on positions (max_positions 0) gets no `max_position_embeddings`, because servers take a 0 for the limit; they then
choose a limit of their own, so the caller may name one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m1jax.config import to_dict
from m1jax.data.tokenizer import load_tokenizer
from m1jax.data.tokenizer_files import TOKENIZER_FILES, write_json
from m1jax.errors import UserError
from m1jax.model.config import ModelConfig
from m1jax.train.checkpoint import STATE, is_disk_full, seal
from m1jax.train.interrupt import StopSignal
from m1jax.train.leaf_store import LazyLeaf, write_leaves
from m1jax.train.pretrained import HUGGINGFACE, Pretrained, differences, find_pretrained
from m1jax.weights.gguf import read_gguf
from m1jax.weights.hf_config import MAX_POSITIONS, from_hf, to_hf
from m1jax.weights.hf_folder import (
    CONFIG,
    GENERATION,
    Source,
    hf_bytes,
    read_json,
    with_dtype,
    write_hf,
)
from m1jax.weights.hf_names import HFTensor, hf_tensors, leaf_shapes

Progress = Callable[[int], None]


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str = "",
    log: Callable[[str], None] = print,
    progress: Callable[[int], Progress] = lambda total: lambda done: None,
    max_positions: int | None = None,
) -> Path:
    """Convert and return the target folder.

    Args:
        source: a Hugging Face folder, a GGUF file or "smollm2" (becomes a checkpoint); or a run folder or one of its
            checkpoints (becomes a Hugging Face folder).
        target: made here.
        dtype: "float32" or "bfloat16" converts all but the router gates; "" keeps what is stored.
        log: takes the lines meant for a person.
        progress: called with the bytes to come, gives what is called with the bytes of each tensor.
        max_positions: `max_position_embeddings` of an exported config.json; None keeps the model's.

    Raises:
        UserError: the source is wrong, the target exists or cannot be made, or the disk is full.
        SystemExit: SIGTERM or Ctrl-C; nothing was written.
    """
    target = Path(target)
    with _making(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target}: exists already; give another --to, or delete it")
    model = find_pretrained(source, dtype, log)
    config = with_dtype(model.config, dtype) if dtype else model.config
    if max_positions is not None:
        if model.checkpoint is None:
            raise UserError("--max_positions: only for an export, from a run folder; a checkpoint has its config.json")
        config = dataclasses.replace(config, max_positions=max_positions)
    for note in model.notes:
        log(note)
    tensors = hf_tensors(config)
    count = sum(int(np.prod(t.shape)) for t in tensors)
    log(f"{source}: {count:,} parameters in {len(tensors):,} tensors, {config.param_dtype}")
    staging = target.absolute().with_name(f".{target.name}.converting")
    shutil.rmtree(staging, ignore_errors=True)
    with _making(target):
        staging.mkdir(parents=True)
    stop = StopSignal()
    try:
        with stop:
            count_bytes = progress(hf_bytes(tensors, config.param_dtype))

            def tick(done: int) -> None:
                if stop.requested:
                    raise _Stopped
                count_bytes(done)

            if model.checkpoint is None:
                _to_checkpoint(model, config, staging, count_bytes, stop)
                if stop.requested:
                    raise _Stopped
            else:
                _to_hf(model, config, staging, log, tick)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except BaseException as error:
        _remove(staging)
        if stop.requested:
            raise SystemExit(128 + signal.Signals[stop.requested]) from error
        if isinstance(error, Exception) and is_disk_full(error):
            size = hf_bytes(tensors, config.param_dtype)
            raise UserError(f"{target}: no space left; nothing was written, make room for {size:,} bytes") from error
        raise
    return target


class _Stopped(Exception):
    """A signal came, and no tensor is being written."""


def _remove(folder: Path) -> None:
    """Delete a folder for good: threads of the array writer, which nobody can stop, may put a last piece into it."""
    gone = 0
    for _ in range(50):
        gone = 0 if folder.exists() else gone + 1
        if gone == 4:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


@contextlib.contextmanager
def _making(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); give another --to") from error


def _to_checkpoint(model: Pretrained, config: ModelConfig, folder: Path, tick: Progress, stop: StopSignal) -> None:
    """A run folder of step 0: checkpoints/00000000 and, beside it, the files that are not weights.

    After a signal it ends early, with tensors left out: the array writer's threads take an exception badly.
    """
    source = model.reader()
    groups: dict[tuple[str, ...], list[HFTensor]] = defaultdict(list)
    for tensor in hf_tensors(config):
        groups[tensor.leaf].append(tensor)
    leaves = {
        leaf: LazyLeaf(shape, dtype, _Pieces(source, groups[leaf], dtype, tick, stop), len(groups[leaf][0].index))
        for leaf, (shape, dtype) in leaf_shapes(config).items()
    }
    checkpoint = folder / "checkpoints" / f"{0:08d}"
    checkpoint.mkdir(parents=True)
    write_leaves(checkpoint / STATE, leaves)
    seal(checkpoint, {"step": 0, "config": {"model": to_dict(config)}})
    files = folder / HUGGINGFACE
    files.mkdir()
    if model.files is not None:
        for name in (CONFIG, GENERATION, *TOKENIZER_FILES):
            if (model.files / name).is_file():
                shutil.copyfile(model.files / name, files / name)
    else:
        gguf = read_gguf(model.path)
        for name, values in (
            (CONFIG, gguf.hf_config), (GENERATION, gguf.generation_config),
            ("tokenizer.json", gguf.tokenizer_json), ("tokenizer_config.json", gguf.tokenizer_config),
        ):  # fmt: skip
            write_json(files / name, values)


class _Pieces:
    """The tensors of one leaf, read when they are asked for; no more of them after a signal."""

    def __init__(self, source: Source, tensors: list[HFTensor], dtype: np.dtype, tick: Progress, stop: StopSignal):
        self.source, self.tensors, self.dtype, self.tick, self.stop = source, tensors, dtype, tick, stop

    def __call__(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for tensor in self.tensors:
            if self.stop.requested:
                return
            piece = tensor.to_ours(self.source.read(tensor.name)).astype(self.dtype, copy=False)
            yield tensor.index, piece
            self.tick(piece.nbytes)


def _to_hf(model: Pretrained, config: ModelConfig, folder: Path, log: Callable[[str], None], tick: Progress) -> None:
    source = model.reader()
    values = _hf_config(model, config)
    if not values.get(MAX_POSITIONS):
        log(f"the model sets no bound on positions: no {MAX_POSITIONS} in config.json; --max_positions=N writes one")
    write_hf(folder, config, values, lambda tensor: source.read(tensor.name), tick)
    copied = []
    for name in (GENERATION, *TOKENIZER_FILES):
        if model.files is not None and (model.files / name).is_file():
            shutil.copyfile(model.files / name, folder / name)
            copied.append(name)
    if model.tokenizer and Path(model.tokenizer).is_file() and "tokenizer.json" not in copied:
        shutil.copyfile(model.tokenizer, folder / "tokenizer.json")
        copied.append("tokenizer.json")
    if GENERATION not in copied:
        write_json(folder / GENERATION, _generation_config(model))
    if not any(name.startswith("tokenizer") for name in copied):
        log("no tokenizer file to copy: the model was trained on bytes, or nothing is known of its tokenizer")


def _hf_config(model: Pretrained, config: ModelConfig) -> dict[str, Any]:
    """config.json: the one that came with the weights where it still says the truth, else written anew."""
    if model.files is not None and (model.files / CONFIG).is_file():
        values = read_json(model.files / CONFIG)
        if "model_type" in values and not differences(from_hf(values, str(model.files / CONFIG)), config):
            for key in ("torch_dtype", "dtype"):
                if key in values:
                    values[key] = config.param_dtype
            values.pop(MAX_POSITIONS, None)
            return values | ({MAX_POSITIONS: config.max_positions} if config.max_positions else {})
    values = to_hf(config)
    tokenizer = load_tokenizer(model.tokenizer) if model.tokenizer is not None else None
    values["bos_token_id"] = tokenizer.bos_id if tokenizer else None
    values["eos_token_id"] = tokenizer.stop_ids[0] if tokenizer else None
    return values


def _generation_config(model: Pretrained) -> dict[str, Any]:
    """Stop and padding ids of the run's tokenizer, and that sampling is at temperature 1, which training measured."""
    settings: Mapping[str, Any] = model.meta.get("config", {}).get("tokenizer", {})
    values: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
    if model.tokenizer is not None:
        tokenizer = load_tokenizer(model.tokenizer, settings.get("stop_tokens", ()))
        stops = list(tokenizer.stop_ids)
        values |= {"eos_token_id": stops[0] if len(stops) == 1 else stops, "pad_token_id": tokenizer.pad_id}
        if tokenizer.bos_id is not None:
            values["bos_token_id"] = tokenizer.bos_id
    return values
