"""Model shapes as blocks that runnable configs use: numbers only, not runnable themselves."""

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
