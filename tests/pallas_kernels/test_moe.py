"""The experts against a dense computation in float64, under every kind of routing; the router by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.pallas_kernels.moe import balance_loss, expert_mlp, route

T, D, E, F, A = 90, 6, 5, 7, 2


def routing(name):
    """Return ids [T, A], distinct in each row where the name allows it."""
    rng = np.random.default_rng(0)
    if name == "balanced":
        return np.stack([np.arange(T) % E, (np.arange(T) + 1) % E], axis=1)
    if name == "zipf":
        share = 1 / np.arange(1, E + 1)
        return np.stack([rng.choice(E, A, replace=False, p=share / share.sum()) for _ in range(T)])
    if name == "all to one":
        return np.full((T, A), 3)
    if name == "empty experts":
        return np.stack([rng.choice([1, 4], A, replace=False) for _ in range(T)])
    if name == "whole blocks":  # of 8, as `xla` takes here, and of 32 together: no empty slot between two experts
        return np.repeat(np.arange(E), [64, 64, 32, 16, 4]).reshape(T, A)
    raise ValueError(name)


ROUTINGS = ("balanced", "zipf", "all to one", "empty experts", "whole blocks")


def inputs():
    """Return x, combine weights, the three weights, and a cotangent of y, float64."""
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(2, E, D, F)) / D**0.5
    return (rng.normal(size=(T, D)), rng.normal(size=(T, A)), *weights, rng.normal(size=(E, F, D))), rng.normal(
        size=(T, D)
    )


def by_hand(x, ids, combine, w_gate, w_up, w_down):
    """Return y of the formula, one token and expert at a time, in NumPy."""
    y = np.zeros_like(x)
    for t in range(T):
        for a in range(A):
            gate, up = x[t] @ w_gate[ids[t, a]], x[t] @ w_up[ids[t, a]]
            y[t] += combine[t, a] * (gate / (1 + np.exp(-gate)) * up) @ w_down[ids[t, a]]
    return y


def run(args, dy, ids, implementation):
    """Return y and the gradients of all floating arguments."""

    def mlp(x, combine, *weights):
        return expert_mlp(x, ids, combine, *weights, implementation=implementation)

    def both(args, dy):
        y, pull = jax.vjp(mlp, *args)
        return y, pull(dy)

    return jax.jit(both)(args, dy)


def error(found, expected):
    """Return the largest error as a share of the largest expected entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.abs(found - expected).max() / np.abs(expected).max()


# Sums of D, F or (weight gradients) T A = 180 terms: errors of about sqrt(180) eps; 100 eps is five times that.
EXACT, SINGLE = 100 * np.finfo(np.float64).eps, 100 * np.finfo(np.float32).eps


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_y_is_the_formula(name, implementation):
    (x, combine, *weights), dy = inputs()
    with jax.enable_x64(True):
        y, _ = run((x, combine, *weights), dy, routing(name), implementation)
    assert y.dtype == np.float64
    assert error(y, by_hand(x, routing(name), combine, *weights)) < EXACT


@pytest.mark.parametrize("name", ROUTINGS)
def test_gradients_are_those_of_the_dense_computation(name):
    args, dy = inputs()
    with jax.enable_x64(True):
        _, expected = run(args, dy, routing(name), "reference")
        _, found = run(args, dy, routing(name), "xla")
    for what, a, b in zip(("x", "combine", "w_gate", "w_up", "w_down"), found, expected, strict=True):
        assert error(a, b) < EXACT, what


def test_gradients_are_finite_differences():
    args, dy = inputs()
    lines = [np.random.default_rng([2, i]).normal(size=x.shape) for i, x in enumerate(args)]
    ids, step = routing("zipf"), 1e-5

    def loss(x, combine, *weights):
        return (by_hand(x, ids, combine, *weights) * dy).sum()

    with jax.enable_x64(True):
        _, grads = run(args, dy, ids, "xla")
    for i, line in enumerate(lines):
        ahead, behind = list(args), list(args)
        ahead[i], behind[i] = args[i] + step * line, args[i] - step * line
        # Central: the error is step^2 |loss'''| / 6 = 1e-10 * 1e2; rounding, eps |loss| / step, is as small.
        difference = (loss(*ahead) - loss(*behind)) / (2 * step)
        np.testing.assert_allclose((np.asarray(grads[i]) * line).sum(), difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ROUTINGS)
def test_float32_stays_near_float64(name):
    args, dy = jax.tree.map(np.float32, inputs())
    found = run(args, dy, routing(name), None)
    with jax.enable_x64(True):
        expected = run(*jax.tree.map(np.float64, (args, dy)), routing(name), "reference")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32
        assert error(a, b) < SINGLE


def test_dtypes_are_those_of_the_inputs():
    args, dy = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), inputs())
    args = (args[0], jnp.float32(args[1]), *args[2:])
    y, grads = run(args, dy, routing("zipf"), "xla")
    assert [x.dtype for x in (y, *grads)] == [x.dtype for x in (args[0], *args)]
    # Three roundings to 8 bits on the way (hidden, the products' gradients, the result), each 2^-9 of the largest.
    expected = by_hand(*(np.float64(x) for x in (args[0],)), routing("zipf"), *(np.float64(x) for x in args[1:]))
    assert error(y, expected) < 3 * 2**-9


def test_equal_inputs_give_equal_bits_and_tokens_do_not_touch():
    """The same token gives the same bits on every call and wherever the others went."""
    args, dy = jax.tree.map(np.float32, inputs())
    first, again = (run(args, dy, routing("zipf"), "xla") for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    ids = routing("zipf").copy()
    ids[1:] = 0
    np.testing.assert_array_equal(run(args, dy, ids, "xla")[0][0], first[0][0])


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_few_tokens(num_tokens):
    (x, combine, *weights), _ = inputs()
    ids = routing("zipf")
    with jax.enable_x64(True):
        y = expert_mlp(x[:num_tokens], ids[:num_tokens], combine[:num_tokens], *weights)
    assert error(y, by_hand(x, ids, combine, *weights)[:num_tokens]) < EXACT


@pytest.mark.parametrize("implementation", ["xla", "ragged_dot"])
@pytest.mark.parametrize(("tokens", "experts"), [(1, 3), (1, 4), (17, 1), (17, 2), (24, 1)])
def test_one_of_few_experts(tokens, experts, implementation):
    """Fewer blocks than are computed together."""
    (x, combine, *weights), dy = jax.tree.map(np.float32, inputs())
    args = (x[:tokens], combine[:tokens, :1], *(w[:experts] for w in weights))
    ids = np.arange(tokens).reshape(-1, 1) % experts
    found, expected = (run(args, dy[:tokens], ids, name) for name in (implementation, "reference"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(a, b) < SINGLE


def test_router_by_hand():
    """p = (1/7, 4/7, 2/7): experts 1 and 2, weights 4/6 and 2/6. Ties: the lower index first."""
    ids, combine = route(jnp.log(jnp.array([[1.0, 4.0, 2.0], [3.0, 3.0, 3.0]])), 2)
    np.testing.assert_array_equal(ids, [[1, 2], [0, 1]])
    assert ids.dtype == jnp.int32
    np.testing.assert_allclose(combine, [[4 / 6, 2 / 6], [0.5, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("num_selected", [1, 2, 5])
def test_router_is_softmax_top_k_renormalised(num_selected):
    logits = np.random.default_rng(0).normal(size=(T, E))
    cotangent = np.random.default_rng(1).normal(size=(T, num_selected))

    def plain(logits):
        top, ids = jax.lax.top_k(jax.nn.softmax(logits), num_selected)
        return top / top.sum(1, keepdims=True), ids

    with jax.enable_x64(True):
        expected, pull, expected_ids = jax.vjp(plain, logits, has_aux=True)
        combine, pull_ours, ids = jax.vjp(lambda x: route(x, num_selected)[::-1], logits, has_aux=True)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(combine, expected, rtol=1e-13)
        np.testing.assert_allclose(pull_ours(cotangent)[0], pull(cotangent)[0], atol=1e-14)


def test_router_computes_wide():
    """In bfloat16 1 + 2^-7 and 1 are the last two neighbours: their softmax is not 1/2, though it would round to it."""
    _, combine = route(jnp.array([[1 + 2**-7, 1.0]], jnp.bfloat16), 2)
    assert combine.dtype == jnp.float32
    np.testing.assert_allclose(combine[0, 0], 1 / (1 + np.exp(-(2**-7))), rtol=1e-6)


def test_perfect_balance_costs_the_number_of_slots():
    logits = jnp.zeros((E, E))
    np.testing.assert_allclose(
        balance_loss(logits, jnp.stack([jnp.arange(E), (jnp.arange(E) + 1) % E], 1)), 2, rtol=1e-6
    )


def test_balance_loss_by_hand():
    """Two live tokens, p = (3/4, 1/4) and (1/4, 3/4), both to expert 0: f = (1, 0), P = (1/2, 1/2), loss 2 * 1/2.

    With token 1 dead: f = (1, 0), P = (3/4, 1/4), loss 2 * 3/4. The third token is padding throughout.
    """
    logits = jnp.log(jnp.array([[3.0, 1.0], [1.0, 3.0], [1.0, 9.0]]))
    ids = jnp.array([[0], [0], [1]])
    np.testing.assert_allclose(balance_loss(logits, ids, jnp.array([True, True, False])), 1.0, rtol=1e-6)
    np.testing.assert_allclose(balance_loss(logits, ids, jnp.array([True, False, False])), 1.5, rtol=1e-6)
    assert balance_loss(logits, ids, jnp.zeros(3, bool)) == 0
    grad = jax.grad(balance_loss)(logits, ids, jnp.array([True, True, False]))
    # d/dlogits of 2 (p00 + p10) / 2 = p (1 - p) = 3/16 for expert 0, and nothing from the padding.
    np.testing.assert_allclose(grad, [[3 / 16, -3 / 16], [3 / 16, -3 / 16], [0, 0]], atol=1e-7)


def test_errors_say_what_is_wrong():
    (x, combine, w_gate, w_up, w_down), _ = inputs()
    ids = routing("zipf")
    with pytest.raises(ValueError, match=r"w_down has shape \(5, 6, 7\).*\(5, 7, 6\)"):
        expert_mlp(x, ids, combine, w_gate, w_up, w_down.swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"combine_weights has shape \(90, 1\).*\(90, 2\)"):
        expert_mlp(x, ids, combine[:, :1], w_gate, w_up, w_down)
    with pytest.raises(ValueError, match=r"no implementation 'triton'.*'mosaic_tpu', 'ragged_dot', 'reference'"):
        expert_mlp(x, ids, combine, w_gate, w_up, w_down, implementation="triton")
    single = np.float32(x), ids, *map(np.float32, (combine, w_gate, w_up, w_down))
    with pytest.raises(ValueError, match="by 'mosaic_tpu' cannot run here: it needs a TPU.*choose 'xla'"):
        expert_mlp(*single, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="by 'mosaic_gpu' cannot run here: it multiplies bfloat16, and x is float32"):
        expert_mlp(*single, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="w_up is float16 and x is float64; x and the weights have one floating dtype"):
        expert_mlp(x, ids, combine, w_gate, np.float16(w_up), w_down)
    with pytest.raises(ValueError, match="expert_ids is float64, and ids are integers"):
        expert_mlp(x, ids * 1.0, combine, w_gate, w_up, w_down)
    with pytest.raises(ValueError, match="combine_weights is int64, and weights are floating"):
        expert_mlp(x, ids, ids, w_gate, w_up, w_down)
    for tokens, no_ids in ((x[:0], ids[:0]), (x, ids[:, 0])):
        with pytest.raises(ValueError, match=r"x must be \[T, D\] with T > 0, expert_ids \[T, A\]"):
            expert_mlp(tokens, no_ids, combine, w_gate, w_up, w_down)
    with pytest.raises(ValueError, match="num_selected is 6"):
        route(jnp.zeros((2, 5)), 6)
