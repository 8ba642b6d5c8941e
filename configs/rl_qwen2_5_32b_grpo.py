r"""GRPO in the set-up of MiniMax-M1's Figure 2. Data, evaluation and size: rl_qwen2_5_32b_cispo.py.

    python -m experiments.train_rl --config=configs/rl_qwen2_5_32b_grpo.py --workdir=runs/qwen2_5_32b_grpo \
        --init_from=runs/qwen2_5_32b

Published by DAPO (arXiv 2503.14476) for its naive GRPO: 30 points on AIME 2024. MiniMax-M1 does not say which parts of
DAPO its GRPO had. Our choice: none, no dynamic sampling and no length penalty, and no KL term, as the other two.
"""

from ml_collections import ConfigDict

from configs import algorithms
from configs.rl_qwen2_5_32b_cispo import figure_2


def get_config(argument: str = "") -> ConfigDict:
    return figure_2(argument, algorithms.grpo(), rollout={}, reward={})
