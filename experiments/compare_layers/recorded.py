"""Recorded numbers as files give them: what cannot be read, or has another shape than the model gives it, is one line.

What the arrays are stands in goldens.py.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from m1jax.errors import UserError
from m1jax.model.config import ModelConfig
from m1jax.weights.hf_names import hf_tensors

INTEGERS = frozenset(
    """input_ids positions router_ids padded_input_ids padded_attention_mask greedy_prompt greedy_ids
    grad_input_ids""".split()  # noqa: SIM905
)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file.

    Raises:
        UserError: it is not there, or is no such file, or is damaged.
    """
    try:
        with np.load(file) as arrays:
            return dict(arrays)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except EOFError as error:
        raise UserError(f"{file}: not an .npz file of arrays (it is empty, or was cut short)") from error
    except (AttributeError, TypeError, ValueError) as error:  # the first two: a single array, as np.save writes it
        reason = str(error) if isinstance(error, ValueError) else "one array without a name; use np.savez"
        raise UserError(f"{file}: not an .npz file of arrays ({reason})") from error
    # NotImplementedError is what zipfile raises for a compression or an encryption that it does not know.
    except (OSError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: not an .npz file of arrays ({error})") from error


def require_shapes(arrays: Mapping[str, np.ndarray], config: ModelConfig, file: Path) -> None:
    """Hold dtype and shape of every array that will be compared against what the model gives.

    Raises:
        UserError: one is not what it should be; the line names it and says what is expected.
    """
    L, D, V, A = config.num_layers, config.hidden_size, config.vocab_size, config.experts_per_token
    state = (config.num_heads, config.head_dim, config.head_dim)
    lightning = config.kinds.count("lightning")

    def expect(name: str, *shapes: tuple[int, ...]) -> None:
        if name in arrays:
            _require_dtype(arrays, name, file)
            if arrays[name].shape not in shapes:
                wanted = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
                raise UserError(f"{file}: {name} has shape {arrays[name].shape}, expected {wanted}")

    if "input_ids" in arrays:
        B, T = _tokens(arrays, "input_ids", ("rows", "tokens"), V, file)
        P = T
        if "positions" in arrays:
            _require_dtype(arrays, "positions", file)
            positions = arrays["positions"]
            if positions.ndim != 1:
                raise UserError(f"{file}: positions has shape {positions.shape}, expected (positions,)")
            P = len(positions)
            if P and not 0 <= positions.min() <= positions.max() < T:
                raise UserError(
                    f"{file}: positions run from {positions.min()} to {positions.max()}, input_ids has {T} tokens"
                )
        for name, width in (("final_norm", D), ("logits", V)):
            expect(name, (B, P, width), (B, T, width))
        expect("hidden", (L, B, P, D), (L, B, T, D))
        expect("logprobs", (B, T - 1))
        if config.num_experts:
            expect("router_ids", (L, B, T, A))
            expect("router_weights", (L, B, P, A), (L, B, T, A))
            expect("router_margin", (L, B, T))
        if lightning:
            expect("states", (lightning, B, *state))
    if "padded_input_ids" in arrays and "padded_attention_mask" in arrays:
        B, T = _tokens(arrays, "padded_input_ids", ("rows", "tokens"), V, file)
        expect("padded_attention_mask", (B, T))
        mask = arrays["padded_attention_mask"]
        if not mask.any() or not np.isin(mask, (0, 1)).all():
            raise UserError(
                f"{file}: padded_attention_mask: expected 1 at tokens, of which there are some, and 0 at pads"
            )
        expect("padded_logits", (B, T, V))
        if lightning:
            expect("padded_states", (lightning, B, *state))
    if "greedy_prompt" in arrays:
        _tokens(arrays, "greedy_prompt", ("tokens",), V, file)
        length = None
        for name in ("greedy_ids", "greedy_logprobs"):
            if name not in arrays:
                continue
            _require_dtype(arrays, name, file)
            shape = arrays[name].shape
            if len(shape) != 1 or not shape[0] or length not in (None, shape[0]):
                wanted = "at least one: (tokens,)" if length is None else f"({length},) as greedy_ids has"
                raise UserError(f"{file}: {name} has shape {shape}, expected {wanted}")
            length = shape[0]
    if "grad_input_ids" in arrays:
        _tokens(arrays, "grad_input_ids", ("rows", "tokens"), V, file)
        if arrays["grad_input_ids"].shape[1] < 2:
            raise UserError(f"{file}: grad_input_ids: expected rows of at least 2 tokens, so that one is predicted")
        expect("loss", ())


def require_gradients(file: Path, config: ModelConfig) -> None:
    """Hold names and shapes of a file of gradients against the model's weights.

    Raises:
        UserError: the file cannot be read, or has other tensors.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            theirs = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a safetensors file, or a damaged one ({error})") from error
    ours = {tensor.name: tuple(tensor.shape) for tensor in hf_tensors(config)}
    if odd := sorted(set(ours) ^ set(theirs)):
        where = "missing" if odd[0] in ours else "of no weight of the model"
        raise UserError(f"{file}: {odd[0]} is {where} ({len(odd)} such names); expected one gradient for every weight")
    for name, shape in ours.items():
        if theirs[name] != shape:
            raise UserError(f"{file}: {name} has shape {theirs[name]}, expected {shape}")


def _require_dtype(arrays: Mapping[str, np.ndarray], name: str, file: Path) -> None:
    wanted, kinds = ("integers", "biu") if name in INTEGERS else ("numbers", "biuf")
    found = getattr(arrays[name], "dtype", None)  # NumPy gives an entry that is no .npy file as bytes
    if found is None or found.kind not in kinds:
        raise UserError(f"{file}: {name} holds {found or 'no array'}, expected {wanted}")


def _tokens(
    arrays: Mapping[str, np.ndarray], name: str, axes: tuple[str, ...], vocab: int, file: Path
) -> tuple[int, ...]:
    """The shape of token ids, of which there is at least one, all in the vocabulary."""
    _require_dtype(arrays, name, file)
    ids = arrays[name]
    if ids.ndim != len(axes) or not ids.size:
        wanted = "(tokens,)" if len(axes) == 1 else f"({', '.join(axes)})"
        raise UserError(f"{file}: {name} has shape {ids.shape}, expected {wanted} with at least one token")
    if not 0 <= ids.min() <= ids.max() < vocab:
        odd = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(
            f"{file}: {name} holds the id {odd}, expected ids from 0 to {vocab - 1}: the model's vocabulary"
        )
    return ids.shape
