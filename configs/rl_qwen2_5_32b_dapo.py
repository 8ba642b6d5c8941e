r"""DAPO (arXiv 2503.14476) in the set-up of MiniMax-M1's Figure 2. Data, evaluation and size: rl_qwen2_5_32b_cispo.py.

    python -m experiments.train_rl --config=configs/rl_qwen2_5_32b_dapo.py --workdir=runs/qwen2_5_32b_dapo \
        --init_from=runs/qwen2_5_32b

Published for its whole recipe: 50 points on AIME 2024 (mean of 32 answers).
"""

from ml_collections import ConfigDict

from configs import algorithms
from configs.rl_qwen2_5_32b_cispo import DYNAMIC_SAMPLING, OVERLONG, figure_2


def get_config(argument: str = "") -> ConfigDict:
    return figure_2(argument, algorithms.dapo(), DYNAMIC_SAMPLING, OVERLONG)
