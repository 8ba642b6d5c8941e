"""The recorded models of tests/goldens as our parameters, and their recorded numbers.

Weights and numbers come from reference implementations (Transformers in float32: `minimax` with the released slope
formula and partial rotary embedding, `qwen2` and `llama`). What the arrays are: experiments/compare_layers/goldens.py.
Of m1_kernel every sixth stored position is kept, and no gradients.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from m1jax.model.config import ModelConfig
from m1jax.weights.hf_folder import HFFolder
from m1jax.weights.hf_names import hf_tensors
from m1jax.weights.load import load_params

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = ("m1_tiny", "m1_kernel", "m1_tiny_bf16", "qwen2_tiny", "qwen2_tiny_tied", "llama_tiny_tied")


def config(name: str = "m1_tiny") -> ModelConfig:
    return HFFolder(GOLDENS / name).config


def weights(name: str = "m1_tiny") -> dict:
    return load_params(HFFolder(GOLDENS / name), config(name))


def numbers(name: str = "m1_tiny") -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / name / "goldens.npz"))


def gradients(name: str = "m1_tiny") -> dict:
    """The recorded gradients as a tree like that of the parameters."""

    class Recorded:
        tensors = load_file(GOLDENS / name / "grads" / "grads.safetensors")

        def read(self, tensor: str) -> np.ndarray:
            return self.tensors[tensor]

    assert set(Recorded.tensors) == {t.name for t in hf_tensors(config(name))}
    return jax.tree.map(jnp.asarray, load_params(Recorded(), config(name)))
