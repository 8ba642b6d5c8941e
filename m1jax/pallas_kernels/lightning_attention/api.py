"""The public functions of lightning attention: they check shapes and choose an implementation, nothing else."""

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels.lightning_attention import reference, xla

IMPLEMENTATIONS = {
    "reference": reference.lightning_attention,
    "xla": xla.lightning_attention,
}


def lightning_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    slopes_N: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    initial_state_BNHH: jax.Array | None = None,
    chunk: int = 128,
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
        chunk: tokens computed at once; it sets speed and memory, not the result.
        implementation: a key of `IMPLEMENTATIONS`, or None for the best one on this backend.

    Returns:
        o_BTNH in the dtype of q, and the final state [B, N, H, H] in float32 (float64): that of the row's last
        live segment, or the initial state where a row has no live token.

    Raises:
        ValueError: shapes disagree, `chunk` is not positive, or there is no such implementation.
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
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but a chunk holds at least one token")
    if implementation is None:
        implementation = "xla"  # the best one on every backend, until a backend has its own kernel
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"lightning attention has no implementation {implementation!r} on {jax.default_backend()}; "
            f"available: {sorted(IMPLEMENTATIONS)}"
        )
    inputs = q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH
    return IMPLEMENTATIONS[implementation](*jax.tree.map(jnp.asarray, inputs), chunk=chunk)


def lightning_decode(
    q_BNH: jax.Array,
    k_BNH: jax.Array,
    v_BNH: jax.Array,
    slopes_N: jax.Array,
    state_BNHH: jax.Array,
    live_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return output and state of one further token per row: the recurrence of `lightning_attention`, taken once.

    Args:
        q_BNH, k_BNH, v_BNH: floating [B, N, H].
        slopes_N: floating [N].
        state_BNHH: float32 [B, N, H (keys), H (values)], left by `lightning_attention` or by the last call.
        live_B: bool [B]; a row that is not live keeps its state and its output is 0. None: all are live.

    Returns:
        o_BNH in the dtype of q, and the new state in the dtype of the old one.
    """
    if q_BNH.ndim != 3:
        raise ValueError(f"q must be [B, N, H], found {q_BNH.shape}")
    B, N, H = q_BNH.shape
    _check_shape("k", k_BNH, (B, N, H))
    _check_shape("v", v_BNH, (B, N, H))
    _check_shape("slopes", slopes_N, (N,))
    _check_shape("state", state_BNHH, (B, N, H, H))
    dtype = state_BNHH.dtype
    q, k, v = (jnp.asarray(x, dtype) for x in (q_BNH, k_BNH, v_BNH))
    decay_N = jnp.exp(-jax.lax.stop_gradient(jnp.asarray(slopes_N, dtype)))
    new_BNHH = decay_N[:, None, None] * state_BNHH + k[:, :, :, None] * v[:, :, None, :]
    o_BNH = jnp.einsum("bnd,bnde->bne", q, new_BNHH)
    if live_B is not None:
        _check_shape("live", live_B, (B,))
        new_BNHH = jnp.where(live_B[:, None, None, None], new_BNHH, state_BNHH)
        o_BNH = jnp.where(live_B[:, None, None], o_BNH, 0)
    return o_BNH.astype(q_BNH.dtype), new_BNHH


def _check_shape(name: str, x: jax.Array, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} has shape {x.shape}, but q and the others ask for {expected}")
