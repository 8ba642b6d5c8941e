"""Softmax attention against float64 NumPy: packing, padding, grouped heads, a cache, and how much memory it takes.

The kernels of libraries run interpreted, or are lowered for the devices that they are made for.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from m1jax.pallas_kernels.compat import interpreted, lowering_for
from m1jax.pallas_kernels.shapes import TARGET_SHAPES
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


def gradients_by_hand(q, k, v, q_positions, k_positions, q_segments, k_segments, do):
    """Return the gradients of (output * do).sum() by q, k and v, one query and head at a time, in NumPy."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = (k_segments[b] == q_segments[b, t]) & (k_segments[b] > 0) & (k_positions[b] <= q_positions[b, t])
        if seen.any():
            kv, scale = n // (q.shape[2] // k.shape[2]), q.shape[3] ** -0.5
            weights = np.exp(k[b, seen, kv] @ q[b, t, n] * scale)
            weights /= weights.sum()
            dweights = v[b, seen, kv] @ do[b, t, n]
            dscores = weights * (dweights - weights @ dweights) * scale
            dq[b, t, n] = dscores @ k[b, seen, kv]
            dk[b, seen, kv] += np.outer(dscores, q[b, t, n])
            dv[b, seen, kv] += np.outer(weights, do[b, t, n])
    return dq, dk, dv


def call(q, k, v, q_positions=None, k_positions=None, q_segments=None, k_segments=None, **settings):
    return softmax_attention(
        q, k, v, q_positions_BT=q_positions, k_positions_BS=k_positions,
        q_segment_ids_BT=q_segments, k_segment_ids_BS=k_segments, **settings,
    )  # fmt: skip


attend = jax.jit(call, static_argnames=("block", "in_order"))


def output_and_gradients(args, where, do, **settings):
    """Return o, dq, dk, dv of a program of its own: what a context says while it is traced is not cached."""

    @jax.jit
    def both(args, where, do):
        out, pull = jax.vjp(lambda *args: call(*args, *where, **settings), *args)
        return out, *pull(do)

    return both(args, where, do)


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


def test_gradients_by_hand_are_those_of_the_formula():
    """Ties the NumPy that the libraries are held to to the blocked path, which finite differences confirm."""
    *args, do = inputs()
    with jax.enable_x64(True):
        _, *grads = output_and_gradients(args, SELF, do)
    for found, expected in zip(grads, gradients_by_hand(*args, *SELF, do), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)


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
    """Eight stretches of 256 queries see 256 to 2048 keys: 9/16 of the scores."""
    x, ids = jax.ShapeDtypeStruct((1, 2048, N, H), jnp.float32), jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    text = {
        in_order: str(jax.make_jaxpr(partial(attend, in_order=in_order))(x, x, x, ids, ids, ids, ids))
        for in_order in (False, True)
    }
    for keys in range(256, 2048, 256):
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


def random_rows(tokens, heads, kv_heads, head_dim, seed=0):
    """Return q, k, v, do and where they stand: a row of three segments and padding, and a row of one with a hole."""
    rng = np.random.default_rng(seed)
    shape = (2, tokens, heads, head_dim), (2, tokens, kv_heads, head_dim)
    q, do, k, v = (rng.normal(size=shape[i]) for i in (0, 0, 1, 1))
    ends, hole = (tokens // 7, tokens // 2, tokens - tokens // 9), slice(tokens // 3, tokens // 3 + tokens // 8)
    segments, positions = np.zeros((2, tokens), np.int32), np.zeros((2, tokens), np.int32)
    for i, part in enumerate((slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2]))):
        segments[0, part], positions[0, part] = i + 1, np.arange(part.stop - part.start)
    segments[1] = 5
    segments[1, hole] = 0
    positions[1, segments[1] > 0] = np.arange((segments[1] > 0).sum())
    return (q, k, v), do, (positions, positions, segments, segments)


SPLASH = {
    "one block": (40, 4, 2, 6),
    "three blocks, the last one short": (1100, 2, 1, 24),
    "as many kv heads as heads": (150, 2, 2, 128),
    "wider than a vector": (130, 2, 1, 160),
}


@pytest.mark.parametrize("shape", SPLASH.values(), ids=list(SPLASH))
def test_splash_is_the_formula_forward_and_backward(shape):
    args, do, where = random_rows(*shape)
    narrow = [np.float32(x) for x in args]
    with interpreted():
        out, *grads = output_and_gradients(narrow, where, np.float32(do), in_order=True, implementation="splash")
    # A gradient of k sums over the queries that see it and their heads: sqrt(tokens) roundings of values of order 5.
    tolerance = 5 * shape[0] ** 0.5 * np.finfo(np.float32).eps
    for found, expected in zip(
        (out, *grads), (by_hand(*args, *where), *gradients_by_hand(*args, *where, do)), strict=True
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
        assert np.all(np.asarray(found)[where[2] == 0] == 0)


@pytest.mark.parametrize(("parts", "tokens"), [(2, 256), (3, 384), (2, 1280)])
def test_splash_takes_the_queries_of_a_part_of_a_row(parts, tokens):
    """As each device along `context` has them: outputs side by side, gradients of keys and values added up."""
    args, do, where = random_rows(tokens, 2, 1, 8)
    q, k, v, do = (np.asarray(x, np.float32) for x in (*args, do))
    T = tokens // parts

    @jax.jit
    def of_part(q, k, v, do, index, q_positions, q_segments):
        def out(q, k, v):
            ids = q_positions, where[1], q_segments, where[3]
            return call(q, k, v, *ids, in_order=True, part=(index, parts), implementation="splash")

        o, pull = jax.vjp(out, q, k, v)
        return o, *pull(do)

    with interpreted():
        found = []
        for index in range(parts):
            here = slice(index * T, (index + 1) * T)
            of = q[:, here], k, v, do[:, here], index, where[0][:, here], where[2][:, here]
            found.append(jax.block_until_ready(of_part(*of)))
    o, dq, dk, dv = map(np.stack, zip(*found, strict=True))
    rows = lambda x: np.moveaxis(x, 0, 1).reshape(q.shape)  # noqa: E731
    tolerance = 5 * tokens**0.5 * np.finfo(np.float32).eps
    expected = by_hand(*args, *where), *gradients_by_hand(*args, *where, do)
    for x, y in zip((rows(o), rows(dq), dk.sum(0), dv.sum(0)), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_a_part_of_a_row_is_checked():
    q, ids = np.ones((1, 4, 2, 6), np.float32), np.ones((1, 4), np.int32)
    with pytest.raises(ValueError, match="there are 4 queries in each of 2 parts and 4 keys"):
        call(q, q, q, ids, ids, ids, ids, in_order=True, part=(0, 2))
    with pytest.raises(ValueError, match="a part of a row is in order, and has positions"):
        call(q, q, q, in_order=True, part=(0, 2))
    keys, many = np.ones((1, 8, 2, 6), np.float32), np.ones((1, 8), np.int32)
    with (
        lowering_for("tpu"),
        pytest.raises(ValueError, match="the 4 tokens of a part of a row must be a"),
    ):
        call(q, keys, keys, ids, many, ids, many, in_order=True, part=(0, 2), implementation="splash")


def test_splash_in_bfloat16():
    args, do, where = random_rows(300, 4, 2, 40)
    args, do = [jnp.asarray(x, jnp.bfloat16) for x in args], jnp.asarray(do, jnp.bfloat16)
    with interpreted():
        found = output_and_gradients(args, where, do, in_order=True, implementation="splash")
    wide, do = [np.float64(x) for x in args], np.float64(do)
    for x, expected in zip(found, (by_hand(*wide, *where), *gradients_by_hand(*wide, *where, do)), strict=True):
        assert x.dtype == jnp.bfloat16
        # Four roundings to 8 bits, each of up to 2^-9 of the value: scaled queries, weights, their gradients, results.
        assert np.linalg.norm(np.float64(x) - expected) < 4 * 2.0**-9 * np.linalg.norm(expected)


def test_splash_packed_segments_are_rows_of_their_own():
    args, do, where = random_rows(300, 4, 2, 16)
    narrow, do = [np.asarray(x, np.float32) for x in args], np.asarray(do, np.float32)
    with interpreted():
        packed = output_and_gradients(narrow, where, do, in_order=True, implementation="splash")
        for segment in (2, 3):
            first, last = np.flatnonzero(where[2][0] == segment)[[0, -1]]
            part = slice(first, last + 1)
            alone = output_and_gradients(
                [x[:1, part] for x in narrow], (None,) * 4, do[:1, part], implementation="splash"
            )
            for whole, single in zip(packed, alone, strict=True):
                np.testing.assert_allclose(np.asarray(whole)[:1, part], single, rtol=0, atol=SINGLE)


def test_splash_does_not_read_padding():
    """Padding holds numbers that overflow a score; neither an output nor a gradient shows them."""
    args, do, where = random_rows(40, 4, 2, 6)
    padding = (where[2] == 0)[:, :, None, None]
    clean, dirty = ([np.float32(np.where(padding, rubbish, x)) for x in args] for rubbish in (0, 1e30))
    with interpreted():
        pairs = [
            output_and_gradients(x, where, np.float32(do), in_order=True, implementation="splash")
            for x in (clean, dirty)
        ]
    for expected, found in zip(*pairs, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_without_segment_ids_a_row_is_one_segment():
    q, k, v, _ = inputs()
    positions, ids = np.tile(np.arange(T), (B, 1)), np.ones((B, T), np.int32)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            attend(q, k, v, block=4), attend(q, k, v, positions, positions, ids, ids, block=4, in_order=True)
        )


TARGETS = [(s.B, s.T, s.N, s.K, s.H) for s in TARGET_SHAPES["softmax"]]


def lowered(platform, shape, dtype, packed, **settings):
    """Return the StableHLO of o and of its gradients, made for a device that is not here."""
    B, T, N, K, H = shape
    q, k = jax.ShapeDtypeStruct((B, T, N, H), dtype), jax.ShapeDtypeStruct((B, T, K, H), dtype)
    where = (jax.ShapeDtypeStruct((B, T), jnp.int32),) * (4 if packed else 0)
    checks = [export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{backward}") for backward in ("", "Backward")]

    def gradients(q, k, v, *where):
        return jax.grad(lambda *args: call(*args, *where, **settings).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    with lowering_for(platform):
        return tuple(
            export.export(jax.jit(f), platforms=[{"gpu": "cuda"}.get(platform, platform)], disabled_checks=checks)(
                q, k, k, *where
            ).mlir_module()
            for f in (partial(call, **settings), gradients)
        )


@pytest.fixture
def cudnn_here(monkeypatch):
    """JAX asks the cuDNN of this machine for its version, also where it makes a program for another machine."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91200)


@pytest.mark.parametrize("implementation", ["cudnn", None])
@pytest.mark.parametrize(("shape", "dtype"), [*((s, jnp.bfloat16) for s in TARGETS), ((2, 100, 4, 4, 64), jnp.float16)])
def test_cudnn_is_called_on_gpus(shape, dtype, implementation, cudnn_here):
    """By default too, with key/value heads as they are, and with no array of scores beside it."""
    forward, backward = lowered("gpu", shape, dtype, packed=False, implementation=implementation)
    assert forward.count("@__cudnn$fmhaSoftmax(") == 1 and "CAUSAL" in forward
    assert backward.count("@__cudnn$fmhaSoftmax(") == 1 and backward.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    B, T, N, K, H = shape
    for text in (forward, backward):
        assert all(line.count(f"tensor<{B}x{T}x{K}x{H}x") >= 2 for line in text.splitlines() if "@__cudnn$fmha" in line)
        assert f"{T}x{T}x" not in text


def test_splash_of_a_part_is_lowered_for_tpus():
    """By default, where a row of 4,096 tokens is dealt out to 4 devices."""
    shape = lambda tokens, heads: jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.bfloat16)  # noqa: E731
    ids = lambda tokens: jax.ShapeDtypeStruct((1, tokens), jnp.int32)  # noqa: E731

    def gradients(q, k, v, index, here, row):
        attended = lambda *args: call(*args, here, row, here, row, in_order=True, part=(index, 4))  # noqa: E731
        return jax.grad(lambda *args: attended(*args).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    arguments = (
        shape(1024, 4),
        shape(4096, 1),
        shape(4096, 1),
        jax.ShapeDtypeStruct((), jnp.int32),
        ids(1024),
        ids(4096),
    )
    with lowering_for("tpu"):
        text = export.export(jax.jit(gradients), platforms=["tpu"])(*arguments).mlir_module()
    assert text.count("@tpu_custom_call(") == 3 and "1024x4096x" not in text


@pytest.mark.parametrize("implementation", ["splash", None])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((s, jnp.bfloat16) for s in TARGETS), ((2, 1100, 4, 2, 96), jnp.float32), ((1, 40, 4, 1, 16), jnp.float32)],
)
def test_splash_is_lowered_for_tpus(shape, dtype, implementation):
    """By default too; one kernel forward, and three with the backward pass."""
    found = lowered("tpu", shape, dtype, packed=True, in_order=True, implementation=implementation)
    assert [text.count("@tpu_custom_call(") for text in found] == [1, 3]
    assert not any(f"{shape[1]}x{shape[1]}x" in text for text in found)


@pytest.mark.parametrize(
    ("platform", "dtype", "packed", "in_order"),
    [
        ("gpu", jnp.bfloat16, True, True),  # packed training
        ("gpu", jnp.bfloat16, True, False),  # a cache
        ("gpu", jnp.float32, False, True),
        ("tpu", jnp.bfloat16, True, False),
        ("tpu", jnp.float16, False, True),
    ],
)
def test_the_default_is_blocked_where_a_library_does_not_serve(platform, dtype, packed, in_order, cudnn_here):
    found = lowered(platform, (2, 256, 4, 2, 64), dtype, packed, in_order=in_order)
    assert all("dot_general" in text for text in found)
    assert not any("__cudnn" in text or "tpu_custom_call" in text for text in found)


def test_a_named_implementation_is_never_replaced():
    q, k, v = (jnp.zeros((B, 64, heads, 64), jnp.bfloat16) for heads in (N, K, K))
    ids = (jnp.ones((B, 64), jnp.int32),) * 4

    def refused(reason, *args, **settings):
        with pytest.raises(ValueError, match=reason):
            call(*args, **settings)

    refused("no implementation 'flash'.*'blocked', 'cudnn', 'splash'", q, k, v, implementation="flash")
    refused("'cudnn' cannot do this: it needs a GPU.*CPU here", q, k, v, implementation="cudnn")
    refused("'splash' cannot do this: it needs a TPU.*CPU here", q, k, v, implementation="splash")
    with lowering_for("gpu"):
        cudnn = partial(refused, implementation="cudnn")
        cudnn("no segment ids", q, k, v, *ids, in_order=True)
        cudnn("may be a cache", q, k, v, *ids)
        cudnn("found float32, bfloat16, bfloat16", q.astype(jnp.float32), k, v)
        cudnn("multiple of 8 up to 128, found 60", q[..., :60], k[..., :60], v[..., :60])
        refused("needs a TPU.*GPU here", q, k, v, implementation="splash")
    with lowering_for("tpu"):
        splash = partial(refused, implementation="splash")
        splash("may be a cache", q, k, v, *ids)
        splash("found float16, float16, float16", *(x.astype(jnp.float16) for x in (q, k, v)))
        refused("needs a GPU.*TPU here", q, k, v, implementation="cudnn")


def test_errors_say_what_is_wrong():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"v has shape \(2, 18, 2, 6\).*\(2, 19, 2, 6\)"):
        attend(q, k, v[:, 1:], *SELF)
    with pytest.raises(ValueError, match=r"q_positions has shape \(2, 18\).*\(2, 19\)"):
        attend(q, k, v, POSITIONS[:, 1:], *SELF[1:])
    with pytest.raises(ValueError, match="4 query heads must be divisible by 3"):
        attend(q, np.zeros((B, T, 3, H)), np.zeros((B, T, 3, H)), *SELF)
    with pytest.raises(ValueError, match="19 queries and 18 keys"):
        attend(q, k[:, 1:], v[:, 1:])
    with pytest.raises(ValueError, match="together or not at all; missing: k_positions, q_segment_ids"):
        attend(q, k, v, POSITIONS, None, None, SEGMENTS)
    with pytest.raises(ValueError, match=r"found \(2, 19, 6\) and \(2, 19, 2, 6\)"):
        attend(q[:, :, 0], k, v)
