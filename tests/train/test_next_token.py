"""The supervised update: how the gradients of micro-batches add up (over meshes: tests/test_meshes.py)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from m1jax.rl.update import make_update
from m1jax.sharding import data_mesh
from m1jax.train.next_token import TokenBatch, make_supervised_update
from m1jax.train.router import RouterConfig
from m1jax.train.state import init_state
from tests.mesh_child import SHOWS_GRADIENT
from tests.rl import small

MODEL = dataclasses.replace(small.config(), param_dtype="bfloat16")


def same_to_float32(many, once):
    for found, wanted in zip(jax.tree.leaves(many), jax.tree.leaves(once), strict=True):
        assert found.dtype == wanted.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_gradients_of_bfloat16_weights_add_up_in_float32():
    """64 times a micro-batch of a 64th of the weight, which is exact: in bfloat16 the sum would be far off."""
    rng, mesh = np.random.default_rng(0), data_mesh()
    update = make_supervised_update(MODEL, SHOWS_GRADIENT, mesh, router=RouterConfig(0.0))
    tokens = rng.integers(0, MODEL.vocab_size, (1, 2, 8)).astype(np.int32)
    once = TokenBatch(tokens, np.ones_like(tokens), np.full(tokens.shape, 1 / 16, np.float32))
    many = TokenBatch(*(np.tile(x, (64, 1, 1)) for x in (once.tokens, once.segment_ids, once.weights / 64)))
    grads = [update(init_state(0, MODEL, SHOWS_GRADIENT, mesh), batch)[0].opt_state for batch in (many, once)]
    same_to_float32(*grads)


def test_so_do_those_of_reinforcement_learning():
    mesh, prompts, copies = data_mesh(), small.prompts(4), 32
    update = make_update(MODEL, small.CISPO, SHOWS_GRADIENT, mesh, temperature=1.0, passes=1, router=RouterConfig(0.0))
    batch = small.batch(prompts, small.rollouts(prompts), updates=1, micro_rows=16)
    assert batch.tokens.shape[1] == 1, "one micro-batch"
    tiled = jax.tree.map(lambda x: np.tile(x, (1, copies, *(1,) * (x.ndim - 2))), batch)
    many = dataclasses.replace(tiled, weights=tiled.weights / copies)
    grads = [update(init_state(0, MODEL, SHOWS_GRADIENT, mesh), b)[0].opt_state for b in (many, batch)]
    same_to_float32(*grads)
