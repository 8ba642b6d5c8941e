"""The experts' kernels of GPUs and TPUs, interpreted on a CPU, and the plain one, against all experts in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.pallas_kernels.compat import interpreted, lowering_for
from m1jax.pallas_kernels.moe import expert_mlp, route
from m1jax.pallas_kernels.moe.api import choose
from m1jax.pallas_kernels.moe.layout import layout_of
from m1jax.pallas_kernels.moe.ragged import has_tokamax
from m1jax.pallas_kernels.moe.xla import FEW_TOKENS
from m1jax.pallas_kernels.shapes import NUMERIC_SHAPES, TARGET_SHAPES, Experts, draw, expert_ids

IMPLEMENTATIONS = [
    ("xla", "float32"),
    ("xla", "bfloat16"),
    ("mosaic_tpu", "float32"),
    ("mosaic_tpu", "bfloat16"),
    ("ragged_dot", "float32"),
    ("ragged_dot", "bfloat16"),
    pytest.param("tokamax", "float32", marks=pytest.mark.skipif(not has_tokamax(), reason="an extra")),
    pytest.param("tokamax", "bfloat16", marks=pytest.mark.skipif(not has_tokamax(), reason="an extra")),
    ("mosaic_gpu", "bfloat16"),
]
NAMES = ("y", "dx", "drouter", "dw_gate", "dw_up", "dw_down")


def inputs(shape, dtype):
    """Return x, router logits whose best A are the ids of `shape.routing`, the three weights, and dy."""
    drawn = draw(shape, dtype)
    chosen_TE = (np.asarray(drawn["expert_ids_TA"])[:, :, None] == np.arange(shape.E)).any(1)
    rng = np.random.default_rng(0)
    logits_TE = np.where(chosen_TE, 6.0, 0.0) + rng.uniform(-1, 1, size=(shape.T, shape.E))
    args = (
        drawn["x_TD"],
        jnp.asarray(logits_TE, jnp.float32),
        *(drawn[x] for x in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")),
    )
    return args, draw(shape, dtype, seed=1)["x_TD"]


def layer(implementation, num_selected):
    """Return the mixture of experts with its router: (args, dy) to y and the gradients of all args."""

    def mixture(x, logits, *weights):
        ids, combine = route(logits, num_selected)
        return expert_mlp(x, ids, combine, *weights, implementation=implementation)

    def both(args, dy):
        y, pull = jax.vjp(mixture, *args)
        return y, *pull(dy)

    return jax.jit(both)


def all_experts(args, dy, num_selected):
    """Return the same of every expert for every token, weighted by a softmax over all, in float64.

    And the norm of the terms that the router's gradient is a difference of.
    """

    def weigh(logits):
        top, ids = jax.lax.top_k(jax.nn.softmax(logits), num_selected)
        return jnp.zeros_like(logits).at[jnp.arange(len(ids))[:, None], ids].set(top / top.sum(1, keepdims=True))

    def mixture(x, combine, w_gate, w_up, w_down):
        hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, w_gate)) * jnp.einsum("td,edf->tef", x, w_up)
        return jnp.einsum("te,tef,efd->td", combine, hidden, w_down)

    with jax.enable_x64(True):
        x, logits, *weights = (jnp.asarray(np.asarray(x, np.float64)) for x in args)
        combine, pull_router = jax.vjp(weigh, logits)
        y, pull = jax.vjp(jax.jit(mixture), x, combine, *weights)
        dx, dcombine, *dweights = pull(jnp.asarray(np.asarray(dy, np.float64)))
        return (y, dx, *pull_router(dcombine), *dweights), np.linalg.norm(combine * dcombine)


ROUNDING = 2.0**-7 / np.sqrt(12 * 1.5 / np.log(2))
"""Norm error of one rounding to bfloat16: uniform in a unit, 2^-7 of the power of two below, 1 / sqrt(12) of it in the
mean; the square of a number between two powers is 1.5 / ln 2 of the lower one's in the mean."""


def tolerance(name, implementation, dtype, shape):
    """Return the largest norm error that rounding explains.

    bfloat16: independent roundings on the way to each result add up as the root of their number. Of the kernels: y by
    hidden, a row, y; weights and router by gate and up, their gradient or the row that they meet, the result; dx by one
    more, for rows are rounded before a token's are added up. In blocks of plain JAX gate, up and rows stay float32. A
    quarter more: the roundings of one array are those of a few hundred numbers at least, and the mean of their squares
    scatters. float32: sums of as many terms, in any order.
    """
    if dtype == "float32":
        return np.finfo(np.float32).eps * np.sqrt(shape.D + shape.F + shape.T * shape.A)
    in_blocks = implementation == "xla" and shape.T > FEW_TOKENS
    roundings = {"y": 2, "drouter": 1}.get(name, 2) if in_blocks else {"y": 3, "dx": 5}.get(name, 4)
    return 1.25 * ROUNDING * np.sqrt(roundings)


def norm_error(found, expected, norm=None):
    """Return the norm of the error as a share of the norm, or of another one."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / max(norm or np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("shape", NUMERIC_SHAPES["experts"], ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTATIONS)
def test_outputs_and_all_gradients_are_those_of_all_experts(implementation, dtype, shape):
    args, dy = inputs(shape, dtype)
    ids, _ = route(args[1], shape.A)
    np.testing.assert_array_equal(np.sort(ids, 1), np.sort(expert_ids(shape), 1))
    with interpreted():
        found = layer(implementation, shape.A)(args, dy)
    expected, router_terms = all_experts(args, dy, shape.A)
    for name, a, b, like in zip(NAMES, found, expected, (args[0], *args), strict=True):
        assert a.dtype == like.dtype, name
        if name == "drouter" and shape.A == 1:  # the one weight is 1 whatever the logit
            np.testing.assert_array_equal(a, 0)
        else:
            norm = router_terms if name == "drouter" else None
            assert norm_error(a, b, norm) < tolerance(name, implementation, dtype, shape), name
        if name.startswith("dw"):
            unused = np.setdiff1d(np.arange(shape.E), ids)
            assert not np.asarray(a[unused]).any(), name


SLOW_GPU = pytest.param("mosaic_gpu", "bfloat16", marks=pytest.mark.slow)  # interpreted, ten times


@pytest.mark.parametrize(("implementation", "dtype"), [*IMPLEMENTATIONS[:-1], SLOW_GPU])
def test_ten_runs_give_the_same_bits(implementation, dtype):
    shape = NUMERIC_SHAPES["experts"][3]
    args, dy = inputs(shape, dtype)
    with interpreted():
        run = layer(implementation, shape.A)
        first, *others = (jax.tree.map(np.asarray, run(args, dy)) for _ in range(10))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.parametrize("visit_all", [False, True])
def test_a_layout_by_hand(visit_all):
    """The picture in layout.py, with an expert without rows in between: blocks of 2."""
    ids = np.array([[1, 3], [0, 1], [1, 3]])
    layout = layout_of(jnp.asarray(ids), 4, 2, visit_all=visit_all)
    gap, G = ([[6, 6]], 3 + 4) if visit_all else ([], (6 + 4) // 2)
    rows = [[2, 6], [0, 3], [4, 6], *gap, [1, 5]]
    empty = G - len(rows)
    np.testing.assert_array_equal(layout.rows_GC, [*rows, *[[6, 6]] * empty])
    np.testing.assert_array_equal(layout.slot_TA, [[2, 6 + 2 * visit_all], [0, 3], [4, 7 + 2 * visit_all]])
    np.testing.assert_array_equal(layout.begin_E, [0, 1, 3, 3 + visit_all])
    np.testing.assert_array_equal(layout.end_E, [1, 3, 3, 4 + visit_all])
    np.testing.assert_array_equal(layout.expert_G, [0, 1, 1, *[2] * visit_all, 3, *[3] * empty])
    np.testing.assert_array_equal(layout.live_G, [1, 2, 1, *[0] * visit_all, 2, *[0] * empty])


@pytest.mark.parametrize("visit_all", [False, True])
@pytest.mark.parametrize("routing", ["balanced", "zipf", "one", "empty"])
def test_every_row_has_a_slot_of_its_expert_in_order_of_tokens(routing, visit_all):
    shape = Experts(T=333, D=1, F=1, E=7, A=2, routing=routing)
    ids_R = expert_ids(shape).reshape(-1)
    layout = layout_of(jnp.asarray(ids_R.reshape(-1, 2)), shape.E, 32, visit_all=visit_all)
    slots, rows_S = np.asarray(layout.slot_TA).reshape(-1), np.asarray(layout.rows_GC).reshape(-1)
    np.testing.assert_array_equal(rows_S[slots], np.arange(ids_R.size))
    assert (rows_S < ids_R.size).sum() == ids_R.size
    np.testing.assert_array_equal(np.asarray(layout.expert_G)[slots // 32], ids_R)
    for expert in range(shape.E):
        mine = slots[ids_R == expert]
        np.testing.assert_array_equal(mine, np.arange(mine.size) + 32 * int(layout.begin_E[expert]))
        assert int(layout.end_E[expert] - layout.begin_E[expert]) == -(-mine.size // 32)
    if visit_all:
        assert set(np.asarray(layout.expert_G)) == set(range(shape.E))


def test_the_best_implementation_of_a_device():
    for platform, dtype, expected in (
        ("gpu", "bfloat16", "mosaic_gpu"),
        ("gpu", "float32", "xla"),
        ("tpu", "bfloat16", "mosaic_tpu"),
        ("tpu", "float32", "mosaic_tpu"),
    ):
        with lowering_for(platform):
            assert choose(None, jnp.dtype(dtype)) == expected, (platform, dtype)
    assert choose(None, jnp.dtype("bfloat16")) == "xla"


def test_what_cannot_run_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(
        ValueError, match="'ragged_dot' cannot run here: it multiplies .* and x is float64; choose 'xla'"
    ):
        choose("ragged_dot", jnp.dtype("float64"))
    monkeypatch.setattr("m1jax.pallas_kernels.moe.ragged.has_tokamax", lambda: False)
    with pytest.raises(ValueError, match=r"'tokamax' cannot run here: it is not installed .*m1jax\[tokamax\]"):
        choose("tokamax", jnp.dtype("bfloat16"))


def test_target_shapes_are_those_of_the_model():
    from configs.models import m1

    config = m1()
    layer = TARGET_SHAPES["experts"][0]
    assert layer == Experts(
        T=layer.T, D=config.hidden_size, F=config.expert_dim, E=config.num_experts, A=config.experts_per_token
    )
