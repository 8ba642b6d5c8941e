"""m1jax's side: the jitted functions that its own loops call, and those loops' stages in their order."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.bench.peers.protocol import Prepared, fastest, serve
from experiments.bench.peers.workloads import RL, Decode, Dense, Hybrid, Pass, prompts, reward, tokenizer_json, workload
from m1jax.data.tokenizer import load_tokenizer
from m1jax.model.config import ModelConfig
from m1jax.model.logprobs import token_logprobs
from m1jax.model.transformer import init
from m1jax.rl.advantage import group_advantages
from m1jax.rl.batch import BatchShape, UpdateConfig, make_batch
from m1jax.rl.engine_local import LocalEngine
from m1jax.rl.loss import LossConfig, LossInput, cispo
from m1jax.rl.monitors import rollout_metrics, update_metrics
from m1jax.rl.prompts import PromptSource
from m1jax.rl.update import make_update
from m1jax.sharding import DATA, data_mesh
from m1jax.train.optimizer import OptimizerConfig, make_optimizer
from m1jax.train.state import init_state
from m1jax.types import Params, Problem, Prompt, Sampling


def hybrid_config(shape: Hybrid) -> ModelConfig:
    """The peer rotates whole heads, so ours does as well."""
    return ModelConfig(
        vocab_size=shape.vocab, num_layers=shape.layers, hidden_size=shape.hidden, num_heads=shape.heads,
        num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, rotary_dim=shape.head_dim, num_experts=shape.experts,
        experts_per_token=shape.experts_per_token, expert_dim=shape.expert_dim, lightning_alpha=shape.alpha,
        softmax_alpha=shape.alpha, mlp_alpha=shape.alpha,
        layer_pattern=("lightning",) * (shape.layers - 1) + ("softmax",),
    )  # fmt: skip


def dense_config(shape: Dense) -> ModelConfig:
    """Qwen2's form."""
    return ModelConfig(
        vocab_size=shape.vocab, num_layers=shape.layers, hidden_size=shape.hidden, num_heads=shape.heads,
        num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, rotary_dim=shape.head_dim, num_experts=0,
        experts_per_token=0, expert_dim=shape.mlp_dim, lightning_alpha=1.0, softmax_alpha=1.0, mlp_alpha=1.0,
        layer_pattern=("softmax",), postnorm=False, qkv_bias=True, rope_theta=1e4, norm_eps=1e-6, scan_layers=False,
    )  # fmt: skip


@cache
def parameters(shape: Hybrid) -> Params:
    return jax.jit(partial(init, config=hybrid_config(shape)))(jax.random.key(0))


def count(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def passes(work: Pass, scan_layers: bool, mesh: Mesh | None) -> Callable[[], Any]:
    """Token log-probabilities, or mean cross entropy and its gradient; the rows dealt out over a mesh, or whole."""
    config, params = replace(hybrid_config(work.model), scan_layers=scan_layers), parameters(work.model)
    tokens_BT = jax.random.randint(jax.random.key(1), (work.rows, work.tokens), 0, work.model.vocab)
    segment_ids_BT = jnp.ones_like(tokens_BT)

    def logprobs(params, tokens_BT, segment_ids_BT):
        return token_logprobs(params, config, tokens_BT, segment_ids_BT)[0]

    def loss(params, tokens_BT, segment_ids_BT):
        return -logprobs(params, tokens_BT, segment_ids_BT)[:, 1:].sum() / (work.rows * (work.tokens - 1))

    def summed(*inputs):
        return jax.lax.psum(jax.value_and_grad(loss)(*inputs), DATA)

    if mesh is not None:
        shard = partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(DATA), P(DATA)), check_vma=False)
        function = shard(summed, out_specs=P()) if work.backward else shard(logprobs, out_specs=P(DATA))
    else:
        function = jax.value_and_grad(loss) if work.backward else logprobs
    run = jax.jit(function)

    def one() -> None:
        jax.block_until_ready(run(params, tokens_BT, segment_ids_BT))

    return one


def decode(work: Decode, mesh: Mesh) -> Callable[[], Any]:
    """The engine of the RL loop, greedy, one response to each prompt."""
    engine = LocalEngine(hybrid_config(work.model), prompt_tokens=work.prompt, rows=work.rows, stop_ids=(), mesh=mesh)
    engine.set_weights(parameters(work.model), 0)
    ids = np.random.default_rng(1).integers(0, work.model.vocab, (work.rows, work.prompt)).tolist()
    asked = [Prompt(i, Problem("decode", "", None), tuple(row)) for i, row in enumerate(ids)]
    sampling = Sampling(max_tokens=work.new, temperature=0.0)

    def run() -> dict[str, int]:
        rollouts = engine.generate(asked, 1, sampling, 0)
        return {"tokens": sum(len(r.token_ids) for group in rollouts for r in group)}

    return run


def learn(work: RL, folder: Path) -> Prepared:
    """The stages of `m1jax.rl.loop.train`, without evaluation, checkpoints and sinks; metrics are computed."""
    path = folder / "tokenizer.json"
    path.write_text(tokenizer_json())
    tokenizer, mesh, config = load_tokenizer(str(path)), data_mesh(), dense_config(work.model)
    problems: Any = [Problem("sevens", text, None) for text in prompts(10_000, work.prompt_tokens)]
    source = PromptSource(problems, lambda text: tuple(tokenizer.encode(text)), work.prompt_tokens, 0)
    per_batch = work.prompts * work.updates_per_batch
    settings = UpdateConfig(updates_per_batch=work.updates_per_batch, micro_batch_rows=work.prompts * work.group)
    shape = BatchShape.of(settings, per_batch, work.group, work.prompt_tokens + work.new_tokens)
    # TRL divides by the tokens of the update, so ours does as well; the paper's division by group costs the same.
    loss = LossConfig(weight_cap=work.weight_cap, aggregation="update_tokens")
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=work.learning_rate, b1=work.betas[0], b2=work.betas[1], eps=work.eps,
            max_grad_norm=work.max_grad_norm,
        )
    )  # fmt: skip
    sampling = Sampling(max_tokens=work.new_tokens)
    engine = LocalEngine(
        config, prompt_tokens=work.prompt_tokens, rows=per_batch * work.group, stop_ids=tokenizer.stop_ids, mesh=mesh
    )
    update = make_update(config, loss, optimizer, mesh, temperature=sampling.temperature, passes=1)
    initial = init_state(0, config, optimizer, mesh)
    state, cursor = initial, 0

    def reset() -> None:
        nonlocal state
        state = jax.tree.map(lambda x: x.copy(), initial)  # the update writes over the state that it is given
        engine.set_weights(state.params, 0)

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode([i for i in map(int, ids) if i not in tokenizer.stop_ids])

    def run() -> dict[str, Any]:
        nonlocal state, cursor
        tokens = live = applied = 0
        for step in range(work.window // work.updates_per_batch):
            asked = source.take(cursor, per_batch)
            rollouts = engine.generate(asked, work.group, sampling, int(jax.random.bits(state.key)) >> 1)
            rewards_PR = np.array([[reward(text(r.token_ids)) for r in group] for group in rollouts])
            advantages_PR, live_PR = group_advantages(rewards_PR)
            batch = make_batch(asked, rollouts, advantages_PR, live_PR, shape, loss.aggregation, sampling.max_tokens)
            state, device_metrics = update(state, batch)
            trained = update_metrics(jax.device_get(device_metrics))
            engine.set_weights(state.params, step + 1)
            metrics = rollout_metrics(asked, rollouts, rewards_PR, rewards_PR) | trained
            cursor += per_batch
            tokens, live = tokens + metrics["rollout/tokens"], live + int(live_PR.any(axis=1).sum())
            applied += metrics["train/updates_applied"]
        return {
            "updates": work.window,
            "applied": applied,
            "tokens": tokens,
            "live_groups": live / (work.window * work.prompts),
        }

    reset()
    about = {"parameters": count(initial.params), "setting": "one row a response, ratio against the engine"}
    return Prepared(run, about, reset)


def prepare(name: str, smoke: bool, folder: Path) -> Prepared:
    work = workload(name, smoke)
    if isinstance(work, RL):
        return learn(work, folder)
    mesh = data_mesh()
    if isinstance(work, Decode):
        sizes = sorted({1, mesh.size})  # on a CPU, one device with all threads, or one device for each of them
        runs = {f"rows over {n} device(s)": decode(work, Mesh(mesh.devices[:n], mesh.axis_names)) for n in sizes}
    else:
        meshes: dict[str, Mesh | None] = {"whole rows on one device": None}
        if mesh.size > 1 and work.rows % mesh.size == 0:
            meshes[f"rows over {mesh.size} devices"] = mesh
        runs = {
            f"{where}, scan_layers={scan}": passes(work, scan, mesh)
            for where, mesh in meshes.items()
            for scan in (True, False)
        }
    setting = fastest(runs)
    return Prepared(runs[setting], {"parameters": count(parameters(work.model)), "setting": setting})


def parity(policy: list, anchor: list, advantages: list, mask: list, weight_cap: float) -> dict[str, Any]:
    """Our loss and its gradient for given log-probabilities, averaged over the tokens."""
    policy_BT, anchor_BT, mask_BT = (jnp.array(x, jnp.float32) for x in (policy, anchor, mask))
    advantages_BT = jnp.broadcast_to(jnp.array(advantages, jnp.float32)[:, None], policy_BT.shape)
    groups_BT = jnp.broadcast_to(jnp.arange(1, len(policy_BT) + 1)[:, None], policy_BT.shape)

    def value(policy_BT):
        return cispo(LossInput(policy_BT, anchor_BT, advantages_BT, mask_BT / mask_BT.sum(), groups_BT), weight_cap)

    loss, gradient = jax.value_and_grad(value)(policy_BT)
    return {"loss": float(loss), "gradient": np.asarray(gradient).tolist()}


def main() -> None:
    settings = json.loads(sys.argv[1])
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("jax", "jaxlib", "numpy")}}
    prepared = partial(prepare, smoke=settings["smoke"], folder=Path(settings["folder"]))
    serve(prepared, versions, {"parity": parity})


if __name__ == "__main__":
    main()
