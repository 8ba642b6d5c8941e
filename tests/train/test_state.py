"""The state that a run starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.model import transformer
from m1jax.sharding import data_mesh
from m1jax.train.state import init_state
from tests.rl import small

ADAM = optax.adam(1e-3)


def dtypes(tree) -> set[str]:
    return {x.dtype.name for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_checkpoint_takes_the_dtypes_of_the_configuration(stored, wanted):
    """Parameters and moments; of bfloat16 parameters all but the router gates, which stay float32."""
    config = dataclasses.replace(small.config(), param_dtype=wanted)
    params = small.params(dataclasses.replace(config, param_dtype=stored))
    state = init_state(0, config, ADAM, data_mesh(), params)
    fresh = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    for found in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, fresh)
    assert dtypes(state.params) == {"float32", wanted}
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)), state.params, params)


def test_a_checkpoint_stored_in_bfloat16_throughout_gets_its_router_gates_back_in_float32():
    config = dataclasses.replace(small.config(), param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.params(config))
    assert dtypes(params) == {"bfloat16"}
    assert dtypes(init_state(0, config, ADAM, data_mesh(), params).params) == {"bfloat16", "float32"}
