"""What plan_aot counts without a compiler: messages of a program, parameters of a device; and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from configs import models
from experiments import plan, plan_aot
from m1jax.config import build
from m1jax.errors import UserError
from m1jax.mesh import MeshConfig, flat
from m1jax.model import accounting as count
from m1jax.model import transformer
from m1jax.model.config import ModelConfig

SIZES = {"fsdp": 4, "tensor": 2, "data": 1}
MESH = AbstractMesh(tuple(SIZES.values()), tuple(SIZES))


def received(function, *arguments) -> dict[tuple[str, str], float]:
    mapped = jax.shard_map(function, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False)
    return plan_aot.messages(jax.make_jaxpr(mapped)(*arguments).jaxpr, SIZES)


X = jax.ShapeDtypeStruct((8, 16), jnp.float32)  # 512 bytes on each device


def test_bytes_of_every_kind_of_message():
    def body(x):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # three other parts of 512
        back = jax.lax.psum_scatter(whole, "fsdp", tiled=True)
        total = jax.lax.psum(back, ("fsdp", "tensor"))  # scattered over eight and gathered
        swapped = jax.lax.all_to_all(total, "fsdp", 0, 0, tiled=True)
        return jax.lax.psum(swapped, "data")  # an axis of one says nothing

    assert received(body, X) == {
        ("all_gather", "fsdp"): 3 * 512,
        ("reduce_scatter", "fsdp"): 3 * 512,
        ("psum", "fsdp x tensor"): 2 * 512 * 7 / 8,
        ("all_to_all", "fsdp"): 512 * 3 / 4,
    }


def test_loops_count_their_turns_and_of_branches_the_loudest():
    def turn(x, _):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "tensor"), lambda x: x, x), None

    assert received(lambda x: jax.lax.scan(turn, x, length=5)[0], X) == {("psum", "tensor"): 5 * 512}

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def layer(x):
        return jnp.sin(jax.lax.all_gather(x, "fsdp", tiled=True)).sum() * x

    found = received(jax.grad(lambda x: layer(x).sum()), X)
    assert found["all_gather", "fsdp"] == 2 * 3 * 512, "forward, and again for the backward pass"
    assert found["reduce_scatter", "fsdp"] == 3 * 512


@pytest.mark.parametrize(
    "sizes", [MeshConfig(data=1, fsdp=16, expert=8, tensor=4), MeshConfig(data=8, fsdp=4, context=2)]
)
def test_parameters_of_a_device_are_those_of_the_table(sizes):
    model = replace(build(ModelConfig, models.m1().to_dict(), "models.m1"), mesh=sizes)
    shapes = jax.tree.leaves(jax.eval_shape(lambda: transformer.init(jax.random.key(0), model)))
    specs = jax.tree.leaves(transformer.parameter_specs(model))
    cut = lambda entry: sizes.along(flat(entry))  # noqa: E731
    held = sum(
        x.size / np.prod([cut(entry) for entry in spec], dtype=int) for x, spec in zip(shapes, specs, strict=True)
    )
    assert count.held_parameters(model) == pytest.approx(held, rel=1e-12)


def test_memory_follows_what_is_dealt_out():
    model = build(ModelConfig, models.m1().to_dict() | dict(remat="layer"), "models.m1")
    of = lambda **sizes: count.training_bytes(replace(model, mesh=MeshConfig(**sizes)), 128, 43_008, "float32")  # noqa: E731
    one, context = of(data=1, fsdp=16, expert=8, tensor=4), of(data=1, fsdp=16, expert=8, tensor=4, context=2)
    kept = "kept for the backward pass (remat 'layer')"
    assert one[kept] == 80 * 43_008 * 6144 * 2 and context[kept] == one[kept] / 2
    assert one["AdamW's moments"] == 4 * one["parameters"], "float32 beside bfloat16, two of them"
    assert sum(of(data=4, fsdp=16, expert=8).values()) > sum(one.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aot=v5p:8x8x8"], "which run? give its --config"),
        (["--aot=a100:8", "--config=configs/rl_m1.py"], "known are h100, v5p, v5e, v6e"),
        (["--aot=h100:many", "--config=configs/rl_m1.py"], "write how many, h100:512"),
        (["--mesh", "fsdp=2"], "give --aot=TOPOLOGY with them"),
        (["--aot=v5p:8x8x8", "--mesh", "depth=2", "--config=configs/rl_m1.py"], "is no layout"),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        plan.plan(plan.parse(flags))


def test_without_the_compiler_it_says_how_to_get_it():
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(UserError, match=r'pip install "m1jax\[plan\]"'):
            plan_aot.topology("v5p:2x2x1")
    else:
        assert len(plan_aot.topology("v5p:2x2x1")[1]) == 4


def test_an_update_and_a_token_are_traced_for_gpus_that_are_not_here(tmp_path):
    """What a token of decoding sends, counted by hand: 16 answers on eight devices, 4 to a device, 1 layer and 1."""
    flags = ("--aot=h100:8", "--config=configs/rl_tiny_cpu.py:smoke", "--decode", "--mesh", "data=2,expert=2,tensor=2")
    command = (sys.executable, "-m", "experiments.plan", *flags, "--config.update.micro_batch_rows=8")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    update, token = done.stdout.split("One token of 16 answers behind 48 tokens, weights in float32 (traced in ")
    assert "Update over data 2 x expert 2 x tensor 2 (traced in " in update and "it fits" in update
    # the float32 logits of half of 512 ids, of 4 answers, from the other of two devices
    assert re.search(rf"all_gather +tensor +{4 * 256 * 4 / 2**10:.2f}\n", token), token
