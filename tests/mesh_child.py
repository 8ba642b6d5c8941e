"""What eight devices compute over meshes, written to a file: `python -m tests.mesh_child FILE DTYPE PARTS MESHES`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m1jax.mesh import MeshConfig
from m1jax.model.config import ModelConfig
from m1jax.rl.engine_local import LocalEngine
from m1jax.rl.update import make_update
from m1jax.sharding import deal, make_mesh, no_gradients, placed
from m1jax.train.next_token import TokenBatch, make_supervised_update
from m1jax.train.optimizer import OptimizerConfig, make_optimizer
from m1jax.train.router import RouterConfig
from m1jax.train.state import TrainState, apply_gradients, init_state, state_specs
from m1jax.types import Sampling
from tests.model import golden
from tests.rl import small

ONE = MeshConfig(data=1)
MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(tensor=2),
    "expert": MeshConfig(expert=4),
    "expert, gathered": MeshConfig(expert=4, expert_exchange="all_gather"),
    "expert, many rounds": MeshConfig(expert=4, expert_capacity=0.2),
    "expert, ragged": MeshConfig(expert=4, expert_exchange="ragged"),
    "context": MeshConfig(context=8),
    "fsdp x expert x tensor": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "fsdp x context x tensor": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
    "data x expert x context": MeshConfig(data=2, expert=2, context=2),
}
REMAT = {"fsdp": "none", "fsdp x expert x tensor": "layer", "fsdp x context x tensor": "products"}
"""What is computed again in the backward pass changes no gradient, and what is gathered is gathered again then."""


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` by its documentation, with messages that XLA has on a CPU."""
    everybody, here = (lambda x: jax.lax.all_gather(x, axis_name)), jax.lax.axis_index(axis_name)
    place = jnp.arange(len(output))
    parts = zip(*map(everybody, (operand, input_offsets, send_sizes, output_offsets)), strict=True)
    for sent, begin, size, to in parts:
        row = place - to[here]
        taken = sent[jnp.clip(begin[here] + row, 0, len(sent) - 1)]
        mine = ((row >= 0) & (row < size[here])).reshape(-1, *(1,) * (output.ndim - 1))
        output = jnp.where(mine, taken, output)
    return output


jax.lax.ragged_all_to_all = ragged_all_to_all

SHOWS_GRADIENT = optax.GradientTransformation(
    no_gradients,
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
"""An optimizer that moves nothing and has the last gradient as its state."""


def model(dtype: str) -> ModelConfig:
    """Two periods of the golden's proportions; every axis above divides its sizes."""
    return ModelConfig(
        vocab_size=24, num_layers=6, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=4,
        num_experts=4, experts_per_token=2, expert_dim=24, lightning_alpha=1.4, softmax_alpha=1.4, mlp_alpha=1.4,
        layer_pattern=("lightning", "lightning", "softmax"), init_std=0.3, dtype=dtype, param_dtype=dtype,
        lightning_chunk=8, attention_block=8,
    )  # fmt: skip


def packed(dtype: str) -> TokenBatch:
    """Rows of segments and padding that begin and end anywhere, the borders between devices included."""
    rng = np.random.default_rng(0)
    shape = M, B, T = 2, 8, 32
    segments = np.zeros(shape, np.int32)
    for row in segments.reshape(-1, T):
        t, number = 0, 1
        while t < T:
            length = rng.integers(1, 25)
            row[t : t + length] = number if rng.random() < 0.8 else 0
            t, number = t + length, number + 1
    segments[0, 0], segments[0, 1, :20], segments[0, 1, 20:] = 1, 0, 3  # a whole row; a row that begins empty
    weights = (segments > 0) * rng.random(shape)
    return TokenBatch(rng.integers(0, 24, shape).astype(np.int32), segments, (weights / weights.sum()).astype(dtype))


def supervised(sizes: MeshConfig, devices: Any, config: ModelConfig, params: Any, batch: TokenBatch) -> dict[str, Any]:
    """Metrics and gradients of one supervised update."""
    mesh, config = make_mesh(sizes, devices), dataclasses.replace(config, mesh=sizes)
    update = make_supervised_update(config, SHOWS_GRADIENT, mesh, router=RouterConfig(0.1, 0.1))
    state, metrics = update(init_state(0, config, SHOWS_GRADIENT, mesh, params), deal(batch, mesh))
    return {"grads": state.opt_state, "metrics": metrics}


def of_golden(sizes: MeshConfig, devices: Any) -> dict[str, Any]:
    """Loss and gradients of the recorded model on the recorded row, eight times over."""
    ids = golden.numbers()["grad_input_ids"]
    tokens, weights = (np.tile(x, (8, 1))[None] for x in (ids, np.ones(ids.shape, np.float32)))
    weights[:, :, 0] = 0
    batch = TokenBatch(tokens.astype(np.int32), np.ones_like(tokens, np.int32), weights / weights.sum())
    mesh, config = make_mesh(sizes, devices), dataclasses.replace(golden.config(), mesh=sizes)
    update = make_supervised_update(config, SHOWS_GRADIENT, mesh, router=RouterConfig())
    state, metrics = update(init_state(0, config, SHOWS_GRADIENT, mesh, golden.weights()), deal(batch, mesh))
    return {"grads": state.opt_state, "metrics": {"loss": metrics["loss"]}}


def of_rl(sizes: MeshConfig, devices: Any, config: ModelConfig, params: Any) -> dict[str, Any]:
    """Metrics of two updates with experts replayed, and the gradient of the last."""
    mesh, config = make_mesh(sizes, devices), dataclasses.replace(config, mesh=sizes)
    prompts = small.prompts(8)
    rollouts = small.routed(prompts, small.rollouts(prompts), config)
    batch = small.batch(prompts, rollouts, updates=2, micro_rows=8, row_tokens=16, router_replay=True)
    update = make_update(
        config, small.CISPO, SHOWS_GRADIENT, mesh, temperature=1.0, passes=1, router=RouterConfig(0.1, 0.1), replay=True
    )
    state, metrics = update(init_state(0, config, SHOWS_GRADIENT, mesh, params), deal(batch, mesh, 2))
    return {"grads": state.opt_state, "metrics": metrics}


def of_engine(sizes: MeshConfig, devices: Any, config: ModelConfig, params: Any) -> dict[str, Any]:
    """What the engine samples, rows of very different length among it."""
    mesh, config = make_mesh(sizes, devices), dataclasses.replace(config, mesh=sizes)
    engine = LocalEngine(config, prompt_tokens=4, rows=32, stop_ids=(1, 5), mesh=mesh, record_experts=True)
    specs = state_specs(config, SHOWS_GRADIENT).params
    engine.set_weights(jax.device_put(params, placed(mesh, specs)), 0)
    groups = engine.generate(small.prompts(8), 4, Sampling(max_tokens=12), seed=3)
    flat = [rollout for group in groups for rollout in group]
    return {
        "ids": np.concatenate([r.token_ids for r in flat]),
        "lengths": np.array([len(r.token_ids) for r in flat]),
        "logprobs": np.concatenate([r.rollout_logprobs for r in flat]),
        "experts": np.concatenate([r.expert_ids for r in flat]),
    }


def of_adam(sizes: MeshConfig, devices: Any, config: ModelConfig, params: Any, clip: float) -> Any:
    """Parameters after two updates by identical gradients."""
    mesh = make_mesh(sizes, devices)
    adam = make_optimizer(OptimizerConfig(1e-2, weight_decay=0.1, max_grad_norm=clip, moments="float32"))
    specs = state_specs(config, adam)
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)
    laid_out = placed(mesh, specs)

    def step(state: TrainState, grads: Any) -> TrainState:
        return apply_gradients(state, grads, adam, jnp.array(True))[0]

    step = jax.jit(step, out_shardings=laid_out)
    state = init_state(0, config, adam, mesh, params)
    for scale in (1.0, 0.1):
        state = step(state, jax.device_put(jax.tree.map(lambda g: scale * g, grads), laid_out.params))  # noqa: B023
    return state.params


def named(head: str, tree: Any) -> dict[str, np.ndarray]:
    return {
        head + jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def of_memory() -> dict[str, Any]:
    """Bytes of a device for the update of a wide model, by the compiler: with every device along one axis."""
    wide = ModelConfig(
        vocab_size=512, num_layers=4, hidden_size=128, num_heads=8, num_kv_heads=8, head_dim=16, rotary_dim=8,
        num_experts=8, experts_per_token=2, expert_dim=256, lightning_alpha=1.4, softmax_alpha=1.4, mlp_alpha=1.4,
        layer_pattern=("lightning", "softmax"), lightning_chunk=8, attention_block=8,
    )  # fmt: skip
    tokens = np.ones((1, 8, 16), np.int32)
    batch, adam, found = TokenBatch(tokens, tokens, np.ones(tokens.shape, np.float32)), optax.adam(1e-3), {}
    for name in ("data", "fsdp", "tensor", "expert", "data, nothing again", "fsdp, nothing again"):
        axis, _, again = name.partition(",")
        sizes = dataclasses.replace(ONE, **{axis: 8})
        mesh, config = make_mesh(sizes), dataclasses.replace(wide, mesh=sizes, remat="none" if again else "layer")
        update = make_supervised_update(config, adam, mesh, router=RouterConfig())
        state = init_state(0, config, adam, mesh)
        memory = update.lower(state, deal(batch, mesh)).compile().memory_analysis()
        found[f"{name}/state"] = memory.argument_size_in_bytes
        found[f"{name}/peak"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return found


def compute(dtype: str, parts: list[str], names: list[str]) -> dict[str, np.ndarray]:
    config, batch = model(dtype), packed(dtype)
    params = jax.tree.map(np.asarray, small.params(config))
    found: dict[str, np.ndarray] = {}
    for name in names:
        devices = jax.devices()[: 1 if name == "one" else 8]
        sizes = (ONE if name == "one" else MESHES[name]).on(len(devices))
        config = dataclasses.replace(config, remat=REMAT.get(name, "none"))
        make = {
            "supervised": lambda: supervised(sizes, devices, config, params, batch),  # noqa: B023
            "golden": lambda: of_golden(sizes, devices),  # noqa: B023
            "rl": lambda: of_rl(sizes, devices, config, params),  # noqa: B023
            "engine": lambda: of_engine(sizes, devices, config, params),  # noqa: B023
            "adam": lambda: {f"{c:g}": of_adam(sizes, devices, config, params, c) for c in (1e9, 1.0)},  # noqa: B023
        }
        for part in parts:
            if part in make:
                found |= named(f"{name}|{part}|", make[part]())
    if "memory" in parts:
        found |= named("memory|", of_memory())
    return found


if __name__ == "__main__":
    file, dtype, parts, names = sys.argv[1:]
    np.savez(file, **compute(dtype, parts.split(","), names.split(";")))  # pyright: ignore[reportArgumentType]
