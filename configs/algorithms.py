"""The policy losses of published recipes: one block each, with its source. Blocks for the `loss` section of a config.

    --config.loss=dapo                                   takes the block in place of the config's whole section
    --config.loss=dapo --config.loss.clip_high=0.3       and changes a value of it

What the keys mean stands in `m1jax/rl/loss.py`. Learning rates, batch and group sizes belong to the run, not to the
loss. "Our choice" marks a value that the source does not give.
"""


def cispo() -> dict:
    """MiniMax-M1, arXiv 2506.13585, equations 4 and 5: no KL term, no lower bound."""
    return dict(
        kind="cispo",
        weight_cap=5.0,  # our choice: the paper publishes none; ScaleRL finds 4, 5 and 8 alike
        aggregation="group_tokens",
        advantage_scale="group_std",
    )


def cispo_long() -> dict:
    """CISPO as MiniMax-M1 mends collapse late in long windows: sample-level loss with token-level normalisation.

    The paper gives no formula; `m1jax/rl/batch.py` has our reading. It also lowers the cap and the gradient clip, it
    does not say by how much.
    """
    return cispo() | dict(aggregation="sample_and_token")


def scalerl() -> dict:
    """ScaleRL, arXiv 2510.13786: CISPO, averaged by prompt, advantages over the deviation of the batch."""
    return dict(
        kind="cispo",
        weight_cap=5.0,  # our choice of 4, 5 and 8, which it finds alike
        aggregation="group_tokens",
        advantage_scale="batch_std",
    )


def dapo() -> dict:
    """DAPO, arXiv 2503.14476: a higher upper bound and one mean over all tokens; no KL term."""
    return dict(kind="ppo_clip", clip_low=0.2, clip_high=0.28, aggregation="update_tokens", advantage_scale="group_std")


def grpo() -> dict:
    """GRPO, DeepSeekMath, arXiv 2402.03300. Our choice: without its KL term, as the losses it is compared with."""
    return dict(
        kind="ppo_clip",
        clip_low=0.2,  # our choice: PPO's value (arXiv 1707.06347); the paper gives none
        clip_high=0.2,
        aggregation="sample_mean",
        advantage_scale="group_std",
    )


def grpo_kl() -> dict:
    """GRPO with its KL term to the policy that the run started from; a group of equal rewards leaves that too."""
    return grpo() | dict(kl_coefficient=0.04, kl_in="loss", kl_estimator="k3")


def dr_grpo() -> dict:
    """Dr. GRPO, arXiv 2503.20783: GRPO without its two biases, division by length and by the group's deviation."""
    return dict(
        kind="ppo_clip",
        clip_low=0.2,  # our choice, as in grpo
        clip_high=0.2,
        aggregation="constant",
        advantage_scale="none",
    )


def reinforce() -> dict:
    """MiniMax-M1, equation 3: REINFORCE with importance weights that nothing bounds."""
    return dict(kind="reinforce", aggregation="group_tokens", advantage_scale="group_std")


def unified() -> dict:
    """MiniMax-M1, equations 6 and 7, with DAPO's thresholds: its gradient is then that of PPO's clip."""
    return dict(
        kind="unified",
        mask="ppo",
        clip_low=0.2,
        clip_high=0.28,
        weight_cap=None,
        aggregation="update_tokens",
        advantage_scale="group_std",
    )
