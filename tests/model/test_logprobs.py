"""Log-probabilities by blocks of rows: the formula's values, the whole's gradients, and never all logits at once.

Bounds are derived, entry by entry. Let u be the unit roundoff. A sum of n products is off by at most n u times the sum
of their magnitudes (Higham, 3.5). So logits are off by D u |x| |W|, a log-probability by twice the largest of those
plus (V + 8) u for the sum of the softmax, its exp and its log, and gradients, which are products with the softmax, by
that much in proportion and another n u for the sum. `sure` doubles u for the second-order terms.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.model import logprobs, transformer
from m1jax.model.logprobs import block_rows, token_logprobs
from m1jax.rl.loss import LossConfig
from m1jax.rl.update import make_update
from m1jax.sharding import data_mesh
from m1jax.train.next_token import TokenBatch, make_supervised_update
from m1jax.train.router import RouterConfig
from m1jax.train.state import TrainState, init_state
from tests.rl import small

B, T, D, V = 2, 11, 16, 23
M = B * T
EVERY_SIZE = [1, 3, 5, 7, 11, 21, 22, 0]
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}


@pytest.fixture
def given_hidden(monkeypatch):
    """token_logprobs on hidden states that lie among the parameters: the head alone."""
    monkeypatch.setattr(logprobs, "hidden_states", lambda params, *_: (params["hidden"], None, {}))


def inputs(dtype: str, tied: bool, scale: float = 1.0):
    """Parameters {hidden [M, D], embedding [V, D] or head [D, V]} in `dtype`, tokens_BT, and what weighs each token."""
    rng = np.random.default_rng(3)
    head = {"embedding": rng.normal(size=(V, D))} if tied else {"head": rng.normal(size=(D, V))}
    params = {"hidden": scale * rng.normal(size=(M, D)), **head}
    params = {name: jnp.asarray(x, dtype) for name, x in params.items()}
    return params, rng.integers(0, V, (B, T)).astype(np.int32), rng.normal(size=(B, T)).astype(np.float32)


def by_formula(params, tokens_BT, g_BT, temperature: float, unit: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(value, bound of the error at roundoff `unit`) of log-probs, entropy and gradients of sum(g logprobs), in NumPy.

    Nothing but the definitions, in float64: log softmax(x W / temperature) at the token, -sum p log p.
    """
    sure = 2 * unit
    tied = "embedding" in params
    x_MD = np.asarray(params["hidden"], np.float64).reshape(B, T, D)
    x_MD = np.roll(x_MD, 1, axis=1).reshape(M, D)
    w_DV = np.asarray(params["embedding"].T if tied else params["head"], np.float64)
    tokens_M, g_M = tokens_BT.reshape(-1), np.asarray(g_BT, np.float64).reshape(-1)
    logits_MV = x_MD @ w_DV / temperature
    shifted_MV = logits_MV - logits_MV.max(axis=1, keepdims=True)
    logp_MV = shifted_MV - np.log(np.exp(shifted_MV).sum(axis=1, keepdims=True))
    p_MV = np.exp(logp_MV)
    onehot_MV = np.eye(V)[tokens_M]

    size_M = (np.abs(x_MD) @ np.abs(w_DV)).max(axis=1) / temperature
    off_M = sure * (2 * (D + 2) * size_M + V + 8)
    dlogits_MV = g_M[:, None] * (onehot_MV - p_MV) / temperature
    most_MV = np.abs(g_M)[:, None] * (onehot_MV + p_MV) / temperature
    roll_back = lambda x_MD: np.roll(x_MD.reshape(B, T, D), -1, axis=1).reshape(M, D)  # noqa: E731
    dweight = x_MD.T @ dlogits_MV, np.abs(x_MD).T @ (most_MV * (off_M[:, None] + sure * (M + 4)))
    dhidden = dlogits_MV @ w_DV.T, (most_MV @ np.abs(w_DV).T) * (off_M[:, None] + sure * (V + 4))
    return {
        "logprobs": (logp_MV[np.arange(M), tokens_M].reshape(B, T), off_M.reshape(B, T)),
        "entropy": (-(p_MV * logp_MV).sum(axis=1).reshape(B, T), (off_M * (2 * size_M + 2)).reshape(B, T)),
        "embedding" if tied else "head": tuple(x.T if tied else x for x in dweight),
        "hidden": tuple(roll_back(x) for x in dhidden),
    }


def rows_config(head_rows: int, dtype: str = "float32", **changes):
    return dataclasses.replace(small.config(dtype), head_rows=head_rows, **changes)


@partial(jax.jit, static_argnums=(1, 4))
def values_and_gradients(params, config, tokens_BT, g_BT, temperature):
    def objective(params):
        logprobs_BT, entropy_BT, _ = token_logprobs(params, config, tokens_BT, jnp.ones_like(tokens_BT), temperature)
        return jnp.sum(g_BT * logprobs_BT), {"logprobs": logprobs_BT, "entropy": entropy_BT}

    grads, values = jax.grad(objective, has_aux=True)(params)
    return values, grads


def assert_within(found, wanted, bound):
    """|found - wanted| <= bound, and the one rounding of a result that is stored in less than float32."""
    rounded = UNIT["bfloat16"] * (np.abs(wanted) + bound) if found.dtype == jnp.bfloat16 else 0.0
    error = np.abs(np.asarray(found, np.float64) - wanted)
    np.testing.assert_array_less(error, bound + rounded + 1e-300)  # a softmax may underflow


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_rows", EVERY_SIZE)
def test_values_and_gradients_are_the_formulas(head_rows, tied, dtype, given_hidden):
    """Blocks of one row, that divide M = 22, that leave padding, that hold all; bfloat16 weights add up in float32."""
    with jax.enable_x64(dtype == "float64"):
        params, tokens_BT, g_BT = inputs(dtype, tied)
        values, grads = values_and_gradients(params, rows_config(head_rows), tokens_BT, g_BT, 1.3)
        computed = "float64" if dtype == "float64" else "float32"
        assert all(x.dtype == computed for x in values.values())
        assert all(x.dtype == dtype for x in grads.values())
        for name, (wanted, bound) in by_formula(params, tokens_BT, g_BT, 1.3, UNIT[computed]).items():
            assert_within((values | grads)[name], wanted, bound)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_every_temperature_and_logits_in_the_thousands(scale, temperature, given_hidden):
    with jax.enable_x64(True):
        params, tokens_BT, g_BT = inputs("float64", False, scale)
        values, grads = values_and_gradients(params, rows_config(5), tokens_BT, g_BT, temperature)
        for name, (wanted, bound) in by_formula(params, tokens_BT, g_BT, temperature, UNIT["float64"]).items():
            assert_within((values | grads)[name], wanted, bound)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_finite_differences(tied, given_hidden):
    """Central differences along random directions: off by h^2 = 1e-8 times third derivatives of order one."""
    with jax.enable_x64(True):
        params, tokens_BT, g_BT = inputs("float64", tied)
        config, rng = rows_config(5), np.random.default_rng(0)
        _, grads = values_and_gradients(params, config, tokens_BT, g_BT, 0.6)
        for name in params:
            direction = rng.normal(size=params[name].shape)
            direction /= np.linalg.norm(direction)
            up, down = (
                np.sum(g_BT * values_and_gradients(moved, config, tokens_BT, g_BT, 0.6)[0]["logprobs"])
                for moved in ({**params, name: params[name] + sign * 1e-4 * direction} for sign in (1, -1))
            )
            slope = float(jnp.sum(grads[name] * direction))
            assert abs(slope) > 0.1
            assert abs((up - down) / 2e-4 - slope) < 1e-6


@pytest.mark.parametrize("head_rows", [5, 0])
def test_entropy_takes_no_gradient(head_rows, given_hidden):
    params, tokens_BT, _ = inputs("float32", False)
    entropy = lambda p: token_logprobs(p, rows_config(head_rows), tokens_BT, jnp.ones_like(tokens_BT))[1].sum()  # noqa: E731
    value, grads = jax.value_and_grad(entropy)(params)
    assert value > 0
    assert all((g == 0).all() for g in grads.values())


def unchunked(params, config, tokens_BT, segment_ids_BT, temperature=1.0):
    """token_logprobs with all logits in one array and the gradient by JAX."""
    hidden_MD, _, router = transformer.hidden_states(params, config, tokens_BT, segment_ids_BT)
    rows, window = tokens_BT.shape
    previous_MD = jnp.roll(hidden_MD.reshape(rows, window, -1), 1, axis=1).reshape(rows * window, -1)
    logp_MV = jax.nn.log_softmax(transformer.head(params, previous_MD) / temperature)
    logprobs_M = jnp.take_along_axis(logp_MV, tokens_BT.reshape(-1, 1), axis=-1)[:, 0]
    entropy_M = -jnp.sum(jnp.exp(logp_MV) * logp_MV, axis=-1)
    return logprobs_M.reshape(rows, window), jax.lax.stop_gradient(entropy_M).reshape(rows, window), router


@pytest.mark.parametrize(("stored", "tied"), [("float64", True), ("bfloat16", False)])
def test_gradient_of_every_parameter_is_that_of_the_whole(stored, tied):
    """Through the decoder in float64; a tied embedding gets the sum of both of its uses.

    A parameter is off by some hundred roundoffs of its norm in float64, by one where bfloat16 stores the gradient.
    """
    with jax.enable_x64(True):
        config = rows_config(5, "float64", tied_embeddings=tied, param_dtype=stored)
        params = small.params(config)
        rng = np.random.default_rng(1)
        tokens_BT = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
        g_BT, one_BT = jnp.asarray(rng.normal(size=(B, T))), jnp.ones((B, T), jnp.int32)
        ours, whole = (
            jax.jit(jax.grad(lambda p, f=f: jnp.sum(g_BT * f(p, config, tokens_BT, one_BT, 0.6)[0])))(params)
            for f in (token_logprobs, unchunked)
        )
        assert ("head" in ours) != tied
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
            assert one.dtype == other.dtype
            one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
            tolerance = 1e-13 if stored == "float64" else 2 * UNIT["bfloat16"]
            assert np.linalg.norm(other) > 0
            assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


def test_blocks_are_as_even_as_they_can_be():
    def rows(vocab_size, count, head_rows=0):
        return block_rows(dataclasses.replace(small.config(), vocab_size=vocab_size, head_rows=head_rows), count)

    assert rows(49152, 2048) == 256 and rows(200064, 10**4) == 64  # 48.0 and 48.8 MiB of float32
    assert rows(2**24, 4096) == rows(2**25, 4096) == 1
    assert rows(65536, 2048) == 256 and rows(65537, 2048) == 128  # 64 MiB exactly, and just above
    assert rows(512, 2048) == 2048  # all in one block
    assert rows(512, 2048, head_rows=300) == 293  # 7 blocks, 3 rows of padding; 300 would pad 52
    assert rows(512, 2049, head_rows=2048) == 1025


# Training. Every array is smaller than M * V = 64 * 401 elements unless it is made of all tokens' logits.

MESH = data_mesh()
SGD = optax.sgd(1.0)


def objectives(config, shape):
    """{name: (update, batch)} of RL and SFT, one update of one micro-batch of the given [rows, window]."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (1, 1, *shape)).astype(np.int32)
    floats = lambda: rng.uniform(0.1, 1, tokens.shape).astype(np.float32)  # noqa: E731
    rl = small.Batch(tokens, np.ones_like(tokens), floats() / tokens.size, floats() - 0.5, -floats(), tokens)
    sft = TokenBatch(rl.tokens[0], rl.segment_ids[0], rl.weights[0])
    # Both of the places where the update asks for log-probabilities.
    loss = LossConfig(weight_cap=5.0, ratio_anchor="trainer")
    return {
        "rl": (make_update(config, loss, SGD, MESH, temperature=0.6, passes=1), rl),
        "sft": (make_supervised_update(config, SGD, MESH, router=RouterConfig(0.01, 0.01)), sft),
    }


def inner_jaxprs(value):
    """The jaxprs in a parameter of an equation: branches, bodies, calls."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from inner_jaxprs(item)
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif hasattr(value, "eqns"):
        yield value


def largest_arrays(jaxpr, at_least: int) -> set[tuple[int, ...]]:
    """Shapes of all intermediates with that many elements, in this jaxpr and all inside it."""
    found = set()
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")]
        found |= {shape for shape in shapes if np.prod(shape, dtype=np.int64) >= at_least}
        for value in equation.params.values():
            for inner in inner_jaxprs(value):
                found |= largest_arrays(inner, at_least)
    return found


@pytest.mark.parametrize(("objective", "tied"), [("rl", True), ("sft", False)])
def test_training_never_holds_the_logits_of_all_tokens(objective, tied):
    """No intermediate of an update, forward or backward, is as large as [M, V]; with one block the test finds some."""

    def found(head_rows):
        config = rows_config(head_rows, vocab_size=401, tied_embeddings=tied)
        update, batch = objectives(config, (4, 16))[objective]
        state = jax.eval_shape(lambda: init_state(0, config, SGD, MESH))
        return largest_arrays(jax.make_jaxpr(update)(state, batch).jaxpr, 64 * 401)

    assert (64, 401) in found(64)
    assert found(7) == set()


@pytest.mark.parametrize("objective", ["rl", "sft"])
def test_an_update_does_not_depend_on_the_blocks(objective):
    """The whole update, its shard_map and scans included, in float64: 5 rows at a time as all 22."""
    with jax.enable_x64(True):
        params = small.params(small.config("float64"))
        after = []
        for head_rows in (5, 0):
            update, batch = objectives(rows_config(head_rows, "float64"), (B, T))[objective]
            copy = jax.tree.map(jnp.copy, params)
            state = TrainState(copy, SGD.init(copy), jnp.zeros((), jnp.int32), jax.random.key(0))
            after.append(update(state, batch)[0].params)
        assert not np.array_equal(after[0]["head"], params["head"])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-13), *after)
