"""What training carries from step to step, for pre-training, SFT and RL alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from m1jax.errors import UserError
from m1jax.model import transformer
from m1jax.model.config import ModelConfig
from m1jax.sharding import placed
from m1jax.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters and everything an update changes with them.

    Attributes:
        params: the policy.
        opt_state: the optimizer's moments and its own count, which drives the schedule.
        updates: int32 [], updates applied so far. An update without a live token is not applied and not counted.
        key: typed PRNG key of the run, saved so that nothing random depends on when a run was resumed.
    """

    params: Params
    opt_state: Any
    updates: jax.Array
    key: jax.Array


def init_state(
    seed: int, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, params: Params | None = None
) -> TrainState:
    """A fresh state, laid out over the mesh: parameters drawn from `seed` (or those given) and zero moments.

    Given parameters, a checkpoint's, take the dtypes that the configuration asks for. Every device makes its own part;
    nothing is whole anywhere on the way.

    Raises:
        UserError: `params` are those of another model.
    """

    def fresh(given: Params | None) -> TrainState:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        if given is None:
            params = transformer.init(init_key, config)
        else:
            params = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), given, transformer.shapes(config))
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), run_key)

    laid_out = placed(mesh, state_specs(config, optimizer))
    if params is not None:
        check_params(params, config)
        params = jax.device_put(params, laid_out.params)
    return jax.jit(fresh, out_shardings=laid_out)(params)


def state_specs(config: ModelConfig, optimizer: optax.GradientTransformation) -> Any:
    """The PartitionSpec of every array of a state: moments lie where their parameters do."""
    params = transformer.parameter_specs(config)
    shapes = jax.eval_shape(optimizer.init, transformer.shapes(config))
    moments: Any = optax.tree.map_params(
        optimizer, lambda _, spec: spec, shapes, params, transform_non_params=lambda _: P()
    )
    return TrainState(params, moments, P(), P())  # pyright: ignore[reportArgumentType]  # specs in place of arrays


def check_params(params: Params, config: ModelConfig) -> None:
    """Raise UserError, naming the first parameter, where a tree is not one of this model."""
    have, want = (
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, transformer.shapes(config)))
    )
    for name in want | have:
        if have.get(name) != want.get(name):
            raise UserError(
                f"parameter {name}: the checkpoint has shape {have.get(name, 'no such parameter')}, "
                f"config.model asks for {want.get(name, 'no such parameter')}; use the config.model it was trained with"
            )


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation, live: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer update where `live` holds; else the state comes back untouched, schedule included.

    Returns:
        The new state and the global norms {"grad_norm", "update_norm", "param_norm"}.
    """
    changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
    after = optax.apply_updates(state.params, changes), opt_state, state.updates + 1
    before = state.params, state.opt_state, state.updates
    params, opt_state, updates = jax.tree.map(lambda new, old: jnp.where(live, new, old), after, before)
    norms = {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": jnp.where(live, optax.tree.norm(changes), 0.0),
        "param_norm": optax.tree.norm(params),
    }
    return TrainState(params, opt_state, updates, state.key), norms
