"""Our decoder with the weights of a GGUF file against a Llama in float64 NumPy that reads the same file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.model.logprobs import token_logprobs
from m1jax.train.pretrained import find_pretrained
from tests.weights import numpy_llama
from tests.weights.test_gguf import PROMPT, find_smollm2, smollm2, write

ANSWER = (504, 3575, 282, 4649, 314, 7042, 30, 2)  # tokens to be judged, whatever they say


def largest_difference(path, ids, dtype: str) -> float:
    """Between the log-probabilities of ids[1:] by the two."""
    model = find_pretrained(path)
    config = dataclasses.replace(model.config, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), model.load())
    ids_BT = jnp.asarray([ids], jnp.int32)
    ours = jax.jit(lambda params: token_logprobs(params, config, ids_BT, jnp.ones_like(ids_BT))[0])(params)
    return np.abs(np.asarray(ours[0, 1:]) - numpy_llama.token_logprobs(path, ids)).max()


def test_log_probabilities_of_a_small_file(tmp_path):
    """In float64 nothing is left but the rotary frequencies, rounded to float32 as in the libraries that train models.

    Half an ulp of a frequency, times 7 positions, is 2e-7 of an angle; weights of size 1 make it some 10 times that.
    """
    path = tmp_path / "model.gguf"
    write(path)
    with jax.enable_x64(True):
        assert largest_difference(path, [3, 5, 2, 4, 3, 3, 5, 2], "float64") < 1e-5


@pytest.mark.slow
@smollm2
def test_log_probabilities_of_smollm2():
    """In float32: logits of up to 30 after 30 layers, sums of 1,536 terms; 4e-5 to 6e-5 was seen."""
    assert largest_difference(find_smollm2(), [*PROMPT, *ANSWER], "float32") < 2e-4
