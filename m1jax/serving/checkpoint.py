"""The tensors of a MiniMax-M1 folder: names and shapes, and what is wrong with a folder before a byte is copied.

A server that swaps its weights must take all of them or none. SGLang's own way back after a failure reads the same
folder again, so a bad one has to be found before the first weight is overwritten: headers and config.json are enough.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from m1jax.serving.config import ONLY, REQUIRED, SOFTMAX, MiniMaxM1Config

IGNORED = re.compile(
    r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay|rotary_emb\.inv_freq)"
)
"""Buffers that Transformers saves beside the weights; they follow from the config."""
_SHOWN = 10
"""Names that a message lists before it counts."""


def expected(config: MiniMaxM1Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a folder, by name: torch's (out, in) for a matrix."""
    c = config
    D, V, E, F = c.hidden_size, c.vocab_size, c.num_local_experts, c.expert_dim
    N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for layer, kind in enumerate(c.attn_type_list):
        if kind == SOFTMAX:
            attention = {"q_proj": (N * H, D), "k_proj": (K * H, D), "v_proj": (K * H, D), "o_proj": (D, N * H)}
        else:
            attention = {
                "qkv_proj": (3 * N * H, D),
                "output_gate": (N * H, D),
                "out_proj": (D, N * H),
                "norm": (N * H,),
            }
        parts = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "block_sparse_moe.gate": (E, D)}
        parts |= {f"self_attn.{name}": shape for name, shape in attention.items()}
        for e in range(E):
            for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
                parts[f"block_sparse_moe.experts.{e}.{name}"] = shape
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def problems(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What separates two tables of names and shapes, one line for each kind of fault."""
    found = {name: tuple(shape) for name, shape in found.items() if not IGNORED.fullmatch(name)}
    lines = []
    if missing := [name for name in wanted if name not in found]:
        lines.append(f"missing tensors: {_list(missing)}")
    if unknown := [name for name in found if name not in wanted]:
        lines.append(f"unknown tensors: {_list(unknown)}")
    odd = [f"{n} is {found[n]}, not {tuple(wanted[n])}" for n in wanted if n in found and found[n] != tuple(wanted[n])]
    if odd:
        lines.append(f"misshaped tensors: {_list(odd)}")
    return lines


def folder_problems(folder: Path, config: MiniMaxM1Config) -> list[str]:
    """Why the weights of `folder` must not replace those of a model with `config`; [] where they may."""
    try:
        values, shapes = json.loads((folder / "config.json").read_text(encoding="utf-8")), tensors(folder)
    except (OSError, ValueError) as error:
        return [f"{folder} cannot be read: {error}"]
    lines = []
    for key in (*REQUIRED, *ONLY):
        mine = config.expert_dim if key == "intermediate_size" else getattr(config, key, None)
        theirs = values.get(key, mine if key in ONLY else None)
        if theirs != mine and theirs not in ONLY.get(key, ()):
            lines.append(f"config.json: {key} is {theirs!r:.80}, the server's is {mine!r:.80}")
    return lines + problems(shapes, expected(config))


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a folder, from the headers of its safetensors files.

    Raises:
        OSError, ValueError: a file is not there, not whole, or not one; a tensor is in two of them.
    """
    index, shapes = folder / "model.safetensors.index.json", {}
    try:
        files = sorted(folder.glob("*.safetensors"))
        if index.is_file():
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        for file in files:
            header = _header(file)
            if doubled := [name for name in header if name in shapes]:
                raise ValueError(f"tensors in two files: {_list(doubled)}")
            shapes |= header
    except (KeyError, AttributeError, struct.error) as error:
        raise ValueError(f"damaged: {error}") from error
    return shapes


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, whose length is what the header says."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    ends = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size != 8 + size + ends:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, its header speaks of {8 + size + ends}")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
