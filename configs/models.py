"""Model shapes as blocks that runnable configs use: numbers only, not runnable themselves.

The released shapes (`m1`, `qwen2_5_32b`, `smollm2_135m`) are those of the config.json of the release that each names;
`tiny` and the proxies are ours. `python -m experiments.plan --model=NAME` says what each one costs.
"""

from ml_collections import ConfigDict


def tiny() -> ConfigDict:
    """One period of MiniMax-M1 at 0.8M parameters: what two laptop cores train in minutes."""
    layers = 8
    alpha = (2 * layers) ** 0.25  # DeepNorm, as the released config's 160 ** 0.25 for its 80 layers
    return ConfigDict(
        dict(
            vocab_size=512,
            num_layers=layers,
            hidden_size=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rotary_dim=8,  # half of the head, as in the release
            num_experts=4,
            experts_per_token=2,
            expert_dim=96,
            lightning_alpha=alpha,
            softmax_alpha=alpha,
            mlp_alpha=alpha,
            init_std=0.1,  # about 1 / sqrt(hidden_size); the release's 0.02 suits a width of 6144
        )
    )


def proxy_100m() -> ConfigDict:
    """One period of MiniMax-M1 at 102M parameters, 40M of them active with the head: ours, for one small GPU."""
    layers = 8
    alpha = (2 * layers) ** 0.25  # DeepNorm
    return ConfigDict(
        dict(
            vocab_size=49_152,  # SmolLM2's tokenizer
            num_layers=layers,
            hidden_size=384,
            num_heads=8,  # 8 * 64 is 4/3 of the width, as 64 * 128 is of 6144; a power of two keeps the slopes plain
            num_kv_heads=2,
            head_dim=64,
            rotary_dim=32,  # half of the head
            num_experts=8,
            experts_per_token=2,  # as in the release
            expert_dim=768,  # twice the width (the release has 1.5): the experts hold over half of the parameters
            lightning_alpha=alpha,
            softmax_alpha=alpha,
            mlp_alpha=alpha,
            init_std=0.05,  # about 1 / sqrt(hidden_size)
            dtype="bfloat16",  # products; the parameters stay float32, so that AdamW's small steps are not rounded away
        )
    )


def proxy_1b() -> ConfigDict:
    """Two periods of MiniMax-M1 at 1.04B parameters, 0.21B of them active with the head: ours, for one large GPU."""
    layers = 16
    alpha = (2 * layers) ** 0.25  # DeepNorm
    return ConfigDict(
        dict(
            vocab_size=49_152,  # SmolLM2's tokenizer
            num_layers=layers,
            hidden_size=768,
            num_heads=8,  # 8 * 128 is 4/3 of the width, as in the release
            num_kv_heads=2,
            head_dim=128,  # the release's: the same tiles for the kernels
            rotary_dim=64,  # the release's, half of the head
            num_experts=16,
            experts_per_token=2,  # as in the release
            expert_dim=1536,  # twice the width
            lightning_alpha=alpha,
            softmax_alpha=alpha,
            mlp_alpha=alpha,
            init_std=0.036,  # 1 / sqrt(hidden_size)
            dtype="bfloat16",  # products; the parameters stay float32
        )
    )


def m1() -> ConfigDict:
    """MiniMax-M1-40k and -80k (and Text-01): 456B parameters, 45.9B active. Every number: the released config.json."""
    alpha = 160**0.25  # layernorm_*_alpha, 3.5565588: DeepNorm's (2 * 80) ** (1/4)
    return ConfigDict(
        dict(
            vocab_size=200_064,
            num_layers=80,  # num_hidden_layers
            hidden_size=6144,
            num_heads=64,  # num_attention_heads; 64 * 128 = 8192 is not the width
            num_kv_heads=8,  # num_key_value_heads
            head_dim=128,
            rotary_dim=64,
            num_experts=32,  # num_local_experts
            experts_per_token=2,  # num_experts_per_tok
            expert_dim=9216,  # intermediate_size, of one expert
            lightning_alpha=alpha,
            softmax_alpha=alpha,
            mlp_alpha=alpha,
            lightning_beta=1.0,  # layernorm_*_beta
            softmax_beta=1.0,
            mlp_beta=1.0,
            postnorm=True,
            tied_embeddings=False,  # tie_word_embeddings
            max_positions=10_240_000,  # max_position_embeddings
            layer_pattern=("lightning",) * 7 + ("softmax",),  # attn_type_list: 1 at layers 7, 15, ..., 79
            rope_theta=1e7,
            norm_eps=1e-5,  # rms_norm_eps
            lightning_norm_eps=1e-6,  # not in config.json: the released modeling code's default argument
            init_std=0.02,  # initializer_range
            dtype="bfloat16",  # the weight index: 912,210,767,872 bytes, 2 a parameter and 4 a router gate's
            param_dtype="bfloat16",
        )
    )


def qwen2_5_32b() -> ConfigDict:
    """Qwen2.5-32B, the base model of the paper's ablation (section 3.1). Every number: the released config.json."""
    return ConfigDict(
        dict(
            vocab_size=152_064,
            num_layers=64,  # num_hidden_layers
            hidden_size=5120,
            num_heads=40,  # num_attention_heads
            num_kv_heads=8,  # num_key_value_heads
            head_dim=128,  # hidden_size / num_attention_heads
            rotary_dim=128,  # the whole head
            num_experts=0,  # dense
            experts_per_token=0,
            expert_dim=27_648,  # intermediate_size
            lightning_alpha=1.0,  # the fields that a pre-norm decoder has no use for
            softmax_alpha=1.0,
            mlp_alpha=1.0,
            postnorm=False,
            qkv_bias=True,  # Qwen2ForCausalLM: always
            tied_embeddings=False,  # tie_word_embeddings
            max_positions=131_072,  # max_position_embeddings
            layer_pattern=("softmax",),
            rope_theta=1e6,
            norm_eps=1e-5,  # rms_norm_eps: 1e-5 in the 14B and the 32B, 1e-6 in the 7B and below
            init_std=0.02,  # initializer_range
            dtype="bfloat16",  # torch_dtype
            param_dtype="bfloat16",
        )
    )


def smollm2_135m() -> ConfigDict:
    """SmolLM2-135M, a Llama small enough for a CPU. Every number: the released config.json."""
    return ConfigDict(
        dict(
            vocab_size=49_152,
            num_layers=30,  # num_hidden_layers
            hidden_size=576,
            num_heads=9,  # num_attention_heads
            num_kv_heads=3,  # num_key_value_heads
            head_dim=64,  # hidden_size / num_attention_heads
            rotary_dim=64,  # the whole head
            num_experts=0,  # dense
            experts_per_token=0,
            expert_dim=1536,  # intermediate_size
            lightning_alpha=1.0,  # the fields that a pre-norm decoder has no use for
            softmax_alpha=1.0,
            mlp_alpha=1.0,
            postnorm=False,
            tied_embeddings=True,  # tie_word_embeddings
            max_positions=8192,  # max_position_embeddings
            layer_pattern=("softmax",),
            rope_theta=1e5,
            norm_eps=1e-5,  # rms_norm_eps
            init_std=1 / 24,  # initializer_range, 0.041667 = 1 / sqrt(576)
            # The release is stored in bfloat16; float32 holds its values exactly and is what a CPU computes in.
        )
    )
