"""The public function of the experts: it checks shapes and chooses an implementation, nothing else."""

import jax
import jax.numpy as jnp

from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.moe import mosaic_gpu, mosaic_tpu, ragged, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.expert_mlp,
    "xla": xla.expert_mlp,
    "mosaic_tpu": mosaic_tpu.expert_mlp,
    "mosaic_gpu": mosaic_gpu.expert_mlp,
    "ragged_dot": ragged.lax,
    "tokamax": ragged.tokamax,
}
"""`reference` computes every expert for every token, `xla` is plain JAX in blocks, `mosaic_*` are kernels for a device;
`ragged_dot` and `tokamax` leave the products to JAX's own ragged product (slow but on TPUs) and to that library's."""


def choose(implementation: str | None, dtype: jnp.dtype) -> str:
    """Return the implementation to use: the named one, or for None the best one of what programs are made for.

    Raises:
        ValueError: the named one does not exist or cannot run here; another is never taken in its place.
    """
    if implementation is None:
        kernel = f"mosaic_{compat.platform()}"
        return kernel if kernel in IMPLEMENTATIONS and not _why_not(kernel, dtype) else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"expert_mlp has no implementation {implementation!r}; available: {sorted(IMPLEMENTATIONS)}")
    if reason := _why_not(implementation, dtype):
        raise ValueError(f"expert_mlp by {implementation!r} cannot run here: {reason}; choose 'xla'")
    return implementation


def _why_not(implementation: str, dtype: jnp.dtype) -> str | None:
    """Return why an implementation cannot do this, or None."""
    if implementation in ("reference", "xla"):
        return None
    if implementation == "tokamax" and not ragged.has_tokamax():
        return 'it is not installed (pip install "m1jax[tokamax]")'
    allowed = ("bfloat16",) if implementation == "mosaic_gpu" else ("bfloat16", "float32")
    if jnp.dtype(dtype).name not in allowed:
        return f"it multiplies {' and '.join(allowed)}, and x is {jnp.dtype(dtype).name}"
    return compat.why_not(implementation) if implementation.startswith("mosaic") else None


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
        x_TD: floating [T, D], T > 0.
        expert_ids_TA: int32 [T, A]; one that is none of 0..E-1 is of no expert here, and adds nothing.
        combine_weights_TA: floating [T, A], float32 from `route`.
        w_gate_EDF, w_up_EDF: [E, D, F] in the dtype of x.
        w_down_EFD: [E, F, D] in the dtype of x.
        implementation: a key of `IMPLEMENTATIONS`, or None for the best one on this backend.

    Returns:
        y_TD in the dtype of x, with gradients to all arguments but the ids.

    Raises:
        ValueError: shapes or dtypes disagree, or the implementation does not exist or cannot run here.
    """
    if x_TD.ndim != 2 or w_gate_EDF.ndim != 3 or expert_ids_TA.ndim != 2 or not x_TD.size:
        found = f"{x_TD.shape}, {expert_ids_TA.shape} and {w_gate_EDF.shape}"
        raise ValueError(f"x must be [T, D] with T > 0, expert_ids [T, A] and w_gate [E, D, F], found {found}")
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
    for name, array in (("w_gate", w_gate_EDF), ("w_up", w_up_EDF), ("w_down", w_down_EFD)):
        if array.dtype != x_TD.dtype or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} is {array.dtype} and x is {x_TD.dtype}; x and the weights have one floating dtype"
            )
    if not jnp.issubdtype(expert_ids_TA.dtype, jnp.integer):
        raise ValueError(f"expert_ids is {expert_ids_TA.dtype}, and ids are integers")
    if not jnp.issubdtype(combine_weights_TA.dtype, jnp.floating):
        raise ValueError(f"combine_weights is {combine_weights_TA.dtype}, and weights are floating")
    chosen = choose(implementation, x_TD.dtype)
    inputs = x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD
    return IMPLEMENTATIONS[chosen](*map(jnp.asarray, inputs))
