"""Every kernel at every target shape really lowers to Mosaic, for an H100 and for a TPU, on a machine that has neither.

What an interpreter accepts a device may not: layouts, block shapes and primitives are judged while lowering.
"""

import re

import jax
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from experiments.compile_kernels import programs
from m1jax.pallas_kernels.compat import lowering_for

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))
CUSTOM_CALL = {"h100": "mosaic_gpu_v2", "v5p": "tpu_custom_call"}


def lowered(target: str, name: str) -> str:
    """Return the program's StableHLO for the target."""
    function, arguments = programs(target)[name]
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    platform = "cuda" if target == "h100" else "tpu"
    with lowering_for("gpu" if target == "h100" else "tpu"), use_abstract_mesh(H100):
        jitted = jax.jit(function)
        return export.export(jitted, platforms=[platform], disabled_checks=checks)(*arguments).mlir_module()


def test_float32_is_multiplied_at_the_highest_precision():
    """An interpreter does so anyway; a matrix unit would round to bfloat16."""
    function, arguments = programs("v5p")["lightning and gradients, 8 x 2048, 8 heads of 64, float32"]
    with lowering_for("tpu"):
        text = str(jax.make_jaxpr(function)(*arguments))
    products = [line for line in text.splitlines() if "dot_general" in line]
    kernels = re.findall(r"precision=\(?Precision\.(\w+)", text) or re.findall(r"precision=(\w+)", text)
    assert products and set(kernels) == {"HIGHEST"}, kernels


def kernels_of(target: str, name: str) -> int:
    """Return how many kernels a program must hold."""
    if name.startswith("experts"):  # gate-up, down; back through both, gradients of gate and up, of down
        return 6 if "gradients" in name else 2
    if "gradients" not in name:
        return 1
    return 3 if name.startswith("lightning") else 2  # forwards; dq forwards, dk and dv backwards


@pytest.mark.parametrize("name", programs("v5p"))
def test_lowers_to_mosaic_tpu(name):
    text = lowered("v5p", name)
    assert len(re.findall(CUSTOM_CALL["v5p"], text)) == kernels_of("v5p", name)


@pytest.mark.parametrize("name", programs("h100"))
def test_lowers_to_mosaic_gpu(name):
    text = lowered("h100", name)
    found = len(re.findall(CUSTOM_CALL["h100"], text))
    # Where heads are few, a launch for the states of spans comes before each walk.
    assert kernels_of("h100", name) <= found <= 2 * kernels_of("h100", name)
    assert (found > kernels_of("h100", name)) == bool(re.search(r"lightning.* 8 heads", name))
    assert "triton" not in text


@pytest.mark.parametrize("target", ["h100", "v5p"])
def test_decode_changes_a_donated_pool_in_place(target):
    """From the argument of the program through the kernel to its result there is one buffer."""
    function, (arguments,) = programs(target)["decode, 64 rows of 256 slots, 64 heads of 128"]
    pool = arguments.pop("state_SNHH")
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with lowering_for("gpu" if target == "h100" else "tpu"), use_abstract_mesh(H100):
        step = jax.jit(lambda pool, others: function({**others, "state_SNHH": pool}), donate_argnums=0)
        platforms = ["cuda" if target == "h100" else "tpu"]
        text = export.export(step, platforms=platforms, disabled_checks=checks)(pool, arguments).mlir_module()
    assert re.search(r"tensor<256x64x128x128xf32> \{[^}]*tf.aliasing_output = 2", text)
    assert "output_operand_alias<output_tuple_indices = [2]" in text
