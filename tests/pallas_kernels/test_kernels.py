"""The kernels of GPUs and TPUs, interpreted on a CPU, against the recurrence in float64."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.pallas_kernels.compat import interpreted
from m1jax.pallas_kernels.gated_norm import gated_norm
from m1jax.pallas_kernels.lightning_attention import fused_decode, lightning_attention, lightning_decode, slopes
from m1jax.pallas_kernels.lightning_attention.api import choose
from m1jax.pallas_kernels.lightning_attention.blocks import DEAD, ENTER, LEAVE, START, THROUGH, TIME, tables
from m1jax.pallas_kernels.shapes import NUMERIC_SHAPES, Lightning, draw

SLOPES = np.array([slopes(64, 0, 80)[3], slopes(64, 78, 80)[40], 0.0, 40.0], np.float32)
"""A head of the first layer, one of the last, one that forgets nothing, and one that forgets everything at once."""

KERNELS = [("mosaic_tpu", "float32"), ("mosaic_tpu", "bfloat16"), ("mosaic_gpu", "bfloat16")]


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def norm_error(found, expected):
    """Return the norm of the error as a share of the norm."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


def tolerance(dtype, tokens):
    """Return the largest norm error that rounding explains.

    float32: sums of up to T + H terms in any order err by some eps sqrt(T + H); a state goes through T / 64 products
    with a decay, an eps each. bfloat16: four roundings to 8 bits, each uniform in half a unit of the entry, so 2^-9 /
    sqrt(3) of it in the mean: decayed scores, decayed values, the copied state, the output. They are independent, and
    sums of many such errors grow as the sums themselves do: sqrt(4 / 3) 2^-9 in all. Nothing grows with the length,
    because states are kept and summed in float32.
    """
    if dtype == "float32":
        return np.finfo(np.float32).eps * (np.sqrt(tokens + 128) + tokens / 64)
    return 1.25 * np.sqrt(4 / 3) * 2.0**-9


def run(args, cotangents, implementation):
    """Return (outputs, final state), and the gradients of q, k, v and the initial state."""
    q, k, v, slopes_N, state, segments = args

    def attend(q, k, v, state):
        how = {"segment_ids_BT": segments, "initial_state_BNHH": state, "implementation": implementation}
        return lightning_attention(q, k, v, slopes_N, **how)

    out, pull = jax.vjp(attend, q, k, v, state)
    return out, pull(cotangents)


def inputs(shape, dtype):
    drawn = draw(shape, dtype)
    args = *(drawn[f"{x}_BTNH"] for x in "qkv"), SLOPES, drawn["initial_state_BNHH"], drawn.get("segment_ids_BT")
    other = draw(shape, dtype, seed=1)
    return args, (other["q_BTNH"], other["initial_state_BNHH"])


@pytest.mark.parametrize("shape", NUMERIC_SHAPES["lightning"], ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), KERNELS)
def test_outputs_states_and_all_gradients_are_those_of_the_recurrence(implementation, dtype, shape):
    args, cotangents = inputs(shape, dtype)
    with interpreted():
        found = jax.jit(lambda a, c: run(a, c, implementation))(args, cotangents)
    with jax.enable_x64(True):
        expected = jax.jit(lambda a, c: run(a, c, "reference"))(*wide((args, cotangents)))
    names = ("outputs", "final state", "dq", "dk", "dv", "dstate")
    for name, a, b in zip(names, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == (jnp.float32 if "state" in name else jnp.dtype(dtype)), name
        axis = 1 if "state" in name else 2
        for n in range(shape.N):  # a head at a time: the state of one that forgets nothing would hide the others'
            one = [np.take(np.asarray(x, np.float64), n, axis) for x in (a, b)]
            assert norm_error(*one) < tolerance(dtype, shape.T), (name, n)
        if shape.segments and "state" not in name:
            assert np.all(np.asarray(a)[np.asarray(args[-1]) == 0] == 0), name


@pytest.mark.parametrize(("implementation", "dtype"), KERNELS)
def test_no_state_and_no_segments_are_one_segment_from_zero(implementation, dtype):
    (q, k, v, *_), _ = inputs(NUMERIC_SHAPES["lightning"][0], dtype)
    with interpreted():
        found = lightning_attention(q, k, v, SLOPES, implementation=implementation)
        zero = jnp.zeros((1, 4, 64, 64), jnp.float32)
        ids = jnp.full((1, 128), 7, jnp.int32)
        asked = lightning_attention(
            q, k, v, SLOPES, segment_ids_BT=ids, initial_state_BNHH=zero, implementation=implementation
        )
    jax.tree.map(np.testing.assert_array_equal, found, asked)


@pytest.mark.parametrize(("implementation", "dtype"), KERNELS)
def test_what_stands_in_padding_reaches_nothing(implementation, dtype):
    """Not even what is no number."""
    (q, k, v, _, state, ids), cotangents = inputs(Lightning(B=1, T=70, N=2, H=16, segments=2), dtype)
    dirty = lambda x: jnp.where((ids == 0)[:, :, None, None], jnp.nan, x)  # noqa: E731
    results = []
    with interpreted():
        for clean in (lambda x: x, dirty):
            args = *map(clean, (q, k, v)), SLOPES[:2], state, ids
            found = jax.jit(lambda a, c: run(a, c, implementation))(args, (clean(cotangents[0]), cotangents[1]))
            results.append(jax.tree.leaves(found))
    assert np.any(np.asarray(ids) == 0)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("segments", [0, 4])
def test_spans_change_nothing(monkeypatch, segments):
    """A long row of few heads on a GPU: cut into spans it is the row in one; segments may cross the cuts."""
    from m1jax.pallas_kernels.lightning_attention import mosaic_gpu

    args, cotangents = inputs(Lightning(B=1, T=64 * 3 + 5, N=4, H=64, segments=segments), "bfloat16")
    monkeypatch.setattr(mosaic_gpu, "SHORTEST_SPAN", 2)
    results = []
    for programs, spans in ((1, 1), (16, 2)):
        monkeypatch.setattr(mosaic_gpu, "PROGRAMS", programs)
        assert mosaic_gpu._spans(4, 4) == spans
        with interpreted():
            results.append(jax.jit(lambda a, c: run(a, c, "mosaic_gpu"))(args, cotangents))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert norm_error(a, b) < tolerance("bfloat16", 197)


def test_a_table_by_hand():
    """Two rows in blocks of 4; '.' is padding: ..aa|a.bb|b... and aaaa|aaaa|aaaa."""
    ids = np.array([[0, 0, 1, 1, 1, 0, 2, 2, 2, 0, 0, 0], [1] * 12], np.int32)
    table = np.asarray(tables(ids, 12, 4)).swapaxes(1, 2).reshape(2, -1, 12)
    expected = {
        TIME: [DEAD, DEAD, 0, 1, 0, DEAD, 1, 2, 0, DEAD, DEAD, DEAD],
        START: [2 * DEAD, 2 * DEAD, 0, 0, 0, 2 * DEAD, 1, 1, 0, 2 * DEAD, 2 * DEAD, 2 * DEAD],
        ENTER: [-1, -1, 1, 2, 1, -1, -1, -1, 1, -1, -1, -1],
        LEAVE: [-1, -1, 1, 0, -1, -1, 1, 0, 0, -1, -1, -1],
        THROUGH: [2] * 4 + [-1] * 4 + [1] * 4,
    }
    for row, values in expected.items():
        np.testing.assert_array_equal(table[0, row], values, err_msg=str(row))
    np.testing.assert_array_equal(table[1, [TIME, START, THROUGH]], [[0, 1, 2, 3] * 3, [0] * 12, [4] * 12])
    np.testing.assert_array_equal(table[1, [ENTER, LEAVE]], [[1, 2, 3, 4] * 3, [3, 2, 1, 0] * 3])
    whole = np.asarray(tables(None, 12, 4))
    assert whole.shape == (1, 3, 8, 4)
    np.testing.assert_array_equal(whole[0].swapaxes(0, 1).reshape(-1, 12), table[1])
    # A tail of two tokens, and blocks to fill two spans; blocks without a live token in front and in between.
    tail = np.asarray(tables(None, 6, 4, spans=2))[0]
    np.testing.assert_array_equal(tail[:, LEAVE], [[3, 2, 1, 0], [1, 0, -1, -1]])
    np.testing.assert_array_equal(tail[:, THROUGH, 0], [4, 2])
    gaps = np.asarray(tables(np.int32([[0, 0, 3, 3, 0, 0, 3, 5, 0, 0]]), 10, 2))[0]
    np.testing.assert_array_equal(gaps[:, THROUGH, 0], [0, 2, 0, -1, 0])
    np.testing.assert_array_equal(gaps[:, ENTER], [[-1, -1], [1, 2], [-1, -1], [1, -1], [-1, -1]])


# -- decode ------------------------------------------------------------------------------------------------------


def decode_by_hand(qkv, slopes_N, state, slots, live, activate, dtype):
    """Return outputs and the pool by the formula, in float64."""
    out, state = np.zeros(qkv[:, :, 0].shape), np.array(state, np.float64)
    x = np.asarray(qkv, np.float64)
    if activate:
        x = np.asarray(jnp.asarray(x / (1 + np.exp(-x)), dtype), np.float64)
    for b, n in np.ndindex(out.shape[:2]):
        if live[b]:
            s = state[slots[b], n]
            s[:] = np.exp(-np.float64(slopes_N[n])) * s + np.outer(x[b, n, 1], x[b, n, 2])
            out[b, n] = x[b, n, 0] @ s
    return out, state


@pytest.mark.parametrize("shape", NUMERIC_SHAPES["decode"], ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), [*KERNELS, ("xla", "float32"), ("xla", "bfloat16")])
def test_decode_is_one_step_of_the_recurrence(implementation, dtype, shape):
    x = draw(shape, dtype)
    live = np.arange(shape.B) != 1
    with interpreted():
        for activate in (True, False):
            where = {"slots_B": x["slots_B"], "live_B": jnp.asarray(live), "implementation": implementation}
            if activate:
                step = jax.jit(partial(fused_decode, **where))
                o, square, pool = step(x["qkv_BN3H"], SLOPES, x["state_SNHH"])
                np.testing.assert_allclose(square, (np.asarray(o, np.float64) ** 2).sum((1, 2)), rtol=1e-6)
            else:
                qkv = (x["qkv_BN3H"][:, :, i] for i in range(3))
                o, pool = jax.jit(partial(lightning_decode, **where))(*qkv, SLOPES, x["state_SNHH"])
            expected, states = decode_by_hand(
                x["qkv_BN3H"], SLOPES, x["state_SNHH"], x["slots_B"], live, activate, dtype
            )
            assert (o.dtype, pool.dtype) == (jnp.dtype(dtype), jnp.float32)
            # Sums of H products in float32, then one rounding of the output.
            single = 8 * np.sqrt(shape.H) * np.finfo(np.float32).eps
            rounded = 2.0**-9 if dtype == "bfloat16" else 0
            assert norm_error(o, expected) < single + rounded
            # SiLU in float32 may round to the neighbour of float64's bfloat16, 2^-8 away, where the two lie on
            # different sides of a middle: one entry in 2^15 or so, here one of a thousand at most.
            assert norm_error(pool, states) < single + (2.0**-8 / np.sqrt(1000) if activate and rounded else 0)
            untouched = sorted(set(range(shape.S)) - set(np.asarray(x["slots_B"])[live].tolist()))
            np.testing.assert_array_equal(np.asarray(pool)[untouched], np.asarray(x["state_SNHH"])[untouched])
            assert np.all(np.asarray(o)[~live] == 0)


@pytest.mark.parametrize(("implementation", "dtype"), KERNELS)
def test_a_slot_that_is_used_again_starts_from_what_is_put_there(implementation, dtype):
    """Requests that come and go: prefill of one into a slot between decode steps of the others."""
    shape = Lightning(B=2, T=70, N=4, H=64)
    (q, k, v, *_), _ = inputs(shape, dtype)

    def alone(function):
        """Compiled, and done when it returns: an interpreted kernel asks Python for things, and what else is asked of
        two cores meanwhile may wait for it, as it for that."""
        compiled = jax.jit(function)
        return lambda *args: jax.block_until_ready(compiled(*args))

    prefill = alone(lambda *qkv: lightning_attention(*qkv, SLOPES, implementation=implementation)[1])
    decode = alone(
        lambda qkv, pool, slots: lightning_decode(*qkv, SLOPES, pool, slots_B=slots, implementation=implementation)[1]
    )
    at = lambda rows, t: [x[rows, t] for x in (q, k, v)]  # noqa: E731
    pool = jnp.full((3, 4, 64, 64), 7.0)  # what earlier requests left
    with interpreted():
        whole = prefill(q, k, v)
        pool = pool.at[2].set(prefill(*at([0], slice(66)))[0])
        pool = decode(at([0], 66), pool, jnp.asarray([2]))
        pool = decode(at([0], 67), pool, jnp.asarray([2]))
        pool = pool.at[0].set(prefill(*at([1], slice(68)))[0])  # the second comes in while the first decodes
        for t in (68, 69):
            pool = decode(at([1, 0], t), pool, jnp.asarray([0, 2]))
    np.testing.assert_array_equal(pool[1], 7.0)
    for row, slot in ((0, 2), (1, 0)):
        assert norm_error(pool[slot], whole[row]) < tolerance(dtype, 70)


# -- the output stage --------------------------------------------------------------------------------------------


def gated_norm_by_hand(o, gate, scale, dy, eps):
    """Return y and the gradients of o, gate and scale by the formulas, in float64."""
    s, r = 1 / (1 + np.exp(-gate)), 1 / np.sqrt((o**2).mean(1, keepdims=True) + eps)
    n, dn = o * r, dy * s * scale
    do = r * (dn - n * (dn * n).mean(1, keepdims=True))
    return s * n * scale, do, dy * n * scale * s * (1 - s), (dy * s * n).sum(0)


@pytest.mark.parametrize("shape", NUMERIC_SHAPES["gated_norm"], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu", "mosaic_gpu"])
def test_gated_norm_is_its_formula(implementation, dtype, shape):
    x = draw(shape, dtype)
    args = x["o_MX"], x["gate_MX"], 1 + x["scale_X"] / 5
    dy, eps = draw(shape, dtype, seed=1)["o_MX"], 0.25
    with interpreted():
        y, pull = jax.vjp(lambda *a: gated_norm(*a, eps=eps, implementation=implementation), *args)
        # Twice the sum that it is, to see that it is read: as if o were so much larger.
        square = 2 * jnp.sum(args[0].astype(jnp.float32) ** 2, axis=1)
        again = gated_norm(*args, eps=2 * eps, square_M=square, implementation=implementation)
        found = y, *pull(dy)
    expected = gated_norm_by_hand(*wide(args), np.asarray(dy, np.float64), eps)
    width = shape.N * shape.H
    bound = 4 * np.sqrt(width) * np.finfo(np.float32).eps + (2.0**-9 if dtype == "bfloat16" else 0)
    for name, a, b in zip(("y", "do", "dgate", "dscale"), found, expected, strict=True):
        assert a.dtype == (jnp.float32 if name == "dscale" else jnp.dtype(dtype)), name
        assert norm_error(a, b) < bound, name
    assert norm_error(np.sqrt(2) * np.asarray(again, np.float64), expected[0]) < bound


def test_gated_norm_formulas_are_finite_differences():
    rng = np.random.default_rng(0)
    args, dy = [rng.normal(size=(3, 8)), rng.normal(size=(3, 8)), rng.normal(size=8)], rng.normal(size=(3, 8))
    grads = gated_norm_by_hand(*args, dy, 0.1)[1:]
    for i, grad in enumerate(grads):
        line, step = rng.normal(size=args[i].shape), 1e-5
        ahead, behind = ([*args[:i], args[i] + sign * step * line, *args[i + 1 :]] for sign in (1, -1))
        ends = [(gated_norm_by_hand(*a, dy, 0.1)[0] * dy).sum() for a in (ahead, behind)]
        np.testing.assert_allclose((grad * line).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-7)


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "chosen"), [("9.0", "mosaic_gpu"), ("8.0", "xla"), ("10.0", "xla")])
def test_only_hopper_has_the_instructions_of_the_gpu_kernel(monkeypatch, capability, chosen):
    device = SimpleNamespace(compute_capability=capability, device_kind="a GPU")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert choose(None, jnp.dtype("bfloat16"), 128) == chosen
    norm = partial(gated_norm, jnp.ones((2, 4), jnp.bfloat16), jnp.ones((2, 4), jnp.bfloat16), jnp.ones(4), eps=1e-6)
    if chosen == "xla":
        norm()
        with pytest.raises(ValueError, match=r"it needs a Hopper GPU \(compute capability 9\), and found a GPU"):
            choose("mosaic_gpu", jnp.dtype("bfloat16"), 128)


def test_a_named_kernel_that_cannot_run_here_says_why():
    q = jnp.ones((1, 8, 2, 4), jnp.float32)
    ask = lambda q, name: lightning_attention(q, q, q, jnp.ones(2), implementation=name)  # noqa: E731
    with pytest.raises(ValueError, match="'mosaic_tpu' cannot run here: it needs a TPU, .* for a CPU here; .*'xla'"):
        ask(q, "mosaic_tpu")
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it needs a GPU"):
        ask(q.astype(jnp.bfloat16), "mosaic_gpu")
    with interpreted():
        with pytest.raises(ValueError, match="'mosaic_gpu' .* multiply bfloat16, and q is float32"):
            ask(q, "mosaic_gpu")
        with pytest.raises(ValueError, match="takes heads up to 128 wide, and q has 160"):
            ask(jnp.ones((1, 8, 2, 160), jnp.bfloat16), "mosaic_tpu")
    with pytest.raises(ValueError, match="gated_norm by 'mosaic_gpu' cannot run here: it needs a GPU"):
        gated_norm(q[0, 0], q[0, 0], jnp.ones(4), eps=1e-6, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        gated_norm(q[0, 0], q[0, 0], jnp.ones(4), eps=1e-6, implementation="triton")
    with pytest.raises(ValueError, match=r"scale \[X\], found .*\(5,\)"):
        gated_norm(q[0, 0], q[0, 0], jnp.ones(5), eps=1e-6)
    with pytest.raises(ValueError, match="gated_norm by 'mosaic_tpu' .* takes bfloat16 and float32, and found float16"):
        gated_norm(*2 * [jnp.ones((2, 4), jnp.float16)], jnp.ones(4), eps=1e-6, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="v is bfloat16 and q is float32; q, k and v have one floating dtype"):
        lightning_attention(q, q, q.astype(jnp.bfloat16), jnp.ones(2))
    with pytest.raises(ValueError, match="k is int32"):
        lightning_attention(*3 * [q.astype(jnp.int32)], jnp.ones(2))
    with pytest.raises(ValueError, match="state is bfloat16, and states are float32"):
        fused_decode(jnp.ones((1, 2, 3, 4)), jnp.ones(2), jnp.ones((1, 2, 4, 4), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"qkv must be \[B, N, 3, H\]"):
        fused_decode(q, jnp.ones(2), jnp.ones((1, 2, 4, 4)))
    with pytest.raises(ValueError, match=r"slots has shape \(2,\).*\(1,\)"):
        fused_decode(jnp.ones((1, 2, 3, 4)), jnp.ones(2), jnp.ones((5, 2, 4, 4)), slots_B=jnp.zeros(2, jnp.int32))
