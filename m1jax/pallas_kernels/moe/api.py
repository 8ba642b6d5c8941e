"""The public function of the experts: it checks shapes and chooses an implementation, nothing else."""

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels.moe import reference, xla

IMPLEMENTATIONS = {
    "reference": reference.expert_mlp,
    "xla": xla.expert_mlp,
}


def expert_mlp(
    x_TD: jax.Array,
    expert_ids_TA: jax.Array,
    combine_weights_TA: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Return the weighted sum of the selected experts' gated MLPs.

        y_t = sum_a combine[t, a] * (silu(x_t W_gate[e]) * (x_t W_up[e])) W_down[e],  e = expert_ids[t, a]

    No token is dropped, however uneven the routing. Products add up in float32 (float64 for float64 inputs), and
    equal inputs give equal bits: nothing is added in an order that could change.

    Args:
        x_TD: floating [T, D].
        expert_ids_TA: int32 [T, A], each in 0..E-1.
        combine_weights_TA: floating [T, A].
        w_gate_EDF, w_up_EDF: floating [E, D, F].
        w_down_EFD: floating [E, F, D].
        implementation: a key of `IMPLEMENTATIONS`, or None for the best one on this backend.

    Returns:
        y_TD in the dtype of x, with gradients to all arguments but the ids.

    Raises:
        ValueError: shapes disagree, or there is no such implementation.
    """
    if x_TD.ndim != 2 or w_gate_EDF.ndim != 3:
        raise ValueError(f"x must be [T, D] and w_gate [E, D, F], found {x_TD.shape} and {w_gate_EDF.shape}")
    (T, D), (E, _, F), A = x_TD.shape, w_gate_EDF.shape, expert_ids_TA.shape[-1]
    for name, array, expected in (
        ("expert_ids", expert_ids_TA, (T, A)),
        ("combine_weights", combine_weights_TA, (T, A)),
        ("w_gate", w_gate_EDF, (E, D, F)),
        ("w_up", w_up_EDF, (E, D, F)),
        ("w_down", w_down_EFD, (E, F, D)),
    ):
        if array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}, but x and the others ask for {expected}")
    if implementation is None:
        implementation = "xla"  # the best one on every backend, until a backend has its own kernel
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"expert_mlp has no implementation {implementation!r} on {jax.default_backend()}; "
            f"available: {sorted(IMPLEMENTATIONS)}"
        )
    inputs = x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD
    return IMPLEMENTATIONS[implementation](*map(jnp.asarray, inputs))
