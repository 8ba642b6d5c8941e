"""The report of real compilers: what it reads from their output, and what it says where they are missing."""

import importlib.util

import pytest

from experiments import compile_kernels

PTXAS = """
  gpu.launch_func dynamic_shared_memory_size %c110608_i32 args(...)
ptxas info    : (C7519) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
noise ptxas info    : Compiling entry function 'walk_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for walk_mosaic_gpu_kernel
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 216 registers, used 1 barriers, 1 bytes smem
  gpu.launch_func dynamic_shared_memory_size %c2048_i32 args(...)
ptxas info    : Compiling entry function 'step' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 98 registers, used 1 barriers
compiled in 1.5 s
""".splitlines()


def test_registers_spills_and_shared_memory_of_each_kernel():
    seconds, kernels = compile_kernels.read_output(PTXAS)
    assert seconds == 1.5
    assert [k.name for k in kernels] == ["walk", "step"]
    assert kernels[0].numbers == {
        "registers": 216, "spill stores": 4, "spill loads": 8, "shared static": 1, "shared dynamic": 110608,
    }  # fmt: skip
    assert set(kernels[0].remarks) == {"C7519"} and not kernels[1].remarks
    assert kernels[1].numbers["shared dynamic"] == 2048 and kernels[1].numbers["registers"] == 98


def test_memory_of_tpu_kernels():
    seconds, kernels = compile_kernels.read_output(["VMEM of walk.1: 4849664 bytes", "compiled in 2 s"])
    assert (seconds, kernels[0].name, kernels[0].numbers) == (2.0, "walk.1", {"VMEM": 4849664})


@pytest.mark.parametrize(
    ("target", "module", "words"),
    [("v5p", "libtpu", 'pip install "jax[tpu]=='), ("h100", "jax_cuda", "pip install jax-cuda12-plugin==")],
)
def test_a_missing_compiler_is_one_line(monkeypatch, capsys, target, module, words):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith(module) else find(name))
    assert compile_kernels.main([f"--target={target}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--target={target}: no " in error and words in error


def test_an_unknown_program_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        compile_kernels.main(["--target=v5p", "--only=softmax"])
    assert "softmax is no program for v5p; there is lightning, 1 x 16384" in capsys.readouterr().err


def test_a_program_that_does_not_compile_is_told_and_the_table_goes_on(monkeypatch, capsys):
    """Without a compiler for the target every program fails, each in its own line."""
    monkeypatch.setattr(compile_kernels, "find_compiler", lambda target: ("none", {"PATH": ""}))
    names = list(compile_kernels.programs("v5p"))[:2]
    assert compile_kernels.table("v5p", names) == names
    assert capsys.readouterr().out.count("failed: ") == 2
