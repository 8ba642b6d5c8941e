"""Lightning attention: every implementation against the recurrence in float64, forward, backward and states."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.pallas_kernels.lightning_attention import lightning_attention, lightning_decode, slopes

B, T, N, H = 3, 21, 3, 4

FIRST, LATE = slopes(64, 0, 80)[[0, 20, 63]], slopes(64, 78, 80)[[0, 20, 63]]
DECAYS = {"first": FIRST, "late": LATE, "none": np.zeros(N, np.float32), "steep": np.float32([40.0, 1.0, 0.0])}

LAYOUTS = {  # '.' is padding, a letter a segment
    "full": ["aaaaaaaaaaaaaaaaaaaaa"] * 3,
    "packed": ["aaaaaaaaaaabbbbbbbccc", "aabbbbbbbbbbbbbbbbbbb", "abcdefghiiiiiiiiiiiii"],
    "padded": ["....aaaaaaaaaaaaaaaaa", "aaaaaaaaaaaa.........", "....................."],
    "holes": ["..aaa..aa....aaaa.b..", "a.b.c.d.e.f.g.h.i.j.k", "aaaa.....bbb........."],
}


def segment_ids(name):
    return np.array([[0 if c == "." else ord(c) - 96 for c in row] for row in LAYOUTS[name]], np.int32)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def inputs(seed=0):
    """Return q, k, v, the initial state, and the cotangents of output and final state, float64."""
    q, k, v, do = draw(4, B, T, N, H, seed=seed)
    state, dstate = draw(2, B, N, H, H, seed=seed)
    return (q, k, v, state), (do, dstate)


def recurrence(q, k, v, state, slopes_N, segments):
    """Return outputs and final state by the formula, token by token, in float64."""
    out, state = np.zeros_like(q), state.copy()
    for b in range(q.shape[0]):
        current = 0
        for t in range(q.shape[1]):
            if segments[b, t] == 0:
                continue
            if current not in (0, segments[b, t]):
                state[b] = 0
            current = segments[b, t]
            for n in range(q.shape[2]):
                state[b, n] = np.exp(-np.float64(slopes_N[n])) * state[b, n] + np.outer(k[b, t, n], v[b, t, n])
                out[b, t, n] = q[b, t, n] @ state[b, n]
    return out, state


@partial(jax.jit, static_argnames=("chunk", "implementation"))
def run(args, cotangents, slopes_N, segments, chunk=8, implementation=None):
    """Return (outputs, final state), and the gradients of q, k, v and the initial state."""

    def attend(q, k, v, state):
        how = {"chunk": chunk, "implementation": implementation}
        return lightning_attention(q, k, v, slopes_N, segment_ids_BT=segments, initial_state_BNHH=state, **how)

    out, pull = jax.vjp(attend, *args)
    return out, pull(cotangents)


def error(found, expected):
    """Return the largest error as a share of the largest expected entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)


# Errors grow like the square root of the terms added: at most T + H = 25 of them, so a few eps times 5, and the
# decay's exponent is rounded before exp, slope * T * eps more. 100 eps leaves room for all of it and for nothing else.
EXACT = 100 * np.finfo(np.float64).eps
SINGLE = 100 * np.finfo(np.float32).eps  # 1.2e-5


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DECAYS)
def test_outputs_and_state_are_those_of_the_recurrence(implementation, layout, decay):
    args, cotangents = inputs()
    expected = recurrence(*args, DECAYS[decay], segment_ids(layout))
    with jax.enable_x64(True):
        found, _ = run(args, cotangents, DECAYS[decay], segment_ids(layout), chunk=8, implementation=implementation)
    for name, a, b in zip(("out", "state"), found, expected, strict=True):
        assert a.dtype == np.float64, name
        assert error(a, b) < EXACT, name
    assert np.all(np.asarray(found[0])[segment_ids(layout) == 0] == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_finite_differences(layout):
    """Along a random line in each input, the loss being that of the recurrence in NumPy."""
    args, (do, dstate) = inputs()
    lines = inputs(seed=1)[0]
    segments, step = segment_ids(layout), 1e-4

    def loss(args):
        out, state = recurrence(*args, LATE, segments)
        return (out * do).sum() + (state * dstate).sum()

    with jax.enable_x64(True):
        _, grads = run(args, (do, dstate), LATE, segments, chunk=8)
    for i, name in enumerate(("q", "k", "v", "state")):
        ahead, behind = list(args), list(args)
        ahead[i], behind[i] = args[i] + step * lines[i], args[i] - step * lines[i]
        difference = (loss(ahead) - loss(behind)) / (2 * step)
        # Linear in each input, so only rounding is left: eps |loss| / step = 2e-16 * 1e3 / 1e-4.
        np.testing.assert_allclose(
            (np.asarray(grads[i]) * lines[i]).sum(), difference, rtol=1e-8, atol=1e-8, err_msg=name
        )


@pytest.mark.parametrize("chunk", [1, 4, 7, 20, 21, 128])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_change_nothing(layout, decay, chunk):
    """Outputs, state and all gradients; 21 tokens leave a tail behind chunks of 4 and 20."""
    args, cotangents = inputs()
    with jax.enable_x64(True):
        expected = run(args, cotangents, DECAYS[decay], segment_ids(layout), implementation="reference")
        found = run(args, cotangents, DECAYS[decay], segment_ids(layout), chunk=chunk, implementation="xla")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(a, b) < EXACT


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("chunk", [8, 128])
def test_float32_stays_near_float64(implementation, decay, chunk):
    args, cotangents = inputs()
    narrow = jax.tree.map(np.float32, (args, cotangents))
    found = run(*narrow, DECAYS[decay], segment_ids("holes"), chunk=chunk, implementation=implementation)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, narrow)
        expected = run(*wide, DECAYS[decay], segment_ids("holes"), implementation="reference")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32
        assert error(a, b) < SINGLE


def test_bfloat16_is_rounded_only_at_the_ends():
    args, cotangents = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), inputs())
    args, cotangents = (*args[:3], np.float32(args[3])), (cotangents[0], np.float32(cotangents[1]))
    (out, state), grads = run(args, cotangents, LATE, segment_ids("packed"), chunk=8)
    expected_out, expected_state = recurrence(*(np.float64(x) for x in args), LATE, segment_ids("packed"))
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 3 + [jnp.float32]
    # One rounding to 8 bits errs by at most half a unit of the entry itself, 2^-9; the state is never rounded.
    np.testing.assert_allclose(np.float64(out), expected_out, rtol=2.0**-8, atol=SINGLE * np.abs(expected_out).max())
    assert error(state, expected_state) < SINGLE


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_packed_row_is_its_segments_in_rows_of_their_own(implementation):
    (q, k, v, _), (do, _) = inputs()
    segments = segment_ids("packed")
    dstate, how = np.zeros((1, N, H, H)), {"chunk": 8, "implementation": implementation}
    with jax.enable_x64(True):
        (out, _), grads = run((q, k, v, np.zeros((B, N, H, H))), (do, np.zeros((B, N, H, H))), LATE, segments, **how)
        for b, segment in [(0, 2), (1, 2)]:
            at = b, segments[b] == segment
            alone = [x[at][None] for x in (q, k, v)], do[at][None]
            (out_alone, _), grads_alone = run((*alone[0], dstate), (alone[1], dstate), LATE, None, **how)
            assert error(np.asarray(out)[at], out_alone[0]) < EXACT
            for a, b_alone in zip(grads[:3], grads_alone[:3], strict=True):
                assert error(np.asarray(a)[at], b_alone[0]) < EXACT


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_no_segments_and_no_state_are_one_segment_from_zero(implementation):
    (q, k, v, state), _ = inputs()
    with jax.enable_x64(True):
        short = lightning_attention(q, k, v, LATE, chunk=8, implementation=implementation)
    expected = recurrence(q, k, v, 0 * state, LATE, segment_ids("full"))
    assert max(error(a, b) for a, b in zip(short, expected, strict=True)) < EXACT


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_row_in_two_calls_is_the_row_in_one(implementation):
    """One segment with holes: the second call goes on in it, from the state that the first one left."""
    (q, k, v, state), _ = inputs()
    attend = jax.jit(partial(lightning_attention, chunk=8, implementation=implementation))
    segments = segment_ids("holes").clip(0, 1)
    with jax.enable_x64(True):
        whole, last = attend(q, k, v, LATE, segment_ids_BT=segments, initial_state_BNHH=state)
        outs, carried = [], state
        for part in (slice(0, 13), slice(13, T)):
            out, carried = attend(
                *(x[:, part] for x in (q, k, v)), LATE, segment_ids_BT=segments[:, part], initial_state_BNHH=carried
            )
            outs.append(out)
    assert error(np.concatenate(outs, axis=1), whole) < EXACT
    assert error(carried, last) < EXACT


def test_decode_is_the_recurrence_one_token_at_a_time():
    (q, k, v, state), _ = inputs()
    segments = segment_ids("holes").clip(0, 1)
    expected = recurrence(q, k, v, state, LATE, segments)
    with jax.enable_x64(True):
        outs, carried = [], state
        for t in range(T):
            before = carried
            out, carried = lightning_decode(q[:, t], k[:, t], v[:, t], LATE, carried, live_B=segments[:, t] > 0)
            outs.append(out)
            dead = segments[:, t] == 0
            np.testing.assert_array_equal(np.asarray(carried)[dead], np.asarray(before)[dead])
    assert error(np.stack(outs, axis=1), expected[0]) < EXACT
    assert error(carried, expected[1]) < EXACT


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_stands_in_padding_reaches_nothing(implementation):
    args, cotangents = inputs()
    segments = segment_ids("holes")
    how = {"chunk": 8, "implementation": implementation}
    clean = run(args, cotangents, LATE, segments, **how)
    dirt = np.where(segments == 0, 1e6, 0)[:, :, None, None]
    (out, state), grads = run((*(x + dirt for x in args[:3]), args[3]), (cotangents[0] + dirt, cotangents[1]),
                              LATE, segments, **how)  # fmt: skip
    for a, b in zip((out, state, *grads), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)
    for grad in grads[:3]:
        assert np.all(np.asarray(grad)[segments == 0] == 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_slopes_have_no_gradient_and_may_be_traced(implementation):
    (q, k, v, _), _ = inputs()
    grad = jax.jit(jax.grad(lambda s: lightning_attention(q, k, v, s, implementation=implementation)[0].sum()))
    np.testing.assert_array_equal(grad(jnp.asarray(LATE)), 0)


def test_slopes_by_hand():
    """64 heads: 2^(-1/8) down to 2^-8, times 1 + 1e-5 in the first layer, 1 / 79 + 1e-5 in layer 78 of 80."""
    np.testing.assert_allclose(slopes(64, 0, 80)[[0, 63]], np.array([2 ** (-1 / 8), 2**-8]) * (1 + 1e-5), rtol=1e-7)
    np.testing.assert_allclose(slopes(64, 78, 80)[63], 2**-8 * (1 / 79 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(slopes(4, 0, 1), np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256]) * (1 + 1e-5), rtol=1e-7)
    # Six heads: the four of N = 4, then the first and third of N = 8 (1/2, 1/4, 1/8, ...).
    np.testing.assert_allclose(slopes(6, 0, 9) / (1 + 1e-5), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8], rtol=1e-6)
    assert slopes(6, 3, 9).dtype == np.float32


def test_errors_say_what_is_wrong():
    (q, k, v, state), _ = inputs()
    with pytest.raises(ValueError, match=r"k has shape \(3, 20, 3, 4\).*\(3, 21, 3, 4\)"):
        lightning_attention(q, k[:, 1:], v, LATE)
    with pytest.raises(ValueError, match=r"slopes has shape \(2,\).*\(3,\)"):
        lightning_attention(q, k, v, LATE[:2])
    with pytest.raises(ValueError, match=r"no implementation 'triton'.*'reference', 'xla'\]"):
        lightning_attention(q, k, v, LATE, implementation="triton")
    with pytest.raises(ValueError, match="chunk is 0"):
        lightning_attention(q, k, v, LATE, chunk=0)
    with pytest.raises(ValueError, match=r"state has shape \(2, 3, 4, 4\).*\(3, 3, 4, 4\)"):
        lightning_decode(q[:, 0], k[:, 0], v[:, 0], LATE, state[:2])
    with pytest.raises(ValueError, match="layer 9 is not one of the 9"):
        slopes(4, 9, 9)
