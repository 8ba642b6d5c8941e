"""Softmax attention against float64 NumPy: packing, padding, grouped heads, a cache, and how much memory it takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.pallas_kernels.softmax_attention import softmax_attention

B, T, N, K, H = 2, 19, 4, 2, 6

SEGMENTS = np.array([[1] * 7 + [2] * 9 + [0] * 3, [0] * 2 + [4] * 6 + [0] * 3 + [4] * 8])
POSITIONS = np.array([[*range(7), *range(9), 0, 0, 0], [0, 0, *range(6), 0, 0, 0, *range(6, 14)]])


def inputs(seed=0):
    """Return q, k, v and a cotangent of the output, float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, T, N, H)), *rng.normal(size=(2, B, T, K, H)), rng.normal(size=(B, T, N, H))


def by_hand(q, k, v, q_positions, k_positions, q_segments, k_segments):
    """Return the output of the formula, one query and head at a time, in NumPy."""
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = (k_segments[b] == q_segments[b, t]) & (k_segments[b] > 0) & (k_positions[b] <= q_positions[b, t])
        if seen.any():
            kv = n // (q.shape[2] // k.shape[2])
            weights = np.exp(k[b, seen, kv] @ q[b, t, n] / np.sqrt(q.shape[3]))
            out[b, t, n] = weights @ v[b, seen, kv] / weights.sum()
    return out


@partial(jax.jit, static_argnames=("block", "in_order"))
def attend(q, k, v, q_positions, k_positions, q_segments, k_segments, block=128, in_order=False):
    return softmax_attention(
        q, k, v,
        q_positions_BT=q_positions, k_positions_BS=k_positions,
        q_segment_ids_BT=q_segments, k_segment_ids_BS=k_segments, block=block, in_order=in_order,
    )  # fmt: skip


SELF = (POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)

# A softmax and a mean of at most 19 values; exp of a score near 5 multiplies the score's rounding: 5 sqrt(19) eps.
EXACT, SINGLE = 100 * np.finfo(np.float64).eps, 100 * np.finfo(np.float32).eps


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("block", [1, 4, 19, 128])
def test_output_is_the_formula(block, in_order):
    q, k, v, _ = inputs()
    expected = by_hand(q, k, v, *SELF)
    with jax.enable_x64(True):
        found = attend(q, k, v, *SELF, block=block, in_order=in_order)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)
    assert np.all(np.asarray(found)[SEGMENTS == 0] == 0)
    narrow = attend(*map(np.float32, (q, k, v)), *SELF, block=block, in_order=in_order)
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, expected, rtol=0, atol=SINGLE)


@pytest.mark.parametrize(("block", "in_order"), [(4, False), (4, True), (128, False)])
def test_gradients_are_finite_differences(block, in_order):
    *args, do = inputs()
    lines, step = inputs(1)[:3], 1e-5
    loss = lambda *args: (attend(*args, *SELF, block=block, in_order=in_order) * do).sum()  # noqa: E731
    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)
    for i, line in enumerate(lines):
        ahead, behind = list(args), list(args)
        ahead[i], behind[i] = args[i] + step * line, args[i] - step * line
        difference = ((by_hand(*ahead, *SELF) - by_hand(*behind, *SELF)) * do).sum() / (2 * step)
        # Central: the error is step^2 times a third derivative of order 10 to 100.
        np.testing.assert_allclose((np.asarray(grads[i]) * line).sum(), difference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("block", [4, 128])
def test_a_query_that_sees_nothing_has_no_output_and_no_gradient(block):
    """Padding holds what it will, here numbers that overflow a score, and nothing of it comes out as NaN."""
    q, k, v = (np.float32(np.where((SEGMENTS == 0)[:, :, None, None], 1e20, x)) for x in inputs()[:3])
    out, pull = jax.vjp(lambda *args: attend(*args, *SELF, block=block), q, k, v)
    for found in (out, *pull(np.ones_like(out))):
        assert np.all(np.isfinite(found))
        assert np.all(np.asarray(found)[SEGMENTS == 0] == 0)


def test_packed_segments_are_rows_of_their_own():
    q, k, v, _ = inputs()
    with jax.enable_x64(True):
        packed = attend(q, k, v, *SELF)
        for segment, part in ((1, slice(0, 7)), (2, slice(7, 16))):
            row, ids = [x[:1, part] for x in (q, k, v)], np.ones((1, part.stop - part.start), np.int32)
            positions = np.arange(ids.size)[None]
            alone = attend(*row, positions, positions, ids, ids)
            np.testing.assert_allclose(np.asarray(packed)[:1, part], alone, rtol=0, atol=EXACT, err_msg=str(segment))


def test_grouped_heads_are_repeated_heads():
    q, k, v, _ = inputs()
    with jax.enable_x64(True):
        grouped = attend(q, k, v, *SELF)
        repeated = attend(q, *(np.repeat(x, N // K, axis=2) for x in (k, v)), *SELF)
    np.testing.assert_allclose(grouped, repeated, rtol=0, atol=EXACT)


def test_keys_that_nobody_sees_are_left_out():
    """Four stretches of 512 queries see 512 to 2048 keys: 5/8 of the scores, and the count of their products."""
    x, ids = jax.ShapeDtypeStruct((1, 2048, N, H), jnp.float32), jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    text = {
        in_order: str(jax.make_jaxpr(partial(attend, in_order=in_order))(x, x, x, ids, ids, ids, ids))
        for in_order in (False, True)
    }
    for keys in (512, 1024, 1536):
        assert f"128,{keys}]" in text[True] and f"128,{keys}]" not in text[False]


@pytest.mark.parametrize("chunk", [1, 5])
def test_prefill_in_chunks_against_a_cache_is_the_whole_row(chunk):
    """The cache is longer than the row and holds rubbish, marked 0, where nothing was written yet."""
    q, k, v, _ = inputs()
    positions, ids = np.tile(np.arange(T), (B, 1)), np.ones((B, T), np.int32)
    with jax.enable_x64(True):
        whole = attend(q, k, v, positions, positions, ids, ids)
        cache_k, cache_v = np.full((2, B, T + 4, K, H), 7.0)
        cache_ids, cache_positions = np.zeros((B, T + 4), np.int32), np.zeros((B, T + 4), np.int32)
        for start in range(0, T, chunk):
            part = slice(start, min(start + chunk, T))
            cache_k[:, part], cache_v[:, part] = k[:, part], v[:, part]
            cache_ids[:, part], cache_positions[:, part] = 1, positions[:, part]
            out = attend(q[:, part], cache_k, cache_v, positions[:, part], cache_positions, ids[:, part], cache_ids)
            np.testing.assert_allclose(out, np.asarray(whole)[:, part], rtol=0, atol=EXACT)


def test_bfloat16_scores_are_wide():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs()[:3])
    out = attend(q, k, v, *SELF)
    assert out.dtype == jnp.bfloat16
    # The result alone is rounded: half a unit of 8 bits of the entry itself.
    expected = by_hand(*(np.float64(x) for x in (q, k, v)), *SELF)
    np.testing.assert_allclose(np.float64(out), expected, rtol=2.0**-8, atol=SINGLE)


def test_no_array_of_all_scores_forward_or_backward():
    """At T = S = 2048 with 4 heads one [T, S] array of float32 per head takes 64 MiB; all temporaries stay below."""
    length = 2048
    x = jax.ShapeDtypeStruct((1, length, N, H), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    grad = jax.grad(lambda *args: attend(*args).sum(), argnums=(0, 1, 2))
    compiled = jax.jit(grad).lower(x, x, x, ids, ids, ids, ids).compile()
    scores = N * length**2 * 4
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory and memory.temp_size_in_bytes < scores / 2
    assert text and f"{length},{length}]" not in text


def test_errors_say_what_is_wrong():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"v has shape \(2, 18, 2, 6\).*\(2, 19, 2, 6\)"):
        attend(q, k, v[:, 1:], *SELF)
    with pytest.raises(ValueError, match=r"q_positions has shape \(2, 18\).*\(2, 19\)"):
        attend(q, k, v, POSITIONS[:, 1:], *SELF[1:])
    with pytest.raises(ValueError, match="4 query heads must be divisible by 3"):
        attend(q, np.zeros((B, T, 3, H)), np.zeros((B, T, 3, H)), *SELF)
