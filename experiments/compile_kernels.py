"""What the real compilers say to our Pallas kernels, on a machine that has no GPU and no TPU.

    python -m experiments.compile_kernels --target=v5p|v6e|h100 [--only=NAME]

    v5p, v6e   libtpu: bytes of VMEM that a kernel takes, without operands that XLA itself keeps there
               pip install "jax[tpu]==VERSION"
    h100       ptxas: registers a thread; spilled bytes a thread; bytes of shared memory a block, of 232448
               pip install jax-cuda12-plugin==VERSION nvidia-cuda-nvcc-cu12

VERSION is that of the JAX installed. Interpreted kernels pass where these compilers refuse: a primitive that has no
lowering, a block that does not fit. Neither numbers nor speed are checked here.

Each program is compiled in a process of its own: a compiler that aborts takes one line of the table with it, and
Mosaic GPU compiles a kernel that it has met before silently. Where warpgroups hand registers to each other
(setmaxnreg), the number is the one at launch.
Exit code 1: a program did not compile.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import cli
from m1jax.errors import UserError
from m1jax.pallas_kernels.compat import lowering_for
from m1jax.pallas_kernels.gated_norm import gated_norm
from m1jax.pallas_kernels.lightning_attention import fused_decode, lightning_attention
from m1jax.pallas_kernels.moe import expert_mlp
from m1jax.pallas_kernels.shapes import TARGET_SHAPES

Program = tuple[Callable[..., Any], tuple[Any, ...]]

TPU_TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""The smallest that libtpu knows, one host; programs use its first chip."""

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132  fpus_per_core: 128  threads_per_core_limit: 2048  threads_per_block_limit: 1024  threads_per_warp: 32
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_core: 233472  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98  l2_cache_size: 52428800  memory_bandwidth: 3352320000000  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""A GpuTargetConfigProto. Limits: CUDA programming guide, compute capability 9.0. Sizes and rates: an H100 SXM as XLA
describes it (xla/backends/gpu/target_config/specs/h100_sxm.txtpb)."""

COLUMNS = {"h100": ("registers", "spill stores", "spill loads", "shared static", "shared dynamic"), "tpu": ("VMEM",)}
"""Numbers of a kernel, in the order of the table; in bytes, but for registers."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, choices=[*TPU_TOPOLOGIES, "h100"])
    parser.add_argument("--only", metavar="NAME", help="one program")
    about = "compile --only here and show what the compilers print; for h100 set MOSAIC_GPU_DUMP_PTX=1 or the like"
    parser.add_argument("--here", action="store_true", help=about)
    arguments = parser.parse_args(argv)
    target, names = arguments.target, list(programs(arguments.target))
    if arguments.only not in [*names, None] or (arguments.here and not arguments.only):
        parser.error(f"--only: {arguments.only} is no program for {target}; there is {', '.join(names)}")
    if arguments.here:
        compile_here(target, arguments.only)
        return 0
    chosen, failed = [arguments.only] if arguments.only else names, []
    code = cli.guard(lambda: failed.extend(table(target, chosen)), uses_jax=False)
    return code or bool(failed)


def programs(target: str) -> dict[str, Program]:
    """`{name: (function, abstract arguments)}`: every operation with a kernel of ours, at all `TARGET_SHAPES`."""
    implementation = "mosaic_gpu" if target == "h100" else "mosaic_tpu"
    attend = partial(lightning_attention, implementation=implementation)
    decode = partial(fused_decode, implementation=implementation)
    norm = partial(gated_norm, eps=1e-6, implementation=implementation)
    experts = partial(expert_mlp, implementation=implementation)
    qkv, rows = ("q_BTNH", "k_BTNH", "v_BTNH", "initial_state_BNHH"), ("o_MX", "gate_MX", "scale_X")
    dtypes = {"": jnp.bfloat16} | ({", float32": jnp.float32} if implementation == "mosaic_tpu" else {})
    found = {}
    for shape in TARGET_SHAPES["lightning"]:
        for suffix, dtype in dtypes.items():
            arguments, name = shape.arrays(dtype), f"{shape}{suffix}"
            found[f"lightning, {name}"] = (partial(forward, attend), (arguments,))
            found[f"lightning and gradients, {name}"] = (partial(both_ways, attend, qkv), (arguments,))
    for shape in TARGET_SHAPES["decode"]:
        found[f"decode, {shape}"] = (partial(forward, decode), (shape.arrays(jnp.bfloat16),))
    for shape in TARGET_SHAPES["gated_norm"]:
        arguments = shape.arrays(jnp.bfloat16)
        square_M = jax.ShapeDtypeStruct((shape.M,), jnp.float32)
        found[f"gated norm, {shape}"] = (partial(forward, norm), (arguments,))
        found[f"gated norm of known squares, {shape}"] = (partial(forward, norm), (arguments | {"square_M": square_M},))
        found[f"gated norm and gradients, {shape}"] = (partial(both_ways, norm, rows), (arguments,))
    trained = ("x_TD", "combine_weights_TA", "w_gate_EDF", "w_up_EDF", "w_down_EFD")
    for shape in TARGET_SHAPES["experts"]:
        if shape.routing != "balanced":
            continue  # the same program
        for suffix, dtype in dtypes.items():
            arguments, name = shape.arrays(dtype), f"{shape}{suffix}"
            found[f"experts, {name}"] = (partial(forward, experts), (arguments,))
            found[f"experts and gradients, {name}"] = (partial(both_ways, experts, trained), (arguments,))
    return found


def forward(operation: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What the operation returns."""
    return operation(**arguments)


def both_ways(operation: Callable[..., Any], trained: Sequence[str], arguments: dict[str, Any]) -> Any:
    """What the operation returns, and the gradients of `trained`; the outputs stand in for their cotangents."""
    fixed = {name: x for name, x in arguments.items() if name not in trained}
    out, pull = jax.vjp(lambda x: operation(**x, **fixed), {name: arguments[name] for name in trained})
    return out, pull(out)


@dataclass
class Kernel:
    """A kernel of a compiled program.

    Attributes:
        name: as the compiler calls it.
        numbers: those of `COLUMNS`, as far as the compiler told.
        remarks: what ptxas said about it, by the code of the remark; a "performance loss" is a slow kernel.
    """

    name: str
    numbers: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)


def table(target: str, names: Sequence[str]) -> list[str]:
    """Print a line for each kernel of each program; the names of those that did not compile.

    Raises:
        UserError: a compiler is missing.
    """
    compiler, environment = find_compiler(target)
    columns = COLUMNS.get(target, COLUMNS["tpu"])
    width = max(map(len, names))
    print(f"{target}, JAX {jax.__version__}, {compiler}")
    print(f"{'program':{width}}  compile s", *(f"{column:>16}" for column in columns), "  kernel", sep="")
    failed = []
    for name in names:
        flags = ["--here", f"--target={target}", f"--only={name}"]
        command = [sys.executable, "-m", "experiments.compile_kernels", *flags]
        done = subprocess.run(command, env=environment, capture_output=True, errors="replace")
        if done.returncode:
            failed.append(name)
            print(f"{name:{width}}  failed: {last_error(done.stderr, done.returncode)}", flush=True)
            continue
        seconds, kernels = read_output(done.stdout.splitlines())
        for kernel in kernels or [Kernel("(no Pallas kernel)")]:
            numbers = (f"{kernel.numbers.get(column, '-'):>16}" for column in columns)
            print(f"{name:{width}}  {seconds:9.1f}", *numbers, f"  {kernel.name}", sep="", flush=True)
            for code, remark in kernel.remarks.items():
                print(f"{'':{width}}  {code}: {remark}")
    return failed


def find_compiler(target: str) -> tuple[str, dict[str, str]]:
    """The compiler of a target with its version, and the environment for `compile_here`.

    Raises:
        UserError: a compiler is missing.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # a program out of the cache tells nothing
    if target != "h100":
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock protects a TPU, and none is used
        if not importlib.util.find_spec("libtpu"):
            raise UserError(f'--target={target}: no libtpu here; pip install "jax[tpu]=={jax.__version__}"')
        return f"libtpu {version('libtpu')}", environment
    if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        raise UserError(f"--target={target}: no CUDA plugin; pip install jax-cuda12-plugin=={jax.__version__}")
    folder = ptxas_folder()
    if folder is None:
        raise UserError(f"--target={target}: no ptxas here; pip install nvidia-cuda-nvcc-cu12")
    # JAX takes the first ptxas on the path, be it of another CUDA. The passes are printed for one number in them: the
    # size of the dynamic shared memory is an argument of the launch, which ptxas does not see.
    environment["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    environment |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_MLIR_PASSES": "1"}
    told = subprocess.run([f"{folder}/ptxas", "--version"], capture_output=True, text=True).stdout
    return "ptxas " + (re.findall(r"V([\d.]+)", told) or ["of unknown version"])[0], environment


def ptxas_folder() -> str | None:
    """Where ptxas is: in a package of NVIDIA's, on the path, or in a CUDA toolkit at the usual place."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else None
    packaged = [found for root in roots or () for found in sorted(glob.glob(f"{root}/*/bin/ptxas"))]
    found = [*packaged, shutil.which("ptxas"), shutil.which("/usr/local/cuda/bin/ptxas")]
    return next((str(Path(each).parent) for each in found if each), None)


def compile_here(target: str, name: str) -> None:
    """Compile one program for the target; print the VMEM of TPU kernels, and the seconds it took."""
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for the devices, and the CUDA plugin fails without one
    if target == "h100":
        topology = topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=H100)
    else:
        topology = topologies.get_topology_desc(TPU_TOPOLOGIES[target], platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    function, arguments = programs(target)[name]
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments)
    # The abstract mesh knows the device: what Pallas asks for while it lowers, the number of cores for one.
    with lowering_for("gpu" if target == "h100" else "tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    for line in (compiled.as_text() or "").splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            used = re.search(r'"used_scoped_memory_configs":\[([^]]*)', line)
            sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used[1] if used else "")
            print(f"VMEM of {line.split()[line.split().index('=') - 1].lstrip('%')}: {sum(map(int, sizes))} bytes")
    print(f"compiled in {seconds} s", flush=True)


def read_output(lines: Iterable[str]) -> tuple[float, list[Kernel]]:
    """The seconds and the kernels in what `compile_here`, Mosaic GPU and ptxas print.

    Each has a buffer of its own, so that a line may begin in the middle of another's: never look at its start only.
    """
    seconds, dynamic, remarks, kernels = float("nan"), 0, {}, []
    for line in lines:
        if found := re.search(r"compiled in (\S+) s", line):
            seconds = float(found[1])
        elif found := re.search(r"VMEM of (\S+): (\d+) bytes", line):
            kernels.append(Kernel(found[1], {"VMEM": int(found[2])}))
        elif found := re.search(r" dynamic_shared_memory_size %c(\d+)_i32", line):  # of the kernel that comes next
            dynamic = int(found[1])
        elif found := re.search(r"ptxas \w+\s*: \((C\d+)\) (.*)", line):
            remarks.setdefault(found[1], found[2])
        elif found := re.search(r"ptxas info\s*: Compiling entry function '(\S+?)(_mosaic_gpu_kernel)?'", line):
            kernels.append(Kernel(found[1], {"shared dynamic": dynamic}, remarks))
            dynamic, remarks = 0, {}
        elif found := re.search(r"\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[-1].numbers |= {"spill stores": int(found[1]), "spill loads": int(found[2])}
        elif found := re.search(r"ptxas info\s*: Used (\d+) registers", line):
            static = re.search(r"(\d+) bytes smem", line)
            kernels[-1].numbers |= {"registers": int(found[1]), "shared static": int(static[1]) if static else 0}
    return seconds, kernels


def last_error(stderr: str, code: int) -> str:
    """The message of the last exception, or of the C++ check that ended the process, on one line."""
    lines = stderr.splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b|F\d{4} |LLVM ERROR", line)]
    return " ".join(" ".join(lines[starts[-1] :]).split())[:700] if starts else f"exit code {code}"


if __name__ == "__main__":
    raise SystemExit(main())
