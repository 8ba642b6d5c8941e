"""config.json of MiniMax-M1 and Text-01 as SGLang wants it, in the released spelling that our export writes.

Strict where a dropped or wrong key would serve another network without a word: what shapes the network must be there,
and what has no code here is refused.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

ALPHAS_AND_BETAS = tuple(
    f"layernorm_{branch}_{factor}"
    for branch in ("full_attention", "linear_attention", "mlp")
    for factor in ("alpha", "beta")
)
REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "num_local_experts", "num_experts_per_tok", "attn_type_list", "rms_norm_eps", "rope_theta",
    "rotary_dim", "postnorm", *ALPHAS_AND_BETAS,
)  # fmt: skip
"""Keys that shape the network. All of them are in the released files and in our export."""

ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "sliding_window": (None,), "shared_intermediate_size": (0,), "rope_scaling": (None,),
    "quantization_config": (None,), "attention_bias": (False,), "use_qk_norm": (False,), "qk_norm": (False,),
}  # fmt: skip
"""Keys that would change the network with another value."""

LIGHTNING, SOFTMAX = 0, 1
"""Values in `attn_type_list`."""


class MiniMaxM1Config(PretrainedConfig):
    """The keys of config.json as attributes, and what SGLang asks a hybrid model for.

    Attributes beyond the file's:
        expert_dim: F, the file's intermediate_size. On a CPU SGLang rounds that attribute up to a multiple of 32 for
            kernels of its own, while the folder's tensors stay as they are.
        lightning_norm_eps: eps of the norm inside lightning attention; no file names it, the released code has 1e-6.
        linear_backend: kernel of SGLang's GPU backend (backend.py says why this one).
        enable_lm_head_fp32: the head is multiplied in float32 whatever the server's flags say.
        max_position_embeddings: 1,048,576 where the file sets no bound; a server's --context-length lowers it.
    """

    model_type = "minimax_m1"
    has_no_defaults_at_init = True

    def __init__(self, **values: Any):
        problems = [f"{key} is missing" for key in REQUIRED if values.get(key) is None]
        problems += [
            f"{key} is {values[key]!r}; only {allowed[0]!r} is implemented"
            for key, allowed in ONLY.items()
            if key in values and values[key] not in allowed
        ]
        kinds = values.get("attn_type_list") or []
        if set(kinds) - {LIGHTNING, SOFTMAX} or len(kinds) != values.get("num_hidden_layers"):
            problems.append(f"attn_type_list must be {values.get('num_hidden_layers')} times 0 or 1, is {kinds!r:.80}")
        problems += [
            f"{key} is {values[key]!r:.80}; only one number for all layers is implemented"
            for key in ("num_local_experts", "num_experts_per_tok")
            if isinstance(values.get(key), list)
        ]
        if problems:
            raise ValueError("config.json: " + "; ".join(problems))
        for key in REQUIRED:
            setattr(self, key, values.pop(key))
        self.expert_dim = self.intermediate_size
        self.max_position_embeddings = values.pop("max_position_embeddings", None) or 1 << 20
        self.lightning_norm_eps = values.pop("lightning_norm_eps", 1e-6)
        self.linear_backend = "seg_la"
        self.enable_lm_head_fp32 = True
        super().__init__(**values)

    @property
    def linear_layer_ids(self) -> list[int]:
        """Layers with a recurrent state."""
        return [layer for layer, kind in enumerate(self.attn_type_list) if kind == LIGHTNING]

    @property
    def full_attention_layer_ids(self) -> list[int]:
        """Layers with keys and values."""
        return [layer for layer, kind in enumerate(self.attn_type_list) if kind == SOFTMAX]

    @property
    def mamba2_cache_params(self):
        """Shape and dtype of a request's states: [N / ranks, H, H] for each lightning layer, no convolution."""
        from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape, mamba2_state_dtype
        from sglang.srt.runtime_context import linear_attn_tp_size

        shape = Mamba2StateShape.create(
            tp_world_size=linear_attn_tp_size(), num_heads=self.num_attention_heads, head_dim=self.head_dim,
            state_size=self.head_dim, intermediate_size=0, n_groups=0, conv_kernel=1,
        )  # fmt: skip
        return Mamba2CacheParams(shape=shape, layers=self.linear_layer_ids, dtype=mamba2_state_dtype(self))


# One class for each other spelling of `model_type`: Transformers asks that the file's and the class's agree. Each has
# an __init__ of its own, else Transformers makes it a dataclass that skips ours; and a name, because it is pickled.
class ReleasedM1Config(MiniMaxM1Config):
    """`MiniMaxM1Config` as M1's released code spells it."""

    model_type = "MiniMaxM1"

    def __init__(self, **values: Any):
        super().__init__(**values)


class Text01Config(MiniMaxM1Config):
    """`MiniMaxM1Config` as Text-01's config.json spells it."""

    model_type = "minimax_text_01"

    def __init__(self, **values: Any):
        super().__init__(**values)


class ReleasedText01Config(MiniMaxM1Config):
    """`MiniMaxM1Config` as Text-01's released code spells it."""

    model_type = "MiniMaxText01"

    def __init__(self, **values: Any):
        super().__init__(**values)


CONFIGS = (MiniMaxM1Config, ReleasedM1Config, Text01Config, ReleasedText01Config)
