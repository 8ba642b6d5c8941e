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


@dataclass(frozen=True)
class Lightning:
    """B rows of T tokens, N heads of H; `segments` of unequal lengths with padding between, 0 for whole rows."""

    B: int
    T: int
    N: int
    H: int
    segments: int = 0

    def __str__(self):
        packed = f", {self.segments} segments" if self.segments else ""
        return f"{self.B} x {self.T}, {self.N} heads of {self.H}{packed}"


@dataclass(frozen=True)
class Decode:
    """One token of B rows, whose states lie in a pool of S slots; N heads of H."""

    B: int
    S: int
    N: int
    H: int

    def __str__(self):
        return f"{self.B} rows of {self.S} slots, {self.N} heads of {self.H}"


@dataclass(frozen=True)
class GatedNorm:
    """M tokens of N heads of H."""

    M: int
    N: int
    H: int

    def __str__(self):
        return f"{self.M} tokens, {self.N} heads of {self.H}"


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
        packed = f", {self.segments} segments" if self.segments else ""
        return f"{self.B} x {self.T}, {self.N}/{self.K} heads of {self.H}{packed}"


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
        Lightning(B=1, T=1_048_576, N=64, H=128),
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


def abstract(shape: Lightning | Decode | GatedNorm | Softmax, dtype: jax.typing.DTypeLike) -> dict[str, object]:
    """Return the arguments of the shape's operation by name, as `jax.ShapeDtypeStruct`; absent ones are left out."""
    like = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    s, wide = shape, jnp.promote_types(dtype, jnp.float32)
    match shape:
        case Lightning():
            out = {f"{x}_BTNH": like(s.B, s.T, s.N, s.H) for x in "qkv"}
            out |= {"slopes_N": like(s.N, dtype=wide), "initial_state_BNHH": like(s.B, s.N, s.H, s.H, dtype=wide)}
            return out | ({"segment_ids_BT": like(s.B, s.T, dtype=jnp.int32)} if s.segments else {})
        case Decode():
            return {
                "qkv_BN3H": like(s.B, s.N, 3, s.H),
                "slopes_N": like(s.N, dtype=wide),
                "state_SNHH": like(s.S, s.N, s.H, s.H, dtype=wide),
                "slots_B": like(s.B, dtype=jnp.int32),
                "live_B": like(s.B, dtype=jnp.bool_),
            }
        case GatedNorm():
            out = {f"{x}_MX": like(s.M, s.N * s.H) for x in ("o", "gate")}
            return out | {"scale_X": like(s.N * s.H, dtype=wide)}
        case Softmax():
            out = {"q_BTNH": like(s.B, s.T, s.N, s.H)} | {f"{x}_BTKH": like(s.B, s.T, s.K, s.H) for x in "kv"}
            return out | ({"segment_ids_BT": like(s.B, s.T, dtype=jnp.int32)} if s.segments else {})


def draw(shape: Lightning | Decode | GatedNorm | Softmax, dtype: jax.typing.DTypeLike, seed: int = 0) -> dict:
    """Return `abstract` filled with random normal values; rows take the slots from the last on, all live."""
    out = {}
    for number, (name, like) in enumerate(abstract(shape, dtype).items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        if name == "segment_ids_BT":
            out[name] = jnp.asarray(segment_ids(shape.B, shape.T, shape.segments))
        elif name == "slots_B":
            out[name] = jnp.arange(shape.S, dtype=jnp.int32)[::-1][: shape.B]
        elif name == "live_B":
            out[name] = jnp.ones(shape.B, bool)
        elif name == "slopes_N":
            out[name] = jnp.asarray(2.0 ** (-8 * np.arange(1, shape.N + 1) / shape.N) / 2, like.dtype)
        else:
            out[name] = jax.random.normal(key, like.shape, like.dtype)
    return out
