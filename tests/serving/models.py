"""Models that tests serve: recorded ones, an odd one, the same with other weights; and what ours says of an answer."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from m1jax.model import transformer
from m1jax.model.config import ModelConfig
from m1jax.model.logprobs import token_logprobs
from m1jax.weights.hf_config import to_hf
from m1jax.weights.hf_folder import HFFolder, write_hf
from m1jax.weights.load import load_params
from tests.model.golden import GOLDENS

TOLERANCE = 1e-4
"""Of a log-probability, float32 against float32."""
LENGTH = 1280
"""Every answer is scored in a row of this length: one program for a model and a temperature."""

ODD = ModelConfig(
    vocab_size=100, num_layers=6, hidden_size=36, num_heads=6, num_kv_heads=3, head_dim=12, rotary_dim=4, num_experts=5,
    experts_per_token=3, expert_dim=20, lightning_alpha=1.1, softmax_alpha=0.9, mlp_alpha=1.2, lightning_beta=0.8,
    softmax_beta=1.3, mlp_beta=0.7, postnorm=False, tied_embeddings=True, init_std=0.2,
    layer_pattern=("lightning", "softmax", "lightning"),
)  # fmt: skip
"""What the recorded models do not have: six heads, pre-norm, a tied head, three experts a token; Text-01's names."""


@dataclass(frozen=True)
class Weights:
    """One folder of weights.

    Attributes:
        folder: where it is.
    """

    folder: Path

    @cached_property
    def config(self) -> ModelConfig:
        return HFFolder(self.folder).config

    @cached_property
    def params(self) -> Any:
        return load_params(HFFolder(self.folder), self.config)

    def logprobs(self, ids: list[int], temperature: float = 1.0, experts: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """float32 [T], entry 0 without meaning, and int [T, L, A], our router's choices (empty for a dense model)."""
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(ids)] = ids
        recorded = None
        if self.config.num_experts:
            recorded = np.full((1, LENGTH, self.config.num_layers, self.config.experts_per_token), -1, np.int32)
            if experts is not None:
                recorded[0, : len(experts)] = experts
        live = (np.arange(LENGTH) < len(ids))[None].astype(np.int32)
        logprobs, _, router = _score(self.config, temperature)(self.params, row, live, recorded)
        chosen = np.moveaxis(np.asarray(router["expert_ids"]), 0, 1)[: len(ids)] if router else np.empty(0)
        return np.asarray(logprobs)[0, : len(ids)], chosen


@cache
def _score(config: ModelConfig, temperature: float) -> Any:
    return jax.jit(lambda params, ids, live, experts: token_logprobs(params, config, ids, live, temperature, experts))


def weights(name: str, folder: Path) -> Weights:
    """The recorded model `name`, or "odd", which is written to `folder`."""
    if name != "odd":
        return Weights(GOLDENS / name)
    odd = _write(folder, ODD, transformer.init(jax.random.key(0), ODD))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "MiniMaxText01", "architectures": ["MiniMaxText01ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return odd


def perturbed(original: Weights, folder: Path, seed: int = 1, scale: float = 0.05) -> Weights:
    """Every weight with noise of `scale` times its leaf's spread, written as an export is."""
    rng = np.random.default_rng(seed)

    def noisy(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return leaf + (scale * (leaf.std() or 1) * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return _write(folder, original.config, jax.tree.map(noisy, original.params))


def _write(folder: Path, config: ModelConfig, params: Any) -> Weights:
    def read(tensor: Any) -> np.ndarray:
        leaf = params
        for key in tensor.leaf:
            leaf = leaf[key]
        return tensor.to_theirs(np.asarray(leaf[tensor.index]))

    write_hf(folder, config, to_hf(config), read, shard_bytes=100_000)
    return Weights(folder)


def logprobs_of(answer: dict[str, Any]) -> np.ndarray:
    """The log-probabilities of an answer, whose ids must be those of `output_ids`."""
    triples = answer["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in triples] == answer["output_ids"]
    return np.array([logprob for logprob, *_ in triples])


def experts_of(answer: dict[str, Any], config: ModelConfig) -> np.ndarray:
    """int32 [prompt + output - 1, L, A], the experts that served each token but the last."""
    flat = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32)
    return flat.reshape(-1, config.num_layers, config.experts_per_token)


def distance(answer: dict[str, Any], prompt: list[int], of: Weights, temperature: float = 1.0) -> float:
    """Largest difference between the server's log-probabilities and ours, the experts those that the server reports.

    Two experts that are nearly tied may be chosen either way, and their answers differ by more than rounding. Replay
    takes the choice out of the comparison; another test looks at the choice.
    """
    experts = experts_of(answer, of.config) if of.config.num_experts else None
    ours, _ = of.logprobs(prompt + answer["output_ids"], temperature, experts)
    return np.abs(ours[len(prompt) :] - logprobs_of(answer)).max()


def edited(original: Weights, folder: Path, edit: Any) -> Path:
    """A copy of a folder of one shard whose tensors went through `edit(dict)`, config.json as it was."""
    from safetensors.numpy import load_file, save_file

    tensors: dict[str, np.ndarray] = {}
    for file in sorted(original.folder.glob("*.safetensors")):
        tensors |= load_file(file)
    folder.mkdir()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((original.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values))
    return folder
