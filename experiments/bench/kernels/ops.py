"""The operations that are timed: where, by whom, and how a call is made from a shape of `shapes.TARGET_SHAPES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.core import PASSES
from experiments.bench.kernels import roofline
from m1jax.pallas_kernels import gated_norm as norm
from m1jax.pallas_kernels import lightning_attention as lightning
from m1jax.pallas_kernels import softmax_attention as softmax
from m1jax.pallas_kernels.gated_norm.api import IMPLEMENTATIONS as NORMS
from m1jax.pallas_kernels.lightning_attention.api import IMPLEMENTATIONS as LIGHTNINGS
from m1jax.pallas_kernels.moe import expert_mlp, route
from m1jax.pallas_kernels.moe.api import IMPLEMENTATIONS as EXPERTS
from m1jax.pallas_kernels.shapes import Decode, Experts, GatedNorm, Lightning, Softmax, draw
from m1jax.pallas_kernels.softmax_attention.api import IMPLEMENTATIONS as SOFTMAXES

Shape = Lightning | Decode | GatedNorm | Softmax | Experts
Inputs = dict[str, Any]
FORWARD = PASSES[0]


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        implementations: all that it has.
        call: (inputs by name, implementation) -> what it computes.
        work: (shape, with its gradient?, bytes of an element) -> the least work there is.
        wrt: the inputs that get gradients; none, and there is no backward pass.
        state: an input that the call gives back changed, as the last of its results; it is donated.
        draw: (shape, dtype) -> the inputs.
        slow: by platform, implementations that are left out unless named.
    """

    implementations: Sequence[str]
    call: Callable[[Inputs, str | None], Any]
    work: Callable[[Any, bool, int], roofline.Work]
    wrt: Sequence[str] = ()
    state: str = ""
    draw: Callable[[Any, Any], Inputs] = draw
    slow: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def passes(self) -> Sequence[str]:
        return PASSES if self.wrt else PASSES[:1]


def call_lightning(inputs: Inputs, implementation: str | None) -> jax.Array:
    """Rows that start from a state of zero, as the peers' do."""
    inputs = {name: x for name, x in inputs.items() if name != "initial_state_BNHH"}
    return lightning.lightning_attention(**inputs, implementation=implementation)[0]


def call_softmax(inputs: Inputs, implementation: str | None) -> jax.Array:
    """Packed rows by their segment ids, others without, which is another program."""
    packed: Any = {}
    if (ids_BT := inputs.get("segment_ids_BT")) is not None:
        t_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        packed = dict(q_positions_BT=t_BT, k_positions_BS=t_BT, q_segment_ids_BT=ids_BT, k_segment_ids_BS=ids_BT)
    q_BTNH, k_BTKH, v_BTKH = (inputs[name] for name in ("q_BTNH", "k_BTKH", "v_BTKH"))
    return softmax.softmax_attention(q_BTNH, k_BTKH, v_BTKH, **packed, in_order=True, implementation=implementation)


ROUTED = 16.0
"""What is added to the logits of the experts that a shape's routing chooses: far more than logits differ by."""


def draw_experts(shape: Experts, dtype: Any) -> Inputs:
    """Tokens, the weights of the experts and of a router, and what bends its logits to the shape's routing."""
    inputs = draw(shape, dtype)
    ids_TA, _ = inputs.pop("expert_ids_TA"), inputs.pop("combine_weights_TA")
    w_router_DE = jax.random.normal(jax.random.key(2), (shape.D, shape.E), jnp.float32) / shape.D**0.5
    routing_TE = ROUTED * jax.nn.one_hot(ids_TA, shape.E).sum(axis=1)
    return inputs | {"w_router_DE": w_router_DE, "routing_TE": routing_TE}


def call_experts(inputs: Inputs, implementation: str | None, num_selected: int = 2) -> jax.Array:
    """The whole layer: router, sort, experts, sum."""
    x_TD, w_router_DE, routing_TE, *weights = (
        inputs[name] for name in ("x_TD", "w_router_DE", "routing_TE", "w_gate_EDF", "w_up_EDF", "w_down_EFD")
    )
    logits_TE = jnp.dot(x_TD.astype(jnp.float32), w_router_DE, precision=jax.lax.Precision.HIGHEST) + routing_TE
    ids_TA, combine_TA = route(logits_TE, num_selected)
    return expert_mlp(x_TD, ids_TA, combine_TA, *weights, implementation=implementation)


OPS = {
    "lightning": Op(
        tuple(LIGHTNINGS), call_lightning, roofline.lightning, wrt=("q_BTNH", "k_BTNH", "v_BTNH"),
        slow=dict.fromkeys(("cpu", "gpu", "tpu"), ("reference",)),  # token by token
    ),
    "decode": Op(
        tuple(name for name in LIGHTNINGS if name != "reference"),  # whose decode is that of xla
        lambda inputs, implementation: lightning.fused_decode(**inputs, implementation=implementation),
        roofline.decode,
        state="state_SNHH",
    ),
    "gated_norm": Op(
        tuple(NORMS),
        lambda inputs, implementation: norm.gated_norm(**inputs, eps=1e-5, implementation=implementation),
        roofline.gated_norm,
        wrt=("o_MX", "gate_MX", "scale_X"),
    ),
    "softmax": Op(SOFTMAXES, call_softmax, roofline.softmax, wrt=("q_BTNH", "k_BTKH", "v_BTKH")),
    "experts": Op(
        tuple(EXPERTS), call_experts, roofline.experts, draw=draw_experts,
        wrt=("x_TD", "w_router_DE", "w_gate_EDF", "w_up_EDF", "w_down_EFD"),
        # Every expert for every token; so do ragged products on a CPU, and tokamax takes JAX's there.
        slow={"cpu": ("reference", "ragged_dot", "tokamax"), "gpu": ("reference",), "tpu": ("reference",)},
    ),
}  # fmt: skip

GROWTH = "growth"
"""Lightning attention at shapes that differ in their length alone, measured together."""
OPS[GROWTH] = OPS["lightning"]

CROSSOVER = Op(
    SOFTMAXES,
    lambda inputs, implementation: softmax.softmax_attention(
        *(inputs[f"{x}_BTNH"] for x in "qkv"), implementation=implementation
    ),
    lambda s, backward, itemsize: roofline.softmax(Softmax(s.B, s.T, s.N, s.N, s.H), backward, itemsize),
    wrt=OPS["lightning"].wrt,
)
"""Softmax attention on the inputs of lightning attention, every head with its own keys and values: what it replaces."""


def refusal(op: Op, shape: Shape, dtype: str, implementation: str) -> str | None:
    """Why the operation refuses to run so here, in its own words or those of a library; None where it does not."""
    try:
        jax.eval_shape(lambda: op.call(op.draw(shape, dtype), implementation))
    except ValueError as error:
        return str(error).split("\n")[0]
    except RuntimeError as error:  # from JAX, where cuDNN is missing
        return f"{implementation}: {error}".split("\n")[0]
    return None


def starter(op: Op, inputs: Inputs, implementation: str | None, way: str) -> Callable[[], Any]:
    """A call without arguments that starts the operation once and does not wait for its end.

    With its gradient: the output, and for a random cotangent of it those of `op.wrt`.
    """
    if op.state:
        return _stepper(op, inputs, implementation)
    varied = {name: inputs[name] for name in op.wrt}
    fixed = {name: x for name, x in inputs.items() if name not in op.wrt}
    function = lambda varied, fixed: op.call(varied | fixed, implementation)  # noqa: E731
    if way == FORWARD:
        return partial(jax.jit(function), varied, fixed)
    output = jax.eval_shape(function, varied, fixed)
    cotangent = jax.random.normal(jax.random.key(1), output.shape, output.dtype)

    @jax.jit
    def both(varied, fixed, cotangent):
        output, transpose = jax.vjp(lambda varied: function(varied, fixed), varied)
        return output, transpose(cotangent)

    return partial(both, varied, fixed, cotangent)


def _stepper(op: Op, inputs: Inputs, implementation: str | None) -> Callable[[], Any]:
    """The state goes round, donated, from call to call: it is changed in place where the implementation can."""
    state, fixed = jnp.copy(inputs[op.state]), {name: x for name, x in inputs.items() if name != op.state}
    step = jax.jit(lambda state, fixed: op.call({op.state: state} | fixed, implementation), donate_argnums=0)

    def start() -> Any:
        nonlocal state
        *outputs, state = step(state, fixed)
        return outputs

    return start
