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


@dataclass(frozen=True)
class Experts:
    """T tokens of width D, each to A of E experts of width F; `routing` as `expert_ids` draws it."""

    T: int
    D: int
    F: int
    E: int
    A: int
    routing: str = "balanced"

    def __str__(self):
        return f"{self.T} x {self.D}, {self.A} of {self.E} experts of {self.F}, {self.routing}"

    def arrays(self, dtype: DTypeLike) -> Arrays:
        """Return the arguments of `expert_mlp` by name."""
        T, D, F, E, A, wide = self.T, self.D, self.F, self.E, self.A, jnp.promote_types(dtype, jnp.float32)
        return {
            "x_TD": ShapeDtypeStruct((T, D), dtype),
            "expert_ids_TA": ShapeDtypeStruct((T, A), jnp.int32),
            "combine_weights_TA": ShapeDtypeStruct((T, A), wide),
            "w_gate_EDF": ShapeDtypeStruct((E, D, F), dtype),
            "w_up_EDF": ShapeDtypeStruct((E, D, F), dtype),
            "w_down_EFD": ShapeDtypeStruct((E, F, D), dtype),
        }


Shape = Lightning | Decode | GatedNorm | Softmax | Experts


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
    "experts": (
        Experts(T=150, D=128, F=128, E=4, A=2, routing="balanced"),
        Experts(T=150, D=128, F=128, E=4, A=2, routing="zipf"),
        Experts(T=150, D=128, F=128, E=4, A=1, routing="one"),
        Experts(T=70, D=48, F=200, E=5, A=2, routing="empty"),  # widths with zeros behind
        Experts(T=3, D=128, F=256, E=8, A=3, routing="balanced"),  # more experts than a step reaches
    ),
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
    "experts": (
        Experts(T=16_384, D=6_144, F=9_216, E=32, A=2),
        Experts(T=16_384, D=6_144, F=9_216, E=32, A=2, routing="zipf"),
        Experts(T=64, D=6_144, F=9_216, E=32, A=2),  # a step of decoding
        Experts(T=65_536, D=6_144, F=9_216, E=4, A=2),  # one of eight expert-parallel shards
        Experts(T=16_384, D=1_024, F=1_536, E=32, A=2),  # a model of width 1024
        Experts(T=65_536, D=1_024, F=1_536, E=32, A=2, routing="zipf"),
        Experts(T=4_096, D=512, F=768, E=32, A=2),
        Experts(T=4_096, D=512, F=768, E=32, A=2, routing="zipf"),
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


def expert_ids(shape: Experts) -> np.ndarray:
    """Return int32 [T, A]: the experts that each token goes to, by `shape.routing`.

    "balanced": in turn; "zipf": expert e in proportion to 1 / (e + 1), distinct in each token; "one": all to one;
    "empty": to A experts only, the others get none.
    """
    T, E, A, rng = shape.T, shape.E, shape.A, np.random.default_rng([shape.T, shape.E])
    if shape.routing == "balanced":
        ids = (np.arange(T)[:, None] * A + np.arange(A)) % E
    elif shape.routing == "zipf":  # the A largest of log-weights with Gumbel noise are A draws without replacement
        ids = np.argsort(np.log(np.arange(1, E + 1)) - rng.gumbel(size=(T, E)), axis=1)[:, :A]
    elif shape.routing == "one":
        ids = np.full((T, A), E - 2)
    elif shape.routing == "empty":
        ids = rng.permuted(np.tile(np.arange(1, 1 + A), (T, 1)), axis=1)
    else:
        raise ValueError(f"routing: {shape.routing!r} must be balanced, zipf, one or empty")
    return ids.astype(np.int32)


def draw(shape: Shape, dtype: DTypeLike, seed: int = 0) -> dict[str, jax.Array]:
    """Return `shape.arrays` filled with random normal values, weights scaled to keep their inputs' size.

    Rows take the slots from the last on, all live; combine weights of a token sum to 1.
    """
    out, arrays = {}, shape.arrays(dtype)
    for number, (name, like) in enumerate(arrays.items()):
        if name == "segment_ids_BT":
            out[name] = jnp.asarray(segment_ids(like.shape[0], like.shape[1], getattr(shape, "segments", 0)))
        elif name == "slots_B":
            out[name] = jnp.arange(arrays["state_SNHH"].shape[0], dtype=jnp.int32)[::-1][: like.shape[0]]
        elif name == "expert_ids_TA" and isinstance(shape, Experts):
            out[name] = jnp.asarray(expert_ids(shape))
        elif name == "live_B":
            out[name] = jnp.ones(like.shape, bool)
        elif name == "slopes_N":
            (N,) = like.shape
            out[name] = jnp.asarray(2.0 ** (-8 * np.arange(1, N + 1) / N) / 2, like.dtype)
        else:
            out[name] = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), like.shape, like.dtype)
            if name.startswith("w_"):
                out[name] = out[name] / np.sqrt(like.shape[1]).astype(like.dtype)
            elif name == "combine_weights_TA":
                out[name] = jax.nn.softmax(out[name])
    return out
