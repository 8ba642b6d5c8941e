"""What plan_aot counts without a compiler: messages of a program, parameters of a device; and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from configs import models
from experiments import cli, plan, plan_aot
from m1jax.config import build
from m1jax.errors import UserError
from m1jax.mesh import MeshConfig, flat
from m1jax.model import accounting as count
from m1jax.model import transformer
from m1jax.model.config import ModelConfig
from m1jax.pallas_kernels.compat import lowering_for
from m1jax.pallas_kernels.softmax_attention import softmax_attention
from m1jax.rl.settings import RLConfig

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


def test_scores_of_a_block_are_counted_where_no_kernel_serves():
    """1M tokens: 16 heads x 128 queries x 2^20 keys x 4 bytes are 8 GiB, and they are there three times."""
    sizes = MeshConfig(data=1, fsdp=2, expert=8, context=8, tensor=4)
    model = replace(build(ModelConfig, models.m1().to_dict() | dict(remat="layer"), "models.m1"), mesh=sizes)
    layer, of = "the layer, or the head, that is computed", partial(count.training_bytes, rows=16, tokens=2**20)
    kernel, blocked = (of(model, moments="", blocked=b)[layer] for b in (False, True))
    assert 24 * 2**30 < blocked < kernel + 24 * 2**30 < 2 * blocked
    dense = replace(model, layer_pattern=("lightning",))
    assert of(dense, moments="", blocked=True) == of(dense, moments="")


@pytest.mark.parametrize("in_order", [False, True])
def test_whether_a_kernel_serves_is_read_off_the_program(in_order):
    x, ids = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def loss(x, ids):
        where = dict.fromkeys(("q_positions_BT", "k_positions_BS", "q_segment_ids_BT", "k_segment_ids_BS"), ids)
        return softmax_attention(x, x, x, **where, in_order=in_order).astype(jnp.float32).sum()

    with lowering_for("tpu"):
        assert plan_aot.has_splash(jax.jit(jax.grad(loss)).trace(x, ids).jaxpr) == in_order


def test_what_a_token_of_decoding_holds():
    """M1 on fsdp 16 x expert 8 x tensor 4, by hand: experts lie along two axes, the rest along one; 16 answers each."""
    sizes = MeshConfig(data=1, fsdp=16, expert=8, tensor=4)
    model = replace(build(ModelConfig, models.m1().to_dict(), "models.m1"), mesh=sizes)
    weights, caches = count.decoding_bytes(model, 2048, 43_008).values()
    parts = count.parameters(model).parts
    experts, rest = parts["experts"], sum(parts.values()) - parts["experts"]
    assert weights == pytest.approx(2 * (experts / 32 + rest / 4), rel=1e-2), "but for norms and gates, whole on each"
    assert caches == 16 * (280 * 2**20 + 43_008 * 40 * 2**10) / 4


CHIP = plan_aot.Chip(memory=1e9, flops=1e12, link=400e9, dollars=1.0, reads=1e12, host=8, between=50e9)


def compiled(**messages: float) -> plan_aot.Compiled:
    return plan_aot.Compiled(0, 0, 0, 0.0, {("psum", along.replace("_", " x ")): n for along, n in messages.items()})


def test_messages_beyond_a_host_are_slower():
    made = compiled(tensor=400e9, expert=400e9, fsdp=50e9, data_tensor=100e9)
    mesh = MeshConfig(data=2, fsdp=4, expert=2, tensor=4)
    assert plan_aot.talk(mesh, made, CHIP) == (2.0, 3.0), "expert 2 x tensor 4 fill a host"
    assert plan_aot.talk(replace(mesh, context=2), made, CHIP) == (1.0, 11.0), "and now span 16"
    assert plan_aot.talk(mesh, made, replace(CHIP, host=0)) == (2.375, 0.0), "a slice is one torus"
    small = MeshConfig(data=3, tensor=2)
    assert plan_aot.talk(small, compiled(data=400e9), CHIP) == (1.0, 0.0), "six chips are in one host"


def test_the_row_of_messages_tells_both_speeds(settings):
    made, run = compiled(tensor=800e9, data=100e9), plan.Run()
    here = replace(settings, mesh=MeshConfig(data=8, tensor=2))
    row = "seconds of messages, at 400 GB/s within 8 chips + at 50 GB/s beyond"
    assert [row, "2 + 2"] in plan_aot.time_rows(here, made, CHIP, run)
    torus = plan_aot.time_rows(here, made, replace(CHIP, host=0), run)
    assert ["seconds of messages, at 400 GB/s", "2"] in torus


@pytest.fixture(scope="module")
def settings() -> RLConfig:
    return build(RLConfig, cli.load_config("configs/rl_tiny_cpu.py:smoke"))


@pytest.mark.parametrize(("passes", "anchor", "forwards"), [(1, "rollout", 3), (1, "trainer", 4), (2, "trainer", 7)])
def test_flops_count_the_anchors_forward_pass(settings, passes, anchor, forwards):
    here = replace(
        settings, mesh=MeshConfig(data=4), update=replace(settings.update, passes=passes),
        loss=replace(settings.loss, ratio_anchor=anchor),
    )  # fmt: skip
    (what, flops), *_ = plan_aot.time_rows(here, compiled(), CHIP, plan.Run())
    rows, tokens = 2 * 2 * 4, 48
    once = rows * count.sequence_flops(count.footprint(here.model), tokens)
    assert float(flops) == pytest.approx(forwards * once / 4, rel=5e-3)
    assert ("the trainer's anchor" in what) == (anchor == "trainer")


def test_the_reference_is_told_to_be_left_out(settings):
    assert plan_aot.reference_lines(settings, 2**30) == []
    loss = replace(settings.loss, kl_coefficient=0.1, kl_in="loss", kl_estimator="k3")
    (line,) = plan_aot.reference_lines(replace(settings, loss=loss, mesh=MeshConfig(data=4)), 2**30)
    assert "not in it: the forward pass of the reference (loss.kl_coefficient)" in line
    assert line.endswith("its copy of the parameters, 1.00 GiB")


def test_where_the_factor_of_gpus_comes_from_is_told():
    rows = plan_aot.memory_rows({"all": 0.9e9}, compiled(), CHIP, plan_aot.SHORT)
    assert rows[-2][0] == "x 1.15, as much as the TPU compiler took over it for MiniMax-M1"
    assert rows[-1][0] == "IT DOES NOT FIT"
    assert plan_aot.memory_rows({"all": 0.9e9}, compiled(), CHIP)[-1][0] == "it fits"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aot=v5p:8x8x8"], "which run? give its --config"),
        (["--aot=a100:8", "--config=configs/rl_m1.py"], "known are h100, v5p, v5e, v6e"),
        (["--aot=h100:many", "--config=configs/rl_m1.py"], "write how many, h100:512"),
        (["--mesh", "fsdp=2"], "give --aot=TOPOLOGY with them"),
        (["--aot=v5p:8x8x8", "--mesh", "depth=2", "--config=configs/rl_m1.py"], "is no layout"),
        (["--aot=h100:8", "--batch=2"], "--batch: is for the tables; with --aot act --config, --mesh, --decode"),
        (["--aot=h100:8", "--config=configs/rl_m1.py", "--devices=8"], "--devices: is for the tables"),
        (["--aot=h100:8", "--workdir=here"], "--workdir: is for the tables"),
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


def test_updates_and_tokens_are_traced_for_gpus_that_are_not_here(tmp_path):
    """Of six layouts a run would refuse four, and its engine one more; all the others are planned.

    What a token of decoding sends is counted by hand: 16 answers on eight devices, 4 to a device, 1 layer and 1.
    """
    layouts = ("tensor=8", "fsdp=8", "data=3", "context=8", "data=2,context=4", "data=2,expert=2,tensor=2")
    flags = ("--aot=h100:8", "--config=configs/rl_tiny_cpu.py:smoke", "--decode", "--mesh", *layouts)
    command = (sys.executable, "-m", "experiments.plan", *flags, "--config.update.row_tokens=52")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    of = {}
    for block in done.stdout.split("\n\n")[1:]:
        of.setdefault(re.split(r" \(|: | behind", block)[0], block)
    refused = "A RUN WOULD REFUSE IT: config."
    assert f"{refused}mesh.tensor: 8 devices do not divide model.num_heads, 4" in of["Update over tensor 8"]
    assert f"{refused}update.micro_batch_rows: 4 rows cannot be dealt out to 8" in of["Update over fsdp 8"]
    assert f"{refused}mesh: data 3 makes 3 devices" in of["Update over data 3"]
    assert f"{refused}update.row_tokens: 52 tokens of a row cannot be dealt out" in of["Update over context 8"]
    assert "traced in" in of["Update over data 2 x context 4"]
    engine = of["One token of 16 answers over data 2 x context 4"]
    assert "A RUN'S OWN ENGINE WOULD REFUSE IT: config.rollout.engine_rows / responses: 4 rows" in engine
    assert engine.endswith("engine_rows has to be a multiple of 32")
    update, token = of["Update over data 2 x expert 2 x tensor 2"], of["One token of 16 answers"]
    assert "traced in" in update and "it fits" in update
    assert " behind 52 tokens, weights in float32, no trainer's state beside them (traced in " in token
    assert "\n  beside a trainer on the same chips: together 0.01 GiB of 74.51" in token
    # the float32 logits of half of 512 ids, of 4 answers, from the other of two devices
    assert re.search(rf"all_gather +tensor +{4 * 256 * 4 / 2**10:.2f}\n", token), token


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        (["fsdp=2"], "config.mesh: data 0 x fsdp 2 is for a multiple of 2 devices"),
        (["fsdp=2", "expert=3"], "--mesh: a run would refuse all 2 layouts; the line of each says why"),
    ],
)
def test_nothing_that_can_be_planned_is_an_error(layouts, message, monkeypatch, capfd):
    monkeypatch.setattr(plan_aot, "topology", lambda name: ("h100", jax.devices()[:1]))
    assert plan.main(["--aot=h100:1", "--config=configs/rl_tiny_cpu.py:smoke", "--mesh", *layouts]) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert out.count("A RUN WOULD REFUSE IT") == (len(layouts) if len(layouts) > 1 else 0)


def test_a_kernel_that_cannot_run_there_is_refused(monkeypatch, capfd):
    monkeypatch.setattr(plan_aot, "topology", lambda name: ("h100", jax.devices()[:1]))
    flags = ["--aot=h100:1", "--config=configs/rl_tiny_cpu.py:smoke", "--config.kernels.lightning=mosaic_tpu"]
    assert plan.main(flags) == 2
    assert capfd.readouterr().err.startswith("error: config.kernels.lightning: ")


def test_answers_and_a_trainer_on_the_same_chips(settings, monkeypatch):
    """An update beside the weights, or a state beside weights and caches, whichever is more."""
    here = replace(settings, mesh=MeshConfig(data=2, fsdp=2), model=replace(settings.model, dtype="bfloat16"))
    monkeypatch.setattr(plan_aot, "compile_decode", lambda config, mesh: compiled())
    monkeypatch.setattr(count, "decoding_bytes", lambda *_: {"weights": 2.0**28, "caches": 2.0**29})

    def last(update_peak, state):
        mesh: Any = None
        return list(plan_aot.decode_lines(here, mesh, CHIP, update_peak, state, plan.table))[-1]

    assert last(2.0**28, 2.0**27) == "  beside a trainer on the same chips: together 0.88 GiB of 0.93"
    assert last(2.0**30, 2.0**27) == "  NOT beside a trainer on the same chips: together 1.25 GiB of 0.93"
    assert last(2.0**28, 2.0**29) == "  NOT beside a trainer on the same chips: together 1.25 GiB of 0.93"
