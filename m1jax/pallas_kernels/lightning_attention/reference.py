"""Lightning attention as its definition reads: one token at a time, differentiated by JAX. Slow, and right."""

import jax
import jax.numpy as jnp


def lightning_attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, segment_ids_BT, initial_state_BNHH, *, chunk):
    """Return o_BTNH and the final state; `api.lightning_attention` says what the arguments mean."""
    del chunk  # one token at a time
    B, T, N, H = q_BTNH.shape
    dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    decay_N11 = jnp.exp(-jax.lax.stop_gradient(slopes_N).astype(dtype))[:, None, None]
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
    if initial_state_BNHH is None:
        initial_state_BNHH = jnp.zeros((B, N, H, H), dtype)

    def step(carry, token):
        state_BNHH, segment_B = carry
        q_BNH, k_BNH, v_BNH, id_B = token
        live_B, goes_on_B = id_B > 0, (id_B == segment_B) | (segment_B == 0)
        past_BNHH = jnp.where(goes_on_B[:, None, None, None], state_BNHH, 0)
        new_BNHH = decay_N11 * past_BNHH + jnp.einsum("bnd,bne->bnde", k_BNH, v_BNH)
        o_BNH = jnp.where(live_B[:, None, None], jnp.einsum("bnd,bnde->bne", q_BNH, new_BNHH), 0)
        state_BNHH = jnp.where(live_B[:, None, None, None], new_BNHH, state_BNHH)
        return (state_BNHH, jnp.where(live_B, id_B, segment_B)), o_BNH

    tokens = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q_BTNH, k_BTNH, v_BTNH)]
    start = (initial_state_BNHH.astype(dtype), jnp.zeros(B, segment_ids_BT.dtype))  # 0: no segment seen yet
    (state_BNHH, _), o_TBNH = jax.lax.scan(step, start, (*tokens, segment_ids_BT.T))
    return jnp.moveaxis(o_TBNH, 0, 1).astype(q_BTNH.dtype), state_BNHH
