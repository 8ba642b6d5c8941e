"""The shapes that kernels are tested, lowered and timed at, by operation.

`NUMERIC_SHAPES` are small, for interpreters, and hold every case that a kernel treats apart: whole blocks, a tail,
heads that are padded, segments and padding that cross blocks. `TARGET_SHAPES` are those of MiniMax-M1 (64 heads of
128, 8 key/value heads), of a tensor-parallel shard of it, and of a small model of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from jax.typing import DTypeLike

Arrays = dict[str, ShapeDtypeStruct]


@dataclass(frozen=True)
class Lightning:
    """B rows of T tokens, N heads of H; `segments` of unequal lengths with padding between, 0 for whole rows."""

    B: int
    T: int
    N: int
    H: int
    segments: int = 0

    def __str__(self):
        return f"{self.B} x {self.T}, {self.N} heads of {self.H}{_packed(self.segments)}"

    def arrays(self, dtype: DTypeLike) -> Arrays:
        """Return the arguments of `lightning_attention` by name."""
        B, T, N, H, wide = self.B, self.T, self.N, self.H, jnp.promote_types(dtype, jnp.float32)
        qkv = {f"{x}_BTNH": ShapeDtypeStruct((B, T, N, H), dtype) for x in "qkv"}
        state = {"initial_state_BNHH": ShapeDtypeStruct((B, N, H, H), wide)}
        return qkv | {"slopes_N": ShapeDtypeStruct((N,), wide)} | state | _segments(B, T, self.segments)


@dataclass(frozen=True)
class Decode:
    """One token of B rows, whose states lie in a pool of S slots; N heads of H."""

    B: int
    S: int
    N: int
    H: int

    def __str__(self):
        return f"{self.B} rows of {self.S} slots, {self.N} heads of {self.H}"

    def arrays(self, dtype: DTypeLike) -> Arrays:
        """Return the arguments of `fused_decode` by name."""
        B, N, H, wide = self.B, self.N, self.H, jnp.promote_types(dtype, jnp.float32)
        return {
            "qkv_BN3H": ShapeDtypeStruct((B, N, 3, H), dtype),
            "slopes_N": ShapeDtypeStruct((N,), wide),
            "state_SNHH": ShapeDtypeStruct((self.S, N, H, H), wide),
            "slots_B": ShapeDtypeStruct((B,), jnp.int32),
            "live_B": ShapeDtypeStruct((B,), jnp.bool_),
        }


@dataclass(frozen=True)
class GatedNorm:
    """M tokens of N heads of H."""

    M: int
    N: int
    H: int

    def __str__(self):
        return f"{self.M} tokens, {self.N} heads of {self.H}"

    def arrays(self, dtype: DTypeLike) -> Arrays:
        """Return the arrays of `gated_norm` by name."""
        X, wide = self.N * self.H, jnp.promote_types(dtype, jnp.float32)
        rows = {f"{x}_MX": ShapeDtypeStruct((self.M, X), dtype) for x in ("o", "gate")}
        return rows | {"scale_X": ShapeDtypeStruct((X,), wide)}


@dataclass(frozen=True)
class Softmax:
    """B rows of T tokens, N query heads and K key/value heads of H; `segments` as in `Lightning`."""

    B: int
    T: int
    N: int
    K: int
    H: int
    segments: int = 0

    def __str__(self):
        return f"{self.B} x {self.T}, {self.N}/{self.K} heads of {self.H}{_packed(self.segments)}"

    def arrays(self, dtype: DTypeLike) -> Arrays:
        """Return q, k and v of `softmax_attention`, and the segment ids of its rows, by name."""
        q = {"q_BTNH": ShapeDtypeStruct((self.B, self.T, self.N, self.H), dtype)}
        kv = {f"{x}_BTKH": ShapeDtypeStruct((self.B, self.T, self.K, self.H), dtype) for x in "kv"}
        return q | kv | _segments(self.B, self.T, self.segments)


Shape = Lightning | Decode | GatedNorm | Softmax


def _packed(segments):
    return f", {segments} segments" if segments else ""


def _segments(rows, tokens, segments):
    return {"segment_ids_BT": ShapeDtypeStruct((rows, tokens), jnp.int32)} if segments else {}


NUMERIC_SHAPES = {
    "lightning": (
        Lightning(B=1, T=128, N=4, H=64),
        Lightning(B=2, T=150, N=4, H=16),  # a tail, and heads with zeros behind
        Lightning(B=2, T=333, N=4, H=64, segments=5),
        Lightning(B=1, T=200, N=4, H=128, segments=3),
    ),
    "decode": (Decode(B=3, S=3, N=4, H=64), Decode(B=3, S=5, N=4, H=128), Decode(B=2, S=4, N=4, H=16)),
    "gated_norm": (GatedNorm(M=5, N=4, H=16), GatedNorm(M=130, N=2, H=64)),
}

TARGET_SHAPES = {
    "lightning": (
        Lightning(B=1, T=16_384, N=64, H=128),
        Lightning(B=4, T=4_096, N=64, H=128),
        Lightning(B=1, T=16_384, N=64, H=128, segments=8),
        Lightning(B=1, T=65_536, N=8, H=128),  # one of eight tensor-parallel shards
        Lightning(B=1, T=131_072, N=64, H=128),
        Lightning(B=1, T=1_048_576, N=8, H=128, segments=2),
        Lightning(B=4, T=4_096, N=8, H=128),  # a model of width 1024
        Lightning(B=8, T=2_048, N=8, H=64),
    ),
    "decode": (
        Decode(B=1, S=1, N=64, H=128),
        Decode(B=16, S=16, N=64, H=128),
        Decode(B=64, S=64, N=64, H=128),
        Decode(B=64, S=256, N=64, H=128),
        Decode(B=256, S=256, N=8, H=128),
        Decode(B=64, S=64, N=8, H=64),
    ),
    "gated_norm": (GatedNorm(M=16_384, N=64, H=128), GatedNorm(M=64, N=64, H=128), GatedNorm(M=16_384, N=8, H=128)),
    "softmax": (
        Softmax(B=1, T=16_384, N=64, K=8, H=128),
        Softmax(B=1, T=32_768, N=64, K=8, H=128),
        Softmax(B=1, T=16_384, N=64, K=8, H=128, segments=8),
        Softmax(B=1, T=4_096, N=8, K=8, H=128),
    ),
}


def segment_ids(rows: int, tokens: int, segments: int) -> np.ndarray | None:
    """Return int32 [rows, tokens]: segments of unequal lengths, with padding in front, between and behind.

    Other lengths in each row; about one token in 16 is padding. None for no segments.
    """
    if not segments:
        return None
    rng, ids = np.random.default_rng([rows, tokens, segments]), np.zeros((rows, tokens), np.int32)
    for row in ids:
        ends = np.sort(rng.choice(np.arange(1, tokens), segments - 1, replace=False))
        for number, part in enumerate(np.split(np.arange(tokens), ends), 1):
            row[part] = number
            row[part[: rng.integers(0, max(2, len(part) // 16))]] = 0
        row[tokens - rng.integers(1, max(2, tokens // 32)) :] = 0
        hole = rng.integers(0, tokens)
        row[hole : hole + max(1, tokens // 64)] = 0
    return ids


def draw(shape: Shape, dtype: DTypeLike, seed: int = 0) -> dict[str, jax.Array]:
    """Return `shape.arrays` filled with random normal values; rows take the slots from the last on, all live."""
    out, arrays = {}, shape.arrays(dtype)
    for number, (name, like) in enumerate(arrays.items()):
        if name == "segment_ids_BT":
            out[name] = jnp.asarray(segment_ids(like.shape[0], like.shape[1], getattr(shape, "segments", 0)))
        elif name == "slots_B":
            out[name] = jnp.arange(arrays["state_SNHH"].shape[0], dtype=jnp.int32)[::-1][: like.shape[0]]
        elif name == "live_B":
            out[name] = jnp.ones(like.shape, bool)
        elif name == "slopes_N":
            (N,) = like.shape
            out[name] = jnp.asarray(2.0 ** (-8 * np.arange(1, N + 1) / N) / 2, like.dtype)
        else:
            out[name] = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), like.shape, like.dtype)
    return out
