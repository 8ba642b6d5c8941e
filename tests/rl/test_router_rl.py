"""Routers in RL: losses in the gradient, sums of the update, the engine's record and its replay in the trainer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.config import build
from m1jax.errors import UserError
from m1jax.model.logprobs import token_logprobs
from m1jax.model.moe import MixtureOfExperts
from m1jax.model.transformer import hidden_states
from m1jax.rl import loop
from m1jax.rl.batch import BatchShape, UpdateConfig, make_batch
from m1jax.rl.engine_local import LocalEngine
from m1jax.rl.loss import LossInput, cispo
from m1jax.rl.monitors import update_metrics
from m1jax.rl.recorded import load_rollouts
from m1jax.rl.run import check_expert_ids
from m1jax.rl.settings import RLConfig
from m1jax.rl.update import make_frozen_logprobs, make_update
from m1jax.sharding import data_mesh
from m1jax.train.router import NO_AUXILIARY_LOSS, RouterConfig
from m1jax.train.state import TrainState
from m1jax.types import HELDOUT_INDEX, Sampling
from tests import runs
from tests.rl import small
from tests.rl.test_update import LOSSES, relative

MESH, SGD = data_mesh(), optax.sgd(1.0)
LAYERS, A = 2, 2


def step(model, params, batch, loss=LOSSES["cispo"], **options):
    """(gradient, metrics) of one update."""
    update = make_update(model, loss, SGD, MESH, temperature=1.0, passes=1, **options)
    state = TrainState(jax.tree.map(jnp.copy, params), SGD.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))
    after, metrics = update(state, batch)
    return jax.tree.map(lambda old, new: old - new, params, after.params), metrics


def test_gradient_is_that_of_policy_balance_and_z_loss():
    """In two micro-batches: the z-loss is that of all rows at once to 1e-10, the balance loss that of the two parts."""
    with jax.enable_x64(True):
        model = small.config("float64")
        params, prompts = small.params(model), small.prompts()
        batch = small.batch(prompts, small.rollouts(prompts), micro_rows=8)
        live, counts = (batch.segment_ids > 0).sum(), (batch.segment_ids > 0).sum(axis=(0, 2, 3))
        assert batch.tokens.shape[:2] == (1, 2) and counts[0] != counts[1]
        flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
        arrays = (flat.rollout_logprobs, flat.advantages, flat.weights, flat.group_ids)

        def losses(params):
            logprobs_BT, _, routed = token_logprobs(params, model, flat.tokens, flat.segment_ids)
            part = lambda rows: hidden_states(params, model, *rows)[2]["balance_loss"].mean()  # noqa: E731
            balance_2 = jax.lax.map(part, (batch.tokens[0], batch.segment_ids[0]))
            auxiliary = (0.3 * balance_2.sum() + 0.2 * routed["z_loss"].mean()) / live
            return cispo(LossInput(logprobs_BT, *arrays), weight_cap=5.0) + auxiliary, routed

        expected, routed = jax.jit(jax.grad(losses, has_aux=True))(params)
        gradient, metrics = step(model, params, batch, router=RouterConfig(0.3, 0.2))
        assert relative(gradient, expected) < 1e-10
        for name, sums in metrics["router"].items():
            if name != "balance_loss":
                np.testing.assert_allclose(sums[0], routed[name], rtol=1e-12, err_msg=name)
        assert metrics["router"]["tokens"].tolist() == [[live] * LAYERS]
        assert metrics["router"]["expert_tokens"].shape == (1, LAYERS, 3)
        assert (metrics["router"]["expert_tokens"].sum(axis=-1) == A * live).all()


def test_metrics_of_a_step_are_means_over_the_updates_with_live_tokens(compared):
    counts = np.array([[[2, 2]], [[4, 0]], [[0, 0]]])
    sums = {"tokens": counts.sum(-1), "expert_tokens": counts, "recorded": counts.sum(-1)}
    sums |= {name: counts.sum(-1) * 0.5 for name in ("entropy", "small_margins", "balance_loss", "z_loss")}
    sums["recorded_differs"] = np.array([[1], [4], [0]])
    device = {name: np.repeat(x, 3, axis=0) for name, x in compared[2].items() if name != "router"}
    device["tokens"] = np.array([5, 5, 0])
    metrics = update_metrics(device | {"router": sums})
    assert metrics["router/share_expert_0"] == 0.75 and metrics["router/share_expert_1"] == 0.25
    assert metrics["router/load_largest_over_mean"] == 1.5 and metrics["router/entropy"] == 0.5
    assert metrics["router/replay_differs"] == 0.25 and metrics["router/replay_differs_later_updates"] == 1.0
    assert not any("router" in name for name in update_metrics(device | {"router": {}}))


@pytest.fixture(scope="module")
def sampled():
    """Model, parameters, prompts and what the engine sampled and recorded; rows end by a stop token and by length."""
    model = small.config()
    params, prompts = small.params(model), small.prompts()
    engine = LocalEngine(model, prompt_tokens=4, rows=8, stop_ids=(1, 2, 3), mesh=MESH, record_experts=True)
    engine.set_weights(params, 0)
    rollouts = engine.generate(prompts, 4, Sampling(max_tokens=8), seed=0)
    assert {r.ending for g in rollouts for r in g} == {"stop", "length"}
    heldout = [dataclasses.replace(prompts[0], index=HELDOUT_INDEX)]
    assert engine.generate(heldout, 4, Sampling(max_tokens=8), seed=0)[0][0].expert_ids is None
    return model, params, prompts, rollouts


def batch_of(prompts, rollouts, router_replay=True, updates=1):
    shape = BatchShape.of(UpdateConfig(updates_per_batch=updates, micro_batch_rows=4, row_tokens=24), 4, 4, window=12)
    advantages = np.random.default_rng(0).normal(size=(4, 4))
    live = np.ones((4, 4), bool)
    return make_batch(
        prompts, rollouts, advantages, live, shape, "group_tokens", 8, router_replay=router_replay
    )  # fmt: skip


def test_the_engine_records_what_a_full_forward_chooses(sampled):
    """Every token of prompt and response, but for a stop token, which is sampled and not read."""
    model, params, prompts, rollouts = sampled
    flat = [(p.token_ids, r) for p, group in zip(prompts, rollouts, strict=True) for r in group]
    tokens_BT, segments_BT = np.zeros((16, 12), np.int32), np.zeros((16, 12), np.int32)
    for row, (prompt, r) in enumerate(flat):
        ids = np.concatenate([prompt, r.token_ids])
        tokens_BT[row, : len(ids)], segments_BT[row, : len(ids)] = ids, 1
    routed = jax.jit(hidden_states, static_argnums=1)(params, model, tokens_BT, segments_BT)[2]
    own_BTLA = np.moveaxis(np.asarray(routed["expert_ids"]).reshape(LAYERS, 16, 12, A), 0, 2)
    for row, (prompt, r) in enumerate(flat):
        assert r.expert_ids is not None
        read = len(prompt) + len(r.token_ids) - (r.ending == "stop")
        np.testing.assert_array_equal(r.expert_ids[:read], own_BTLA[row, :read])
        assert (r.expert_ids[read:] == -1).all() and r.expert_ids.dtype == np.int8
        assert r.expert_ids.shape == (len(prompt) + len(r.token_ids), LAYERS, A)


def test_recording_changes_no_sample(sampled):
    model, params, prompts, rollouts = sampled
    engine = LocalEngine(model, prompt_tokens=4, rows=8, stop_ids=(1, 2, 3), mesh=MESH)
    engine.set_weights(params, 0)
    for one, other in zip(rollouts, engine.generate(prompts, 4, Sampling(max_tokens=8), seed=0), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and b.expert_ids is None
            np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, atol=1e-6)


def test_records_are_packed_where_their_tokens_are(sampled):
    _, _, prompts, rollouts = sampled
    batch = batch_of(prompts, rollouts, updates=2)
    assert batch.expert_ids is not None and batch.expert_ids.dtype == np.int8
    assert batch.expert_ids.shape == (*batch.tokens.shape, LAYERS, A)
    assert (batch.expert_ids[batch.segment_ids == 0] == -1).all()
    of_tokens = {
        (*p.token_ids, *r.token_ids.tolist()): r.expert_ids for p, g in zip(prompts, rollouts, strict=True) for r in g
    }
    flat, found = (x.reshape(-1, *x.shape[3:]) for x in (batch.tokens, batch.segment_ids, batch.expert_ids)), 0
    for tokens_T, segments_T, experts_TLA in zip(*flat, strict=True):
        for segment in range(1, segments_T.max() + 1):
            mine = segments_T == segment
            np.testing.assert_array_equal(experts_TLA[mine], of_tokens[tuple(tokens_T[mine].tolist())])
            found += 1
    assert found == 16
    assert batch_of(prompts, rollouts, router_replay=False).expert_ids is None
    bare = [[dataclasses.replace(r, expert_ids=None) for r in group] for group in rollouts]
    with pytest.raises(ValueError, match="the rollouts are without their experts"):
        batch_of(prompts, bare)


def perturbed(expert_ids, live, count, num_experts=3):
    """`expert_ids` [..., L, A] with the last slot of `count` recorded live (token, layer) at another expert."""
    changed = expert_ids.copy()
    spots = np.argwhere((expert_ids[..., 0] >= 0) & live[..., None])
    for spot in map(tuple, np.random.default_rng(0).permutation(spots)[:count]):
        changed[spot][-1] = next(e for e in range(num_experts) if e not in expert_ids[spot])
    return changed


def test_replay_with_the_same_weights_gives_the_logprobs_without(sampled):
    model, params, prompts, rollouts = sampled
    batch = batch_of(prompts, rollouts)
    flat = lambda x: x.reshape(-1, *x.shape[3:])  # noqa: E731
    rows = flat(batch.tokens), flat(batch.segment_ids), 1.0
    live = flat(batch.weights) > 0
    off, use = (np.asarray(small.logprobs(params, model, *rows, ids)[0]) for ids in (None, flat(batch.expert_ids)))
    np.testing.assert_allclose(use[live], off[live], atol=1e-6)
    np.testing.assert_allclose(use[live], flat(batch.rollout_logprobs)[live], atol=1e-4)


@pytest.fixture(scope="module")
def compared(sampled):
    """(batch with a record that is changed in 7 places, gradient, metrics) of an update that only compares."""
    model, params, prompts, rollouts = sampled
    batch = batch_of(prompts, rollouts)
    other = dataclasses.replace(batch, expert_ids=perturbed(batch.expert_ids, batch.segment_ids > 0, 7))
    return other, *step(model, params, other)


def test_what_is_compared_and_what_serves(sampled, compared):
    """A record changed in 7 places: compared, 7 choices differ and the gradient is that of the own experts; used, the
    others serve, in policy and trainer's anchor alike (the first ratio stays 1), and not in the frozen reference."""
    model, params, prompts, rollouts = sampled
    batch = batch_of(prompts, rollouts)
    assert batch.expert_ids is not None
    recorded = (batch.expert_ids >= 0).sum()
    assert 2 * LAYERS * A * 16 < recorded < (batch.segment_ids > 0).sum() * LAYERS * A

    other, off, metrics = compared
    assert metrics["router"]["recorded"].sum() == recorded and metrics["router"]["recorded_differs"].sum() == 7
    anchored = dataclasses.replace(LOSSES["cispo"], ratio_anchor="trainer")
    use = make_update(model, anchored, SGD, MESH, temperature=1.0, passes=1, replay=True)
    for given, same in ((batch, True), (other, False)):
        state = TrainState(jax.tree.map(jnp.copy, params), SGD.init(params), jnp.int32(0), jax.random.key(0))
        after, metrics = use(state, given)
        gradient = jax.tree.map(lambda old, new: old - new, params, after.params)
        assert (relative(gradient, off) < 1e-4) == same  # the engine's ratio is 1 up to rounding
        assert (metrics["router"]["recorded_differs"].sum() == 0) == same
        assert metrics["largest_abs_log_ratio"][0] < 1e-5
        assert (metrics["largest_logprob_gap"][0] < 1e-4) == same

    live = batch.weights > 0
    reference = make_frozen_logprobs(model, MESH, temperature=1.0)(params, other)
    np.testing.assert_allclose(np.asarray(reference)[live], batch.rollout_logprobs[live], atol=1e-4)


def test_other_recorded_experts_are_computed_by_hand():
    """One mixture of experts in NumPy: softmax of the own logits at the recorded experts, times their MLPs."""
    with jax.enable_x64(True):
        model = small.config("float64")
        stacked = small.params(model)["periods"]["0_lightning"]["mlp"]
        params = jax.tree.map(lambda x: np.asarray(x[0, 0]), stacked)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(5, model.hidden_size))
        recorded = np.array([[2, 0], [0, 1], [1, 2], [2, 1], [-1, -1]], np.int8)
        run = lambda ids: MixtureOfExperts(model).apply({"params": params}, x, np.ones(5, bool), ids)  # noqa: E731
        y, routed = run(recorded)
        logits = x @ params["router"]
        chosen = recorded.copy()
        chosen[4] = np.argsort(-logits[4])[:2]
        for t in range(5):
            p = np.exp(logits[t, chosen[t]])
            expected = 0
            for weight, e in zip(p / p.sum(), chosen[t], strict=True):
                gate = x[t] @ params["gate"][e]
                expected += weight * (gate / (1 + np.exp(-gate)) * (x[t] @ params["up"][e])) @ params["down"][e]
            np.testing.assert_allclose(y[t], expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(routed["expert_ids"], np.argsort(-logits, axis=1)[:, :2])
        np.testing.assert_array_equal(routed["expert_tokens"], [(chosen == e).sum() for e in range(3)])
        assert np.abs(np.asarray(y - run(None)[0]))[:4].max() > 1e-3


def test_refusals(tmp_path, sampled):
    dense = dict(model__num_experts=0, model__experts_per_token=0)
    with pytest.raises(UserError, match="config.rollout.router_replay: 'use', but a dense model has no router"):
        runs.rl_config(tmp_path, rollout__router_replay="use", **dense)
    with pytest.raises(UserError, match="config.rollout.router_replay: 'on' must be one of"):
        runs.rl_config(tmp_path, rollout__router_replay="on")
    with pytest.raises(UserError, match="config.router.z_coefficient: 0.1, but a dense model has no router"):
        runs.rl_config(tmp_path, router=dict(balance_coefficient=0.0, z_coefficient=0.1), **dense)
    assert runs.rl_config(tmp_path, **dense).router == NO_AUXILIARY_LOSS
    assert runs.rl_config(tmp_path, router=dict(z_coefficient=0.1)).router == RouterConfig(0.0, 0.1)
    with pytest.raises(UserError, match="config.router.z_coefficient: -1.0 must be at least 0"):
        runs.rl_config(tmp_path, router=dict(z_coefficient=-1))

    model, _, prompts, rollouts = sampled
    values = runs.rl_values(tmp_path, rollout__router_replay="compare")
    config = build(RLConfig, values | {"model": model})
    check_expert_ids(config, prompts, rollouts)
    with pytest.raises(UserError, match="'compare', and the rollouts of this engine have experts of another model"):
        check_expert_ids(
            dataclasses.replace(config, model=dataclasses.replace(model, num_experts=2)), prompts, rollouts
        )


MORE_EXPERTS = dict(num_experts=6)  # more than serve a token, so that a choice can differ


def routed_run(tmp_path):
    """A run that uses and saves the experts of its engine: its config and the metrics of its step."""
    values = dict(steps=1, init_from=runs.save_bigram(tmp_path, **MORE_EXPERTS), model__num_experts=6)
    config = runs.rl_config(tmp_path, rollout__router_replay="use", rollout__save=True, **values)
    return config, loop.train(config, tmp_path / "saved", log=lambda _: None).metrics[-1]


def test_a_run_replays_its_routers_and_saves_them(tmp_path):
    config, row = routed_run(tmp_path)
    assert row["train/updates_applied"] == 2 and row["router/replay_differs"] == 0
    assert row["mismatch/largest_logprob_gap"] < 1e-4
    assert 0 < row["router/load_smallest_over_mean_worst_layer"] < 1 < row["router/load_largest_over_mean"] <= 3
    prompts, rollouts, _ = load_rollouts(next((tmp_path / "saved" / "rollouts").glob("*.npz")))
    check_expert_ids(config, prompts, rollouts)

    # Saved without them, they cannot be replayed.
    replay = dataclasses.replace(config.rollout, save=False, replay="runs/old", router_replay="compare")
    bare = [[dataclasses.replace(r, expert_ids=None) for r in group] for group in rollouts]
    with pytest.raises(UserError, match="router_replay: 'compare', and the rollouts of runs/old are without their exp"):
        check_expert_ids(dataclasses.replace(config, rollout=replay), prompts, bare)


@pytest.mark.slow
def test_a_saved_run_is_replayed_with_its_experts(tmp_path, monkeypatch):
    """Its own record gives its own gradient; another record differs, and what it says is done."""
    config, row = routed_run(tmp_path)

    def replayed(name, router_replay):
        replay = dataclasses.replace(
            config.rollout, save=False, replay=str(tmp_path / "saved"), router_replay=router_replay
        )
        run = dataclasses.replace(config, rollout=replay)
        return loop.train(run, tmp_path / name, log=lambda _: None).metrics[-1]

    again = replayed("again", "use")
    assert again["router/replay_differs"] == 0
    assert again["train/grad_norm"] == pytest.approx(row["train/grad_norm"], rel=1e-5)

    def shifted(path):
        prompts, rollouts, *rest = load_rollouts(path)
        other = lambda ids: np.where(ids < 0, ids, (ids + 3) % 6).astype(ids.dtype)  # noqa: E731
        return (
            prompts,
            [[dataclasses.replace(r, expert_ids=other(r.expert_ids)) for r in group] for group in rollouts],
            *rest,
        )

    monkeypatch.setattr("m1jax.rl.recorded.load_rollouts", shifted)
    used, compared = replayed("used", "use"), replayed("compared", "compare")
    assert used["router/replay_differs"] > 0.5 and compared["router/replay_differs"] > 0.5
    # The first update's log-probabilities are the engine's, unless other experts serve.
    assert compared["mismatch/largest_logprob_gap"] < 1e-4
    assert used["mismatch/largest_logprob_gap"] > 1e-3
