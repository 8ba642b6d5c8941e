"""Whose states enter a device, how far they have decayed: by walking over tokens (whole layers: test_meshes.py)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from m1jax.mesh import ONE, MeshConfig
from m1jax.model.context import add_entering_state, entering, without_cache


def rows(seed: int, B: int = 6, S: int = 32) -> np.ndarray:
    """Segments and padding that begin and end anywhere."""
    rng, segments = np.random.default_rng(seed), np.zeros((B, S), np.int32)
    for row in segments:
        t, number = 0, 1
        while t < S:
            length = rng.integers(1, 20)
            row[t : t + length] = number if rng.random() < 0.7 else 0
            t, number = t + length, number + 1
    segments[0] = 1
    return segments


@pytest.mark.parametrize("seed", [0, 1])
def test_a_state_enters_where_its_segment_goes_on_and_decays_by_what_lies_between(seed):
    segments, P = rows(seed), 8
    stretches = segments.reshape(len(segments), P, -1)
    between = set()
    for here in range(P):
        reach_PB, live_PB = map(np.asarray, entering(segments, here, P))
        for b, row in enumerate(stretches):
            own = row[here][row[here] > 0]
            for i in range(P):
                theirs = row[i][row[i] > 0]
                expected = i < here and own.size > 0 and theirs.size > 0 and theirs[-1] == own[0]
                assert reach_PB[i, b] == expected, (here, b, i)
                if expected:
                    assert live_PB[i, b] == (row[i + 1 : here] > 0).sum()
                    between.add(int(live_PB[i, b]))
    assert {0, 4, 8} <= between, "neighbours, and such with whole stretches between them"


def test_outputs_get_what_entered_decayed_to_each_token():
    """Four devices of one row, by `vmap` over the axis: the recurrence of the whole row, token by token."""
    rng, (B, P, T, N, H) = np.random.default_rng(0), (3, 4, 4, 2, 3)
    q, k, v = rng.normal(size=(3, B, P * T, N, H)).astype(np.float32)
    segments, slopes = rows(3, B, P * T), np.array([0.3, 0.05], np.float32)
    whole, alone, states = np.zeros_like(q), np.zeros_like(q), np.zeros((P, B, N, H, H), np.float32)
    for b in range(B):
        for cut, out in ((P * T, whole), (T, alone)):
            state, segment = np.zeros((N, H, H)), 0
            for t in range(P * T):
                if t % cut == 0:
                    state, segment = np.zeros((N, H, H)), 0
                if s := segments[b, t]:
                    state = state * (s == segment) * np.exp(-slopes)[:, None, None]
                    state, segment = state + np.einsum("nd,ne->nde", k[b, t], v[b, t]), s
                    out[b, t] = np.einsum("nd,nde->ne", q[b, t], state)
                states[t // T, b] = state if cut == T else states[t // T, b]
    mesh = MeshConfig(data=1, context=P)
    cut = lambda x: np.moveaxis(x.reshape(B, P, T, *x.shape[2:]), 1, 0)  # noqa: E731

    def one(o, q, state):
        return add_entering_state(o, q, state, slopes, without_cache(segments, mesh), mesh)

    joined = jax.vmap(one, axis_name="context")(cut(alone), cut(q), states)
    np.testing.assert_allclose(joined, cut(whole), rtol=0, atol=2e-6 * np.abs(whole).max())
    assert np.abs(alone - whole).max() > 0.1


def test_a_device_alone_has_whole_rows():
    segments = rows(2)
    where = without_cache(segments, ONE)
    np.testing.assert_array_equal(where.segment_ids_BT, segments)
    np.testing.assert_array_equal(where.key_segment_ids_BS, segments)
    np.testing.assert_array_equal(where.positions_BT, where.key_positions_BS)
    for b, row in enumerate(segments):  # a token's position: the live tokens before it in its segment
        live = [(t, s) for t, s in enumerate(row) if s]
        for t, s in live:
            start = max([0, *(u + 1 for u in range(t) if row[u] != s and row[u] > 0)])
            assert where.positions_BT[b, t] == sum(start <= u < t for u, _ in live), (b, t)
