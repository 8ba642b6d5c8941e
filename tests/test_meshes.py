"""Over every mesh the numbers of one device: losses, gradients, metrics, parameters after AdamW, sampled tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from m1jax.config import build
from m1jax.errors import UserError
from m1jax.mesh import AXES, RULES, MeshConfig, axes_of, flat
from m1jax.rl.settings import RLConfig
from m1jax.sharding import check_rows, check_tokens
from tests import runs
from tests.mesh_child import MESHES
from tests.model import golden

ROOT = Path(__file__).parents[1]


A_FEW = ["expert", "fsdp x context x tensor"]
SOME = ["fsdp", "fsdp x expert x tensor", "data x expert x context"]


def on_eight_devices(
    file: Path, parts: Sequence[str], meshes: Sequence[str], dtype: str = "float32"
) -> dict[str, dict[str, np.ndarray]]:
    """`tests.mesh_child`, by mesh."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": str(dtype == "float64"),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.mesh_child", str(file), dtype, ",".join(parts), ";".join(meshes)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=900)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in np.load(file).items():
        mesh, _, what = name.partition("|")
        found.setdefault(mesh, {})[what] = value
    return found


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], head: str, tolerance: float) -> None:
    """Every tensor to `tolerance` of its norm; numbers of tokens exactly."""
    names = [name for name in wanted if name.startswith(head)]
    assert names and names == [name for name in found if name.startswith(head)]
    for name in names:
        x, y = found[name], wanted[name]
        if np.issubdtype(y.dtype, np.integer):
            np.testing.assert_array_equal(x, y, name)
        else:
            np.testing.assert_array_equal(np.isnan(x), np.isnan(y), name)  # a cosine to no gradient
            x, y = np.nan_to_num(x), np.nan_to_num(y)
            assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), (name, np.linalg.norm(x - y))


def check_recorded(found: dict[str, np.ndarray]) -> None:
    """Loss and gradient of every weight are the reference model's, as close as tests/model/test_transformer.py asks."""
    np.testing.assert_allclose(found["golden|metrics/loss"], golden.numbers()["loss"], rtol=0, atol=1e-5)
    recorded, names = golden.gradients(), [name for name in found if name.startswith("golden|grads/")]
    assert names
    for name in names:
        node = recorded
        for key in name.removeprefix("golden|grads/").split("/"):
            node = node[key]
        assert np.linalg.norm(found[name] - node) <= 2e-5 * np.linalg.norm(node), name


def check_identical(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Parameters after AdamW: up to the last bit of p and its step (both below 1), for XLA on a CPU fuses product and
    sum in a full vector and not in the rest of one, and where a row ends hangs on the mesh.

    Clipped, all are multiplied by one number, that of a norm whose squares are added up in another order.
    """
    close(found, wanted, "adam|1/", 1e-7)
    for name in [name for name in wanted if name.startswith("adam|1e+09/")]:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=6e-8, err_msg=name)


def test_over_meshes_the_recorded_gradients_and_identical_updates(tmp_path):
    """The recorded model over a few; over every mesh the gradients of a smaller one agree in float64, below."""
    found = on_eight_devices(tmp_path / "found.npz", ["golden", "adam"], ["one", *A_FEW])
    for mesh in A_FEW:
        check_recorded(found[mesh])
        close(found[mesh], found["one"], "golden|", 1e-5)
        check_identical(found[mesh], found["one"])


# One test for each call of eight devices, not one for each mesh: two workers would make every call twice.


@pytest.mark.heavy
def test_over_every_mesh_the_recorded_gradients(tmp_path):
    every = on_eight_devices(tmp_path / "golden.npz", ["golden"], ["one", *MESHES])
    for mesh in MESHES:
        close(every[mesh], every["one"], "golden|", 1e-5)
        check_recorded(every[mesh])


@pytest.mark.slow
def test_identical_gradients_move_parameters_alike(tmp_path):
    every = on_eight_devices(tmp_path / "adam.npz", ["adam"], ["one", *MESHES])
    for mesh in MESHES:
        check_identical(every[mesh], every["one"])


@pytest.mark.slow
def test_in_float64_they_agree_to_ten_digits(tmp_path):
    """Packed rows that cross the borders of devices; balance and z-losses of the whole batch are in the gradient."""
    every = on_eight_devices(tmp_path / "float64.npz", ["supervised"], ["one", *MESHES], "float64")
    for mesh in MESHES:
        close(every[mesh], every["one"], "supervised|", 1e-10)


@pytest.mark.slow
def test_an_rl_update_is_that_of_one_device(tmp_path):
    """With the experts of the engine replayed and compared.

    Its policy metrics are float32 by the engine's log-probabilities; so is the sample of gradients.
    """
    every = on_eight_devices(tmp_path / "rl.npz", ["rl"], ["one", *SOME], "float64")
    for mesh in SOME:
        close(every[mesh], every["one"], "rl|grads", 1e-10)
        close(every[mesh], every["one"], "rl|metrics", 1e-5)


@pytest.mark.slow
def test_the_engine_samples_the_same(tmp_path):
    """Rows end early, on some devices before others; the tokens, lengths and experts are equal all the same."""
    every = on_eight_devices(tmp_path / "engine.npz", ["engine"], ["one", *SOME])
    wanted = every["one"]
    assert wanted["engine|lengths"].min() < wanted["engine|lengths"].max()
    for found in (every[mesh] for mesh in SOME):
        for what in ("ids", "lengths", "experts"):
            np.testing.assert_array_equal(found[f"engine|{what}"], wanted[f"engine|{what}"])
        np.testing.assert_allclose(found["engine|logprobs"], wanted["engine|logprobs"], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_memory_falls_with_what_is_dealt_out(tmp_path):
    """By the compiler: bytes of a device that holds state, and all of them while it computes."""
    found = on_eight_devices(tmp_path / "memory.npz", ["memory"], ["one"])["memory"]
    for axis, state, peak in (("fsdp", 0.13, 0.3), ("tensor", 0.13, 0.2), ("expert", 0.25, 0.3)):
        assert found[f"{axis}/state"] < state * found["data/state"], axis
        assert found[f"{axis}/peak"] < peak * found["data/peak"], axis
    # Without remat too the weights that a layer gathered are not kept until its backward pass: 0.42 if they were.
    assert found["fsdp, nothing again/peak"] < 0.32 * found["data, nothing again/peak"]


# -- the table ---------------------------------------------------------------------------------------------------


def test_no_two_dimensions_of_a_parameter_lie_along_one_axis():
    assert axes_of(("embed", "heads", None, "head_dim")) == (("fsdp", "context"), "tensor", None, None)
    with pytest.raises(ValueError, match="'heads' and 'mlp' of one parameter both lie along 'tensor'"):
        axes_of(("heads", "embed", "mlp"))
    with pytest.raises(ValueError, match="'width' is not in the table"):
        axes_of(("width",))
    assert {axis for entry in RULES.values() for axis in flat(entry)} <= set(AXES)


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        (dict(data=2, tensor=2), 8, "data 2 x tensor 2 makes 4 devices, and there are 8"),
        (dict(fsdp=3), 8, "fsdp 3 is for a multiple of 3 devices, and there are 8"),
        (dict(data=1), 8, "1 device makes 1 devices, and there are 8"),
    ],
)
def test_devices_that_cannot_be_laid_out_are_refused(sizes, devices, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes).on(devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(tensor=4), "config.mesh.tensor: 4 devices do not divide model.num_kv_heads, 2; choose a divisor"),
        (dict(fsdp=3), "config.mesh.fsdp: 3 devices do not divide model.hidden_size, 40"),
        (dict(fsdp=4, context=4), "config.mesh.fsdp x mesh.context: 16 devices do not divide model.hidden_size, 40"),
        (dict(expert=3), "config.mesh.expert: 3 devices do not divide model.num_experts, 4"),
        (dict(tensor=2, fsdp=0), "config.mesh.fsdp: 0, as data; only one axis can take what is left"),
        (dict(expert_exchange="mail"), "config.mesh.expert_exchange: 'mail' must be one of"),
        (dict(context=7), "config.mesh.context: 7 devices cannot share the 24 tokens of a row evenly"),
    ],
)
def test_a_model_that_cannot_be_dealt_out_is_refused_with_both_numbers(tmp_path, sizes, message):
    model = dict(hidden_size=40, num_heads=4, num_kv_heads=2, num_experts=4, experts_per_token=2)
    if "context" in sizes and "fsdp" not in sizes:
        model["hidden_size"] = 42
    values = runs.rl_values(tmp_path) | {"mesh": sizes, "update": dict(updates_per_batch=1, row_tokens=24)}
    with pytest.raises(UserError) as error:
        build(RLConfig, values | {"model": values["model"] | model})
    assert str(error.value).startswith(message)


def test_rows_and_tokens_that_the_devices_do_not_divide_are_refused():
    """By the mesh that there is: a config whose open axis is one of these cannot know it."""
    mesh = AbstractMesh((1, 2, 2, 4, 1), AXES)
    check_rows(8, "config.rows", mesh)
    with pytest.raises(UserError, match="config.rows: 6 rows cannot be dealt out to 4 devices; choose 4 or 8"):
        check_rows(6, "config.rows", mesh)
    check_tokens(48, "config.tokens", mesh)
    with pytest.raises(
        UserError, match="config.tokens: 50 tokens of a row cannot be dealt out to 4 devices along mesh"
    ):
        check_tokens(50, "config.tokens", mesh)


def test_the_open_axis_takes_what_is_left():
    assert MeshConfig(fsdp=2).on(8).sizes == dict(data=4, fsdp=2, expert=1, context=1, tensor=1)
    assert MeshConfig(data=1, fsdp=0, tensor=2).on(8).fsdp == 4
