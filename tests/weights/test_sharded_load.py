"""Weights straight into sharded arrays, on four CPU devices in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

CHILD = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from m1jax.weights.hf_folder import HFFolder
from m1jax.weights.load import load_params
from tests.model.golden import GOLDENS

source = HFFolder(GOLDENS / "m1_tiny")
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("expert", "embed"))
whole = load_params(source, source.config)

def sharding(path, leaf):
    axes = [None] * leaf.ndim
    if path[-1].key in ("gate", "up", "down") and path[-2].key == "mlp":
        axes[2] = "expert"  # a leading axis: a tensor belongs to some devices only
    if path[-1].key in ("qkv", "embedding", "router"):
        axes[-3 if path[-1].key == "qkv" else -1] = "embed"  # a trailing one: a tensor is cut
    return NamedSharding(mesh, PartitionSpec(*axes))

params = load_params(source, source.config, jax.tree_util.tree_map_with_path(sharding, whole))
jax.tree.map(np.testing.assert_array_equal, params, whole)
run = params["periods"]["0_lightning"]
assert {s.data.shape for s in run["mlp"]["gate"].addressable_shards} == {(1, 7, 2, 40, 24)}
assert {s.data.shape for s in run["attention"]["qkv"].addressable_shards} == {(1, 7, 40, 2, 3, 16)}, "heads are cut"
assert {s.data.shape for s in params["embedding"].addressable_shards} == {(256, 20)}
print("sharded as asked")
"""


def test_every_device_gets_its_shard_and_no_more():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    root = Path(__file__).parents[2]
    child = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert "sharded as asked" in child.stdout
