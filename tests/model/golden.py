"""The recorded MiniMax-M1 model of tests/goldens/m1_tiny as our parameters, and its recorded numbers.

Weights and numbers come from the reference implementation (Transformers' `minimax` in float32, with the released
slope formula and partial rotary embedding): 8 layers, hidden 40, 4 heads of 16, 4 experts.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from m1jax.model.config import ModelConfig

FOLDER = Path(__file__).parents[1] / "goldens" / "m1_tiny"


def config() -> ModelConfig:
    hf = json.loads((FOLDER / "config.json").read_text())
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        rotary_dim=hf["rotary_dim"],
        num_experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        expert_dim=hf["intermediate_size"],
        lightning_alpha=hf["layernorm_linear_attention_alpha"],
        softmax_alpha=hf["layernorm_full_attention_alpha"],
        mlp_alpha=hf["layernorm_mlp_alpha"],
        rope_theta=hf["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
    )


def weights() -> dict:
    tensors = {}
    for shard in sorted(FOLDER.glob("*.safetensors")):
        tensors |= load_file(shard)
    return to_tree(tensors)


def gradients() -> dict:
    return to_tree(load_file(FOLDER / "grads" / "grads.safetensors"))


def numbers() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "goldens.npz"))


def to_tree(tensors: dict[str, np.ndarray]) -> dict:
    """Tensors under their original names (out, in) as our tree, (in, out) and stacked [periods, run, ...]."""
    c = config()
    D, N, H, K, E = c.hidden_size, c.num_heads, c.head_dim, c.num_kv_heads, c.num_experts

    def layer(i: int) -> dict:
        get = lambda name: tensors[f"model.layers.{i}.{name}.weight"]  # noqa: E731
        experts = lambda w: np.stack([get(f"block_sparse_moe.experts.{e}.{w}").T for e in range(E)])  # noqa: E731
        if c.layer_pattern[i % len(c.layer_pattern)] == "lightning":
            attention = {
                "qkv": get("self_attn.qkv_proj").T.reshape(D, N, 3, H),
                "gate": get("self_attn.output_gate").T.reshape(D, N, H),
                "out": get("self_attn.out_proj").T.reshape(N, H, D),
                "norm": {"scale": get("self_attn.norm")},
            }
        else:
            attention = {
                "query": get("self_attn.q_proj").T.reshape(D, N, H),
                "key": get("self_attn.k_proj").T.reshape(D, K, H),
                "value": get("self_attn.v_proj").T.reshape(D, K, H),
                "out": get("self_attn.o_proj").T.reshape(N, H, D),
            }
        return {
            "norm_attention": {"scale": get("input_layernorm")},
            "attention": attention,
            "norm_mlp": {"scale": get("post_attention_layernorm")},
            "mlp": {
                "router": get("block_sparse_moe.gate").T,
                "gate": experts("w1"),
                "up": experts("w3"),
                "down": experts("w2"),
            },
        }

    run = lambda layers: jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)[None]), *layers)  # noqa: E731
    return {
        "embedding": jnp.asarray(tensors["model.embed_tokens.weight"]),
        "head": jnp.asarray(tensors["lm_head.weight"].T),
        "norm_final": {"scale": jnp.asarray(tensors["model.norm.weight"])},
        "periods": {"0_lightning": run([layer(i) for i in range(7)]), "1_softmax": run([layer(7)])},
    }
