"""The experts' MLPs with every expert computed for every token, differentiated by JAX. Slow, and right."""

import jax
import jax.numpy as jnp


def expert_mlp(x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD):
    """Return y_TD; `api.expert_mlp` says what the arguments mean."""
    wide = jnp.promote_types(x_TD.dtype, jnp.float32)
    selected_TAE = expert_ids_TA[:, :, None] == jnp.arange(w_gate_EDF.shape[0])
    combine_TE = jnp.einsum("ta,tae->te", combine_weights_TA.astype(wide), selected_TAE)
    gate_TEF = jnp.einsum("td,edf->tef", x_TD, w_gate_EDF, preferred_element_type=wide)
    up_TEF = jnp.einsum("td,edf->tef", x_TD, w_up_EDF, preferred_element_type=wide)
    out_TED = jnp.einsum("tef,efd->ted", jax.nn.silu(gate_TEF) * up_TEF, w_down_EFD.astype(wide))
    return jnp.einsum("te,ted->td", combine_TE, out_TED).astype(x_TD.dtype)
