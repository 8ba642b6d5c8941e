"""The public functions of lightning attention: they check shapes and choose an implementation, nothing else."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.lightning_attention import mosaic_gpu, mosaic_tpu, reference, xla


class Implementation(NamedTuple):
    """One way to compute it: over whole rows, and one token further."""

    lightning_attention: Callable
    decode: Callable


IMPLEMENTATIONS = {
    "reference": Implementation(reference.lightning_attention, xla.decode),
    "xla": Implementation(xla.lightning_attention, xla.decode),
    "mosaic_tpu": Implementation(mosaic_tpu.lightning_attention, mosaic_tpu.decode),
    "mosaic_gpu": Implementation(mosaic_gpu.lightning_attention, mosaic_gpu.decode),
}
"""`reference` is the recurrence as it is written, `xla` plain JAX in chunks, the others kernels for one device."""

LARGEST_HEAD = 128
"""Of the kernels: a state of 128 x 128 is what a GPU's registers hold."""


def choose(implementation: str | None, dtype: jnp.dtype, head_dim: int) -> str:
    """Return the implementation to use: the named one, or for None the best one of what programs are made for.

    Raises:
        ValueError: the named one does not exist or cannot run here; another is never taken in its place.
    """
    if implementation is None:
        kernel = f"mosaic_{compat.platform()}"
        return kernel if kernel in IMPLEMENTATIONS and not _why_not(kernel, dtype, head_dim) else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"lightning attention has no implementation {implementation!r}; available: {sorted(IMPLEMENTATIONS)}"
        )
    if reason := _why_not(implementation, dtype, head_dim):
        raise ValueError(f"lightning attention by {implementation!r} cannot run here: {reason}; choose 'xla'")
    return implementation


def _why_not(implementation: str, dtype: jnp.dtype, head_dim: int) -> str | None:
    """Return why an implementation cannot do this, or None."""
    if not implementation.startswith("mosaic"):
        return None
    allowed = {"mosaic_tpu": ("bfloat16", "float32"), "mosaic_gpu": ("bfloat16",)}[implementation]
    if jnp.dtype(dtype).name not in allowed:
        return f"its matrix units multiply {' and '.join(allowed)}, and q is {jnp.dtype(dtype).name}"
    if head_dim > LARGEST_HEAD:
        return f"it takes heads up to {LARGEST_HEAD} wide, and q has {head_dim}"
    return compat.why_not(implementation)


def lightning_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    slopes_N: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    initial_state_BNHH: jax.Array | None = None,
    chunk: int = 64,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs of every token and the state after the last live one.

        S_t = exp(-slope) S_{t-1} + k_t^T v_t
        o_t = q_t S_t                            (no scale, no normaliser)

    per row and head (Lightning Attention-2, arXiv:2401.04658; MiniMax-01, arXiv:2501.08313). The state is kept in
    float32, or float64 for float64 inputs. All of q, k, v and the initial state get gradients; the slopes are
    constants of the model and get none.

        segment_ids   0 0 1 1 1 0 1 2 2 2 0      0 = padding: adds nothing, decays nothing, its output is 0
        state         i i S S S S S s s s s      i = initial state, S carries on from it, s starts from zero

    Args:
        q_BTNH, k_BTNH, v_BTNH: floating [B, T, N, H], one dtype.
        slopes_N: floating [N], not negative.
        segment_ids_BT: int32 [B, T]; equal positive ids are one segment and lie together, save for padding between.
            None: every token is live and each row is one segment.
        initial_state_BNHH: [B, N, H (keys), H (values)], the state that the first live segment of each row starts
            from. None: zero.
        chunk: tokens that `xla` computes at once; it sets speed and memory, not the result. Kernels have their own.
        implementation: a key of `IMPLEMENTATIONS`, or None for the best one on this backend. The kernels sum in
            float32 and keep float32 states; bfloat16 inputs they multiply as bfloat16.

    Returns:
        o_BTNH in the dtype of q, and the final state [B, N, H, H] in float32 (float64): that of the row's last
        live segment, or the initial state where a row has no live token.

    Raises:
        ValueError: shapes disagree, `chunk` is not positive, or the implementation does not exist or cannot run here.
    """
    if q_BTNH.ndim != 4 or q_BTNH.shape[1] == 0:
        raise ValueError(f"q must be [B, T, N, H] with T > 0, found {q_BTNH.shape}")
    B, T, N, H = q_BTNH.shape
    _check_shape("k", k_BTNH, (B, T, N, H))
    _check_shape("v", v_BTNH, (B, T, N, H))
    _check_shape("slopes", slopes_N, (N,))
    if segment_ids_BT is not None:
        _check_shape("segment_ids", segment_ids_BT, (B, T))
    if initial_state_BNHH is not None:
        _check_shape("initial_state", initial_state_BNHH, (B, N, H, H))
    for name, array in (("k", k_BTNH), ("v", v_BTNH)):
        _check_dtype(name, array, q_BTNH.dtype)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but a chunk holds at least one token")
    inputs = jax.tree.map(jnp.asarray, (q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH))
    chosen = IMPLEMENTATIONS[choose(implementation, inputs[0].dtype, H)]
    return chosen.lightning_attention(*inputs, chunk=chunk)


def lightning_decode(
    q_BNH: jax.Array,
    k_BNH: jax.Array,
    v_BNH: jax.Array,
    slopes_N: jax.Array,
    state_SNHH: jax.Array,
    *,
    slots_B: jax.Array | None = None,
    live_B: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return output and state of one further token per row: the recurrence of `lightning_attention`, taken once.

    For inference: the kernels have no gradient of it.

    Args:
        q_BNH, k_BNH, v_BNH: floating [B, N, H].
        slopes_N: floating [N].
        state_SNHH: float32 [S, N, H (keys), H (values)], a pool of states as `lightning_attention` leaves them. Donate
            it to the surrounding jit, and the kernels change it in place (on a GPU for heads of 64 and 128; others
            are padded, which copies the pool).
        slots_B: int32 [B], each in 0..S-1, the slot of each row's state; a live row's slot is no other row's. None: S
            is B, and row b has slot b.
        live_B: bool [B]; a row that is not live keeps its state and its output is 0. None: all are live.
        implementation: as in `lightning_attention`.

    Returns:
        o_BNH in the dtype of q, and the pool with the new states.

    Raises:
        ValueError: shapes disagree, or the implementation does not exist or cannot run here.
    """
    if q_BNH.ndim != 3:
        raise ValueError(f"q must be [B, N, H], found {q_BNH.shape}")
    for name, array in (("k", k_BNH), ("v", v_BNH)):
        _check_shape(name, array, q_BNH.shape)
        _check_dtype(name, array, q_BNH.dtype)
    qkv_BN3H = jnp.stack([q_BNH, k_BNH, v_BNH], axis=2)
    o_BNH, _, state_SNHH = _decode(qkv_BN3H, slopes_N, state_SNHH, slots_B, live_B, implementation, activate=False)
    return o_BNH, state_SNHH


def fused_decode(
    qkv_BN3H: jax.Array,
    slopes_N: jax.Array,
    state_SNHH: jax.Array,
    *,
    slots_B: jax.Array | None = None,
    live_B: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `lightning_decode` of SiLU(qkv), and what the norm behind it needs, in one pass over the states.

    SiLU is computed in float32 and rounded once to the dtype of qkv, as in training.

    Args:
        qkv_BN3H: floating [B, N, 3, H], the projection of each row's token.
        slopes_N, state_SNHH, slots_B, live_B, implementation: as in `lightning_decode`.

    Returns:
        o_BNH in the dtype of qkv, the sum of its squares over all heads float32 [B], and the pool with the new states.

    Raises:
        ValueError: as `lightning_decode`.
    """
    if qkv_BN3H.ndim != 4 or qkv_BN3H.shape[2] != 3:
        raise ValueError(f"qkv must be [B, N, 3, H], found {qkv_BN3H.shape}")
    o_BNH, square_BN, state_SNHH = _decode(
        qkv_BN3H, slopes_N, state_SNHH, slots_B, live_B, implementation, activate=True
    )
    return o_BNH, square_BN.sum(axis=1), state_SNHH


def _decode(qkv_BN3H, slopes_N, state_SNHH, slots_B, live_B, implementation, *, activate):
    B, N, _, H = qkv_BN3H.shape
    _check_shape("slopes", slopes_N, (N,))
    _check_shape("state", state_SNHH, (B if slots_B is None else state_SNHH.shape[0], N, H, H))
    for name, array in (("slots", slots_B), ("live", live_B)):
        if array is not None:
            _check_shape(name, array, (B,))
    if state_SNHH.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"state is {state_SNHH.dtype}, and states are float32: less forgets slow heads")
    chosen = choose(implementation, qkv_BN3H.dtype, H)
    if chosen.startswith("mosaic"):  # kernels read both from memory
        slots_B = jnp.arange(B, dtype=jnp.int32) if slots_B is None else slots_B
        live_B = jnp.ones(B, bool) if live_B is None else live_B
    inputs = jax.tree.map(jnp.asarray, (qkv_BN3H, jax.lax.stop_gradient(slopes_N), state_SNHH, slots_B, live_B))
    return IMPLEMENTATIONS[chosen].decode(*inputs, activate=activate)


def _check_dtype(name: str, x: jax.Array, expected: jnp.dtype) -> None:
    if x.dtype != expected or not jnp.issubdtype(expected, jnp.floating):
        raise ValueError(f"{name} is {x.dtype} and q is {expected}; q, k and v have one floating dtype")


def _check_shape(name: str, x: jax.Array, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} has shape {x.shape}, but q and the others ask for {expected}")
