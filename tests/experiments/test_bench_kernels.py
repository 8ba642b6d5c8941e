"""The kernels' benchmark: its floors are those of a table worked by hand, and it runs at its smallest."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from experiments.bench.kernels import measure, roofline
from experiments.bench.kernels.__main__ import main
from experiments.bench.kernels.cases import Case, groups, sizes
from experiments.bench.kernels.ops import OPS, refusal
from experiments.bench.kernels.roofline import Work
from m1jax.pallas_kernels import compat
from m1jax.pallas_kernels.shapes import Decode, Experts, GatedNorm, Lightning, Softmax, segment_ids

H100 = {"flops_per_second": 798e12, "bytes_per_second": 3.0e12}
BFLOAT16 = 2


def milliseconds(work: Work) -> float:
    return 1e3 * roofline.floor(work, **H100)


def by_compute(work: Work) -> float:
    return milliseconds(Work(work.flops, 0))


def by_bytes(work: Work) -> float:
    return milliseconds(Work(0, work.bytes))


@pytest.mark.parametrize(
    "tokens, chunk, tflop, forward_compute, backward_compute",
    [(16_384, 64, 0.103, 0.129, 0.323), (16_384, 128, 0.137, 0.172, 0.431), (16_384, 256, 0.206, 0.258, 0.646),
     (32_768, 128, 0.275, 0.344, 0.861), (131_072, 128, 1.10, 1.38, 3.45), (1_048_576, 128, 8.80, 11.0, 27.6)],
)  # fmt: skip
def test_products_of_lightning_attention(tokens, chunk, tflop, forward_compute, backward_compute):
    shape = Lightning(B=1, T=tokens, N=64, H=128)
    forward, both = (roofline.lightning(shape, way, BFLOAT16, chunk) for way in (False, True))
    assert forward.flops / 1e12 == pytest.approx(tflop, rel=5e-3)
    assert by_compute(forward) == pytest.approx(forward_compute, rel=5e-3)
    assert by_compute(both) - by_compute(forward) == pytest.approx(backward_compute, rel=5e-3)


@pytest.mark.parametrize(
    "tokens, forward, backward", [(16_384, 0.358, 0.626), (32_768, 0.716, 1.253), (1_048_576, 22.9, 40.1)]
)
def test_bytes_of_lightning_attention(tokens, forward, backward):
    shape = Lightning(B=1, T=tokens, N=64, H=128)
    without, both = (roofline.lightning(shape, way, BFLOAT16) for way in (False, True))
    assert milliseconds(without) == pytest.approx(forward, rel=2e-3)  # the bytes bind
    assert by_bytes(both) - by_bytes(without) == pytest.approx(backward, rel=2e-3)


@pytest.mark.parametrize(
    "tokens, tflop, forward, both",
    [(8_192, 1.10, 1.38, 4.8), (32_768, 17.6, 22.0, 77), (131_072, 281, 353, 1_230), (1_048_576, 18_014, 22_600, 79e3)],
)
def test_floors_of_softmax_attention(tokens, tflop, forward, both):
    shape = Softmax(B=1, T=tokens, N=64, K=8, H=128)
    assert roofline.softmax(shape, False, BFLOAT16).flops / 1e12 == pytest.approx(tflop, rel=5e-3)
    assert milliseconds(roofline.softmax(shape, False, BFLOAT16)) == pytest.approx(forward, rel=5e-3)
    assert milliseconds(roofline.softmax(shape, True, BFLOAT16)) == pytest.approx(both, rel=7e-3)


def test_floors_of_what_only_moves_memory():
    assert milliseconds(roofline.decode(Decode(B=64, S=256, N=64, H=128), False, BFLOAT16)) == pytest.approx(
        1e3 * (2 * 64 * 64 * 128 * 128 * 4 + 4 * 64 * 64 * 128 * 2) / 3.0e12
    )
    shape = GatedNorm(M=16_384, N=64, H=128)  # 0.268 GB an array
    assert milliseconds(roofline.gated_norm(shape, False, BFLOAT16)) == pytest.approx(3 * 0.0895, rel=1e-3)
    assert milliseconds(roofline.gated_norm(shape, True, BFLOAT16)) == pytest.approx(8 * 0.0895, rel=1e-3)


@pytest.mark.parametrize(
    "tokens, D, F, tflop, forward, weights",
    [(16_384, 6_144, 9_216, 11.13, 13.95, 10.9), (65_536, 6_144, 9_216, 44.5, 55.8, 10.9),
     (16_384, 1_024, 1_536, 0.309, 0.388, 0.30), (65_536, 1_024, 1_536, 1.24, 1.55, 0.30)],
)  # fmt: skip
def test_floors_of_experts(tokens, D, F, tflop, forward, weights):
    shape = Experts(T=tokens, D=D, F=F, E=32, A=2)
    work, both = (roofline.experts(shape, way, BFLOAT16) for way in (False, True))
    assert work.flops / 1e12 == pytest.approx(tflop, rel=5e-3)
    assert milliseconds(work) == pytest.approx(forward, rel=5e-3)  # the router's 0.06% included
    assert both.flops == 3 * work.flops
    rows = 2 * tokens * D * BFLOAT16
    assert (work.bytes - rows) / 1e9 == pytest.approx(weights, rel=1e-2)
    # Backward: x and dy read, dx written; the weights read once more, and their gradients written.
    assert both.bytes - work.bytes == 1.5 * rows + 2 * (work.bytes - rows)
    idle = Experts(T=tokens, D=D, F=F, E=32, A=2, routing="empty")  # two experts have rows
    assert roofline.experts(idle, False, BFLOAT16).bytes - rows == (work.bytes - rows) / 16


def test_packed_rows_see_less():
    shape = Softmax(B=1, T=70, N=4, K=2, H=16, segments=2)
    ids = np.asarray(segment_ids(1, 70, 2))[0]
    pairs = sum((ids == segment).sum() ** 2 for segment in (1, 2)) / 2
    assert roofline.softmax(shape, False, 4).flops == 4 * 16 * 4 * pairs


def test_a_chunk_is_no_longer_than_the_row():
    """3 tokens, 2 heads of 4, float32, by hand."""
    work = roofline.lightning(Lightning(B=1, T=3, N=2, H=4), False, 4)
    assert work == (6 * (4 * 3 * 4 + 4 * 16), 4 * 6 * 4 * 4)


def test_too_large_is_told():
    notes = []
    here = replace(sizes(smoke=True), shapes={"lightning": [Lightning(1, 64, 2, 16)]}, limit=Work(0, 1e9))
    assert list(groups(["lightning"], "", here, notes)) == []
    assert notes == ["lightning, 1 x 64, 2 heads of 16, forward and forward+backward: too large for this machine"]


def test_refusals_are_in_the_operations_words():
    shape = Lightning(B=1, T=64, N=2, H=16)
    assert refusal(OPS["lightning"], shape, "float32", "xla") is None
    assert "it needs a TPU" in str(refusal(OPS["lightning"], shape, "float32", "mosaic_tpu"))
    with compat.lowering_for("gpu"):
        packed = Softmax(B=1, T=128, N=2, K=2, H=64, segments=2)
        assert "it takes no segment ids" in str(refusal(OPS["softmax"], packed, "bfloat16", "cudnn"))


def test_peers_that_compute_something_else_are_told():
    case = Case("lightning", Lightning(B=1, T=64, N=2, H=16), "forward")
    (line,) = measure.unlike(case, {"xla": 10.0, "softmax blocked": 0.1, "transformers": 10.1, "fla": 0.9})
    assert "fla computes something else than xla" in line


def test_everything_at_its_smallest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)  # as where torch is not installed
    assert main(["--smoke", f"--workdir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.png").stat().st_size > 0
    for row in results["rows"]:
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in ("seconds", "floor", "fraction"))
    found = {(row["op"], row["pass"], row["program"]) for row in results["rows"]}
    both = ("forward", "forward+backward")
    implementations = dict.fromkeys(("lightning", "growth", "gated_norm", "experts"), "xla") | {"softmax": "blocked"}
    assert {(op, way, name) for op, name in implementations.items() for way in both} <= found
    assert ("decode", "forward", "xla") in found and ("decode", "forward+backward", "xla") not in found
    assert set(results["growth"]) == {"xla forward", "xla forward+backward"}
    printed = capsys.readouterr().out
    for peer in ("transformers", "fla", "torch SDPA", "Transformers' grouped"):
        assert f"peer {peer}: torch is not installed here" in printed
    assert "lightning attention by 'mosaic_gpu' cannot run here" in printed
    assert (
        printed.count("by 'mosaic_tpu' cannot run here") == 3
    )  # lightning attention, the norm, the experts: once each


@pytest.mark.parametrize("flag", ["--ops=lightening", "--implementations=triton"])
def test_unknown_names(tmp_path, capsys, flag):
    assert main([flag, f"--workdir={tmp_path}"]) == 2
    assert f"error: {flag.split('=')[0]}: there is no {flag.split('=')[1]}; there are: " in capsys.readouterr().err


def test_a_python_without_torch_is_no_error(tmp_path, capsys):
    python = tmp_path / "bare"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # without its packages
    python.chmod(0o755)
    flags = ["--smoke", "--ops=gated_norm", f"--peers_python={python}", f"--workdir={tmp_path}"]
    assert main(flags) == 0
    assert "peer fla: torch: ended with code 1 (ModuleNotFoundError: No module named 'torch'" in capsys.readouterr().out
