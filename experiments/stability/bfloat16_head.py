"""`experiments.train_rl` with the LM head in bfloat16, as MiniMax-M1 had it before its float32 head (section 3.2).

    python -m experiments.stability.bfloat16_head --config=configs/zero_rl_tiny_cpu.py --workdir=DIR [...]

m1jax has no such head, on purpose. Here its two products, of the sampler and of the trainer, are put in their place
for one process: operands rounded to bfloat16, sums in float32, the result rounded to bfloat16, forward and backward.
That is what a linear layer in bfloat16 does on an accelerator. Softmax and log-probabilities stay in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from experiments import cli
from m1jax.config import build
from m1jax.model import logprobs, transformer
from m1jax.rl.loop import RLConfig, train
from m1jax.types import Params


def rounded_product(x: Any, y: Any, x_axis: int, y_axis: int) -> jax.Array:
    """Stands for `logprobs._product`: the values of a bfloat16 product, as float32."""
    x, y = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, y))
    axes = (((x_axis,), (y_axis,)), ((), ()))
    product = jax.lax.dot_general(x, y, axes, precision=jax.lax.Precision.HIGHEST)
    # Not two casts: XLA may take them for nothing.
    return jax.lax.reduce_precision(product, exponent_bits=8, mantissa_bits=7)


def rounded_head(params: Params, hidden_MD: jax.Array) -> jax.Array:
    """Stands for `transformer.head`."""
    return rounded_product(hidden_MD, transformer.head_weight(params), 1, 0)


@contextmanager
def bfloat16_head() -> Iterator[None]:
    """Both products replaced, in every module that has imported one. What is compiled already keeps its own."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("m1jax.")]
    exact = transformer.head
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(logprobs, "_product", rounded_product))
        for module in modules:
            if getattr(module, "head", None) is exact:
                stack.enter_context(mock.patch.object(module, "head", rounded_head))
        yield


def main(arguments: cli.Arguments) -> None:
    if arguments.init_from:
        arguments.config["init_from"] = str(arguments.init_from)
    with bfloat16_head():
        train(build(RLConfig, arguments.config), arguments.workdir)


if __name__ == "__main__":
    cli.run(main)
