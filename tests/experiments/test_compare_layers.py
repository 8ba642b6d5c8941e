"""compare_layers: a number that is off is noticed and named, what cannot be checked is said, mistakes take one line.

The recorded numbers of m1_tiny are cut to one sequence of 48 tokens: it is causal, so they stay what they are, and no
run takes more than a second once the programs are compiled.
"""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import cli
from experiments.compare_layers import __main__ as entry
from experiments.compare_layers import goldens, modes
from m1jax.model.observe import Observation
from tests.model.golden import GOLDENS, config, numbers

M1 = GOLDENS / "m1_tiny"
TOKENS = 48
SEQUENCE = ("hidden", "router_ids", "router_weights", "router_margin", "final_norm", "logits", "logprobs")


@pytest.fixture(autouse=True)
def settings_stay():
    """An entry point sets JAX's precision for its process; the tests that follow get theirs back."""
    names = ("jax_enable_x64", "jax_default_matmul_precision")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def observed(monkeypatch):
    """(path, dtype) of every forward pass that is made."""
    seen = []

    def watch(real):
        def observe(params, config, tokens, segments, path, *more):
            seen.append((path, str(params["embedding"].dtype)))
            return real(params, config, tokens, segments, path, *more)

        return observe

    for module in (goldens, modes):
        monkeypatch.setattr(module, "observe", watch(module.observe))
    return seen


def call(capsys, *argv):
    """(exit code, output) as of a process; what would be a traceback is raised."""
    try:
        code = cli.guard(lambda: entry.main([*map(str, argv)]))
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def check(capsys, tmp_path, arrays, model=M1, *more):
    """`call` with these arrays as the recorded numbers of `model`."""
    np.savez(tmp_path / "numbers.npz", **arrays)
    return call(capsys, f"--hf={model}", f"--goldens={tmp_path / 'numbers.npz'}", f"--out={tmp_path / 'o.png'}", *more)


def recorded(*names):
    """Copies of arrays of m1_tiny; SEQUENCE cut to one sequence, and states that belong to one of that length."""
    a = numbers("m1_tiny")
    stored = int((a["positions"] < TOKENS).sum())
    cut = {
        "input_ids": a["input_ids"][:1, :TOKENS],
        "positions": a["positions"][:stored],
        "logprobs": a["logprobs"][:1, : TOKENS - 1],
        **{name: a[name][:1, :stored] for name in ("final_norm", "logits")},
        **{name: a[name][:, :1, :stored] for name in ("hidden", "router_weights")},
        **{name: a[name][:, :1, :TOKENS] for name in ("router_ids", "router_margin")},
    }
    if "states" in names:  # the first row of the padded batch has 48 tokens and no padding
        assert a["padded_attention_mask"][0].all()
        cut |= {"input_ids": a["padded_input_ids"][:1], "states": a["padded_states"][:, :1]}
    return {name: np.array((a | cut)[name]) for name in names}


INPUTS = {
    **dict.fromkeys(SEQUENCE, ("input_ids", "positions", *SEQUENCE)),
    "states": ("input_ids", "states"),
    **dict.fromkeys(
        ("padded_logits", "padded_states"),
        ("padded_input_ids", "padded_attention_mask", "padded_logits", "padded_states"),
    ),
    **dict.fromkeys(("greedy_ids", "greedy_logprobs"), ("greedy_prompt", "greedy_ids", "greedy_logprobs")),
    "loss": ("grad_input_ids", "loss"),
}
"""Array -> what is in the file when it is spoilt: all that the same forward passes are held against."""


def offender(said):
    """(where and what, path, error, tolerance, checks that are off) of the last line."""
    line = said.out.splitlines()[-1]
    found = re.fullmatch(r"first offender: (.*) by (.*): (\S+), tolerance (\S+); (\d+) of \d+ checks are off", line)
    assert found, line
    return found[1], found[2], float(found[3]), float(found[4]), int(found[5])


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_recorded_folder_passes_and_everything_is_listed(capsys, tmp_path, observed):
    """Of Llama: every array along every path, in float64, and the training forward in float32 as well."""
    folder, out = GOLDENS / "llama_tiny_tied", tmp_path / "new" / "out.png"
    code, said = call(capsys, f"--hf={folder}", f"--goldens={folder / 'goldens.npz'}", f"--out={out}")
    lines = said.out.splitlines()
    assert (code, said.err) == (0, "") and is_png(out)
    assert lines[0] == f"{folder}: 4 layers; {folder / 'goldens.npz'}: 13 arrays"
    assert lines[-2:] == [f"plot: {out}", "all 67 checks within tolerance"]
    paths = ("chunked", "packed", "decode", "chunked, float32")
    expected = [[path, name] for path in paths for name in ("hidden of 4 layers", "logits", "logprobs")]
    expected += [["chunked, padded", "padded_logits"], ["decode, padded", "padded_logits"]]
    expected += [["sampler", "greedy_ids"], ["sampler", "greedy_logprobs"]]
    expected += [["training", "loss"], ["training", "gradients of 38 weights"]]
    layers = [line.split()[:2] for line in lines if line.startswith("    layer ")]
    assert layers == [["layer", str(i)] for i in range(4)]
    assert "    chunked: correlation of token probabilities (logprobs) 1.000000" in lines
    lines = [line for line in lines if not line.startswith("    ")]
    assert [re.split(r"\s{2,}", line)[:3] for line in lines[1:-2]] == [["ok", *pair] for pair in expected]
    wide = [(path, "float64") for path in ("prefill", "packed", "decode")]
    assert observed == [*wide, ("prefill", "float32"), ("prefill", "float64"), ("decode", "float64")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m1_tiny", "qwen2_tiny"])
def test_other_recorded_folders_pass(name, capsys, tmp_path):
    """Whole: all kinds of arrays at full length, and the model whose float32 rounding comes nearest to a tolerance."""
    folder = GOLDENS / name
    code, said = call(capsys, f"--hf={folder}", f"--goldens={folder / 'goldens.npz'}", f"--out={tmp_path / 'o.png'}")
    assert code == 0 and re.search(r"all \d+ checks within tolerance\n$", said.out), said.out


@pytest.mark.parametrize(
    ("model", "weight", "layer"),
    [
        ("m1_tiny", "model.layers.3.self_attn.out_proj.weight", "layer 3 (lightning)"),
        ("m1_tiny", "model.layers.5.block_sparse_moe.gate.weight", "layer 5 (lightning)"),
        ("m1_tiny", "model.layers.7.self_attn.k_proj.weight", "layer 7 (softmax)"),
        ("llama_tiny_tied", "model.layers.1.mlp.down_proj.weight", "layer 1 (softmax)"),
    ],
)
def test_a_weight_that_is_one_per_cent_off_is_found_in_its_layer(model, weight, layer, capsys, tmp_path):
    """Everything after that layer is off too, and most of it by more; what is named is where it starts."""
    folder = shutil.copytree(GOLDENS / model, tmp_path / model, ignore=shutil.ignore_patterns("grads", "*.npz"))
    (file,) = (file for file in folder.glob("*.safetensors") if weight in load_file(file))
    tensors = load_file(file)
    save_file(tensors | {weight: tensors[weight] * np.float32(1.01)}, file)
    wanted = ("input_ids", "positions", *SEQUENCE)
    arrays = recorded(*wanted) if model == "m1_tiny" else {k: v for k, v in numbers(model).items() if k in wanted}
    code, said = check(capsys, tmp_path, arrays, folder)
    what, path, error, tolerance, count = offender(said)
    assert (code, what.rpartition(", ")[0], path) == (1, layer, "chunked") and error > tolerance and count > 3
    assert is_png(tmp_path / "o.png"), "where it starts is what the picture is for"


@pytest.mark.parametrize(
    ("name", "index", "amount", "where", "paths"),
    [
        # Three times the tolerance: float64 must see it along each path, float32, which may be ten times off, not.
        ("hidden", (5, 0, 20, 3), 3e-4, "layer 5 (lightning), ", 3),
        ("router_weights", (6, 0, 20, 0), 3e-4, "layer 6 (lightning), ", 3),
        ("final_norm", (0, 20, 3), 3e-4, "", 3),
        ("logits", (0, 20, 3), 3e-4, "", 3),
        ("logprobs", (0, 40), 3e-4, "", 3),
        ("states", (4, 0, 3, 5, 5), 3e-5, "layer 4 (lightning), ", 2),  # as a share; packed rows keep no states
        ("padded_logits", (1, 30, 3), 3e-4, "", 2),
        ("padded_states", (6, 2, 3, 5, 5), 3e-5, "layer 6 (lightning), ", 2),
        ("greedy_logprobs", (20,), 3e-4, "", 1),
        ("loss", (), 3e-5, "", 1),
        # No tolerance at all: one id.
        ("router_ids", (3, 0, 17), None, "layer 3 (lightning), ", 4),
        ("greedy_ids", (20,), None, "", 1),
    ],
)
def test_every_array_that_is_off_is_noticed(name, index, amount, where, paths, capsys, tmp_path):
    arrays = recorded(*INPUTS[name])
    if amount is None:
        if name == "router_ids":
            assert arrays["router_margin"][index] > goldens.TIE, "else it would be a tie"
        arrays[name][index] = (arrays[name][index] + 1) % 4
    else:
        scale = np.abs(arrays[name][index[0]]).max() if name.endswith("states") else 1.0
        arrays[name][index] += amount * scale
    code, said = check(capsys, tmp_path, arrays)
    what, _, error, tolerance, count = offender(said)
    assert (code, what, count) == (1, where + name, paths)
    assert error == (1 if amount is None else pytest.approx(amount, rel=0.2))
    assert tolerance == (0 if amount is None else pytest.approx(amount / 3))
    off = [line for line in said.out.splitlines() if line.startswith("OFF")]
    assert len(off) == paths and all(f" {name} " in line for line in off)


def test_a_gradient_that_is_off_is_noticed(capsys, tmp_path):
    """0.03% of one weight's gradient, at the tolerance of 0.01% of its norm."""
    name = "model.layers.2.mlp.up_proj.weight"
    folder = GOLDENS / "llama_tiny_tied"
    gradients = load_file(folder / "grads" / "grads.safetensors")
    save_file(gradients | {name: gradients[name] * np.float32(1.0003)}, tmp_path / "odd.safetensors")
    arrays = {key: numbers("llama_tiny_tied")[key] for key in ("grad_input_ids", "loss")}
    code, said = check(capsys, tmp_path, arrays, folder, f"--gradients={tmp_path / 'odd.safetensors'}")
    what, path, error, tolerance, count = offender(said)
    assert (code, what, path) == (1, f"layer 2 (softmax), gradient of {name}", "training")
    assert (error, tolerance, count) == (pytest.approx(3e-4, rel=0.1), 1e-4, 1)
    gradients[name][3, 5] = np.nan
    save_file(gradients, tmp_path / "odd.safetensors")
    code, said = check(capsys, tmp_path, arrays, folder, f"--gradients={tmp_path / 'odd.safetensors'}")
    assert code == 1 and offender(said)[0] == what and np.isnan(offender(said)[2])


@pytest.mark.parametrize(
    ("name", "change", "seen"),
    [
        ("input_ids", lambda x: np.roll(x, 1, axis=1), "hidden"),
        ("positions", lambda x: x + 1, "hidden"),
        ("padded_input_ids", lambda x: np.roll(x, 1, axis=0), "padded_logits"),
        ("padded_attention_mask", lambda x: x | 1, "padded_states"),
        ("greedy_prompt", lambda x: x[::-1], "greedy_ids"),
        ("grad_input_ids", lambda x: x[:, ::-1], "loss"),
    ],
)
def test_inputs_that_are_off_show_in_what_is_made_of_them(name, change, seen, capsys, tmp_path):
    arrays = recorded(*INPUTS[seen])
    arrays[name] = change(arrays[name])
    code, said = check(capsys, tmp_path, arrays)
    assert code == 1 and re.search(rf"^OFF .* {seen} ", said.out, re.MULTILINE), said.out


def test_not_a_number_is_off_and_padding_is_not(capsys, tmp_path):
    arrays = recorded(*INPUTS["padded_logits"])
    arrays["padded_logits"][1, 0] = np.nan  # the second row has 31 tokens, on the right
    assert check(capsys, tmp_path, arrays)[0] == 0
    arrays["padded_logits"][1, 30, 3] = np.nan
    code, said = check(capsys, tmp_path, arrays)
    what, _, error, _, _ = offender(said)
    assert (code, what) == (1, "padded_logits") and np.isnan(error)


def test_ties_in_the_routing_are_left_out_and_said(capsys, tmp_path):
    """A token that either expert could have had, and the later ones, are not held against us; earlier ones are."""
    arrays = recorded("input_ids", "positions", "hidden", "router_ids", "router_margin")
    arrays["router_ids"][2, 0, 30] = (arrays["router_ids"][2, 0, 30] + 1) % 4
    arrays["router_margin"][2, 0, 30] = 0
    arrays["hidden"][2:, 0, arrays["positions"] >= 30] += 1
    code, said = check(capsys, tmp_path, arrays)
    assert code == 0 and said.out.count("left out after ties in the routing") == 8, said.out
    arrays["hidden"][6, 0, 12, 0] += 3e-4
    code, said = check(capsys, tmp_path, arrays)
    assert code == 1 and offender(said)[0] == "layer 6 (lightning), hidden"


def test_numbers_of_which_nothing_is_compared_do_not_pass(capsys, tmp_path):
    arrays = recorded(*INPUTS["hidden"])
    arrays["router_ids"][0, 0, 0] = (arrays["router_ids"][0, 0, 0] + 1) % 4
    arrays["router_margin"][0, 0, 0] = 0
    arrays["hidden"] += 1
    arrays["logits"] *= -3
    assert check(capsys, tmp_path, arrays)[0] != 0


def test_unknown_arrays_are_named(capsys, tmp_path):
    unknown = {"attention_maps": np.zeros(3), "padded_logprobs": np.zeros(3)}
    told = [f"not checked: {name}: not an array that is known here" for name in unknown]
    code, said = check(capsys, tmp_path, recorded("greedy_prompt", "greedy_ids") | unknown)
    assert code == 0 and [line for line in said.out.splitlines() if line.startswith("not checked")] == told
    code, said = check(capsys, tmp_path, unknown)
    assert code == 2 and set(told) < set(said.out.splitlines())
    assert (
        said.err == f"error: {tmp_path / 'numbers.npz'}: nothing in it could be checked; it has {', '.join(unknown)}\n"
    )


def test_arrays_without_their_inputs_are_named(capsys, tmp_path):
    outputs = ("hidden", "padded_logits", "greedy_ids", "loss")
    code, said = check(capsys, tmp_path, recorded(*outputs), M1, f"--gradients={M1 / 'grads' / 'grads.safetensors'}")
    assert code == 2 and "nothing in it could be checked" in said.err
    assert said.out.splitlines()[1:] == [
        "not checked: hidden: needs input_ids",
        "not checked: padded_logits: needs padded_input_ids and padded_attention_mask",
        "not checked: greedy_ids: needs greedy_prompt",
        "not checked: loss: needs grad_input_ids",
        "not checked: grads.safetensors: needs grad_input_ids",
    ]


def assert_refused(capsys, tmp_path, arrays, changes, message):
    """Recorded arrays, some of them changed, are refused in one line that names the file."""
    arrays = arrays | {name: change(arrays[name]) for name, change in changes.items()}
    code, said = check(capsys, tmp_path, arrays)
    assert (code, said.err.count("\n")) == (2, 1), said.err
    assert said.err.startswith(f"error: {tmp_path / 'numbers.npz'}: {message}"), said.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": lambda x: x[:5]}, "hidden has shape (5, 1, 25, 40), expected (8, 1, 25, 40) or (8, 1, 48, 40)"),
        ({"hidden": lambda x: x[..., :7]}, "hidden has shape (8, 1, 25, 7), expected (8, 1, 25, 40) or (8, 1, 48, 40)"),
        ({"logits": lambda x: x[:, :7]}, "logits has shape (1, 7, 256), expected (1, 25, 256) or (1, 48, 256)"),
        ({"logprobs": lambda x: x[0]}, "logprobs has shape (47,), expected (1, 47)"),
        ({"router_ids": lambda x: x[..., :1]}, "router_ids has shape (8, 1, 48, 1), expected (8, 1, 48, 2)"),
        ({"positions": lambda x: x + 40}, "positions run from 40 to 72, input_ids has 48 tokens"),
        ({"positions": lambda x: x - 1}, "positions run from -1 to 31, input_ids has 48 tokens"),
        ({"positions": lambda x: x[None]}, "positions has shape (1, 25), expected (positions,)"),
        ({"input_ids": lambda x: x[0]}, "input_ids has shape (48,), expected (rows, tokens) with at least one token"),
        ({"input_ids": lambda x: x[:, :0]}, "input_ids has shape (1, 0), expected (rows, tokens) with at least one"),
        ({"input_ids": lambda x: x - 300}, "input_ids holds the id -"),
        ({"input_ids": lambda x: x * 0.5}, "input_ids holds float64, expected integers"),
        ({"hidden": lambda x: x.astype(str)}, "hidden holds <U"),
        ({"input_ids": lambda x: x * 0 + 256}, "input_ids holds the id 256, expected ids from 0 to 255"),
        ({"hidden": lambda x: x[0, 0, 0, 0]}, "hidden has shape (), expected (8, "),
        ({"logits": lambda x: x[0, 0]}, "logits has shape (256,), expected (1, "),
        ({"router_margin": lambda x: x[..., :5]}, "router_margin has shape (8, 1, 5), expected (8, 1, 48)"),
    ],
)
def test_a_wrong_shape_is_one_line(changes, message, capsys, tmp_path):
    arrays = recorded("input_ids", "positions", *SEQUENCE)
    assert_refused(capsys, tmp_path, arrays, changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padded_logits": lambda x: x[:, :7]}, "padded_logits has shape (3, 7, 256), expected (3, 48, 256)"),
        ({"padded_states": lambda x: x[:3]}, "padded_states has shape (3, 3, 4, 16, 16), expected (7, 3, 4, 16, 16)"),
        ({"padded_attention_mask": lambda x: x[:, :7]}, "padded_attention_mask has shape (3, 7), expected (3, 48)"),
        ({"padded_attention_mask": lambda x: x * 0}, "padded_attention_mask: expected 1 at tokens"),
        ({"padded_attention_mask": lambda x: x * 2}, "padded_attention_mask: expected 1 at tokens"),
    ],
)
def test_a_wrong_padded_batch_is_one_line(changes, message, capsys, tmp_path):
    arrays = recorded(*INPUTS["padded_logits"])
    assert_refused(capsys, tmp_path, arrays, changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"greedy_ids": lambda x: x[None]}, "greedy_ids has shape (1, 32), expected at least one: (tokens,)"),
        ({"greedy_ids": lambda x: x[:0]}, "greedy_ids has shape (0,), expected at least one: (tokens,)"),
        ({"greedy_logprobs": lambda x: x[:5]}, "greedy_logprobs has shape (5,), expected (32,) as greedy_ids has"),
        ({"greedy_prompt": lambda x: x[:0]}, "greedy_prompt has shape (0,), expected (tokens,) with at least one"),
        ({"greedy_prompt": lambda x: x[None]}, "greedy_prompt has shape (1, 100), expected (tokens,)"),
        ({"grad_input_ids": lambda x: x[0]}, "grad_input_ids has shape (128,), expected (rows, tokens)"),
        ({"grad_input_ids": lambda x: x[:, :1]}, "grad_input_ids: expected rows of at least 2 tokens"),
        ({"grad_input_ids": lambda x: x + 256}, "grad_input_ids holds the id "),
        ({"loss": lambda x: x[None]}, "loss has shape (1,), expected ()"),
    ],
)
def test_a_wrong_continuation_or_loss_is_one_line(changes, message, capsys, tmp_path):
    arrays = recorded(*INPUTS["greedy_ids"], *INPUTS["loss"])
    arrays |= {name: change(arrays[name]) for name, change in changes.items()}
    code, said = check(capsys, tmp_path, arrays)
    assert (code, said.err.count("\n")) == (2, 1), said.err
    assert said.err.startswith(f"error: {tmp_path / 'numbers.npz'}: {message}"), said.err


def test_arrays_without_values_are_not_checked(capsys, tmp_path):
    """No positions are stored: nothing passes; beside something that was compared they are named."""
    arrays = recorded("input_ids", "positions", "logits", "hidden")
    arrays |= {"positions": arrays["positions"][:0], "logits": arrays["logits"][:, :0]}
    arrays["hidden"] = arrays["hidden"][:, :, :0]
    code, said = check(capsys, tmp_path, arrays)
    assert code == 2 and "nothing in it could be checked" in said.err
    assert "not checked: logits by packed: nothing is left to compare, it holds no values" in said.out.splitlines()
    code, said = check(capsys, tmp_path, arrays | recorded("logprobs"))
    assert code == 0 and said.out.endswith("\nall 4 checks within tolerance; nothing was left of hidden, logits\n")


def test_a_tie_hides_no_wrong_choice_beside_it(capsys, tmp_path):
    arrays = recorded("input_ids", "router_ids", "router_margin")
    arrays["router_ids"][0, 0] = (arrays["router_ids"][0, 0] + 1) % 4
    arrays["router_margin"][0, 0, 0] = 0
    code, said = check(capsys, tmp_path, arrays)
    assert code == 1 and offender(said)[0] == "layer 0 (lightning), router_ids"


def test_what_the_model_has_not_is_named(capsys, tmp_path):
    """Choices of experts for a dense model; a margin without the choices it belongs to."""
    llama = {"input_ids": numbers("llama_tiny_tied")["input_ids"], "logits": numbers("llama_tiny_tied")["logits"]}
    routed = recorded("router_ids", "router_weights", "router_margin", "states")
    code, said = check(capsys, tmp_path, llama | routed, GOLDENS / "llama_tiny_tied")
    told = {f"not checked: {name}: the model routes nothing" for name in routed if name != "states"}
    assert code == 0 and told | {"not checked: states: the model has no lightning layers"} < set(said.out.splitlines())
    code, said = check(capsys, tmp_path, recorded("input_ids", "positions", "logprobs", "router_margin"))
    assert code == 0 and "not checked: router_margin: needs router_ids" in said.out.splitlines()


def test_the_tolerance_of_hidden_states_grows_with_the_activations():
    """A last layer of thousands in float32 is rounded by more than 1e-4; the base stays for small ones."""
    shape = (1, 1, 4, 2)
    decoder = dataclasses.replace(config("llama_tiny_tied"), num_layers=1)
    for largest, tolerance in ((10.0, 1e-4), (1000.0, 5e-3)):
        hidden = np.full(shape, largest)
        ours = Observation(hidden, None, None, None, None)
        arrays = {"input_ids": np.zeros((1, 4), int), "hidden": hidden + 0.9 * tolerance}
        (found,) = goldens._sequence_checks(ours, arrays, decoder, "chunked")
        assert found.ok and found.tolerance == pytest.approx(tolerance, rel=0.01)
        arrays["hidden"][0, 0, 2, 1] = np.inf
        assert not goldens._sequence_checks(ours, arrays, decoder, "chunked")[0].ok


def test_the_table_by_layer_shows_relative_errors(capsys, tmp_path):
    arrays = recorded("input_ids", "positions", "hidden", "logits")
    arrays["hidden"][5, 0, 20, 3] += 0.1 * np.abs(arrays["hidden"][5]).max()
    arrays["logits"] = arrays["logits"][:, ::-1]
    code, said = check(capsys, tmp_path, arrays)
    rows = [line.split() for line in said.out.splitlines() if line.startswith("    layer ")]
    errors, largest = ([float(row[i]) for row in rows] for i in (3, 4))
    assert code == 1 and len(rows) == 8 and max(errors[:5] + errors[6:]) < 1e-5 < 0.05 < errors[5] < 0.11
    assert largest[0] == pytest.approx(np.abs(arrays["hidden"][0]).max(), rel=0.01)
    (line,) = (line for line in said.out.splitlines() if line.startswith("    chunked: correlation of token"))
    assert "(logits)" in line and float(line.split()[-1]) < 0.9


def test_a_folder_of_half_precision_is_read_wide(capsys, tmp_path):
    """Float16 and a mixture of dtypes, which are stored nowhere else here."""
    folder = shutil.copytree(
        GOLDENS / "llama_tiny_tied", tmp_path / "m", ignore=shutil.ignore_patterns("grads", "*.npz")
    )
    tensors = load_file(folder / "model.safetensors")
    half = {name: x.astype(np.float16) if i % 2 else x for i, (name, x) in enumerate(tensors.items())}
    save_file(half, folder / "model.safetensors")
    arrays = {name: numbers("llama_tiny_tied")[name] for name in ("input_ids", "logprobs")}
    code, said = check(capsys, tmp_path, arrays, folder)
    assert code == 1 and 1e-4 < offender(said)[2] < 0.1, said


def damaged(path: Path, kind: str) -> Path:
    """A file of numbers that cannot be read."""
    whole = (GOLDENS / "m1_tiny_bf16" / "goldens.npz").read_bytes()
    if kind == "objects":
        np.savez(path, input_ids=np.array([1, None], object))
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, np.arange(4))
    elif kind == "a folder":
        path.mkdir()
    elif kind != "not there":
        half = len(whole) // 2
        flipped = whole[:half] + bytes(byte ^ 255 for byte in whole[half : half + 64]) + whole[half + 64 :]
        path.write_bytes({"text": b"numbers", "empty": b"", "cut short": whole[:-100], "flipped": flipped}[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not there", "no such file"),
        ("text", "not an .npz file of arrays ("),
        ("objects", "not an .npz file of arrays ("),
        ("a folder", "not an .npz file of arrays ("),
        ("one array", "not an .npz file of arrays"),
        ("empty", "not an .npz file of arrays"),
        ("cut short", "not an .npz file of arrays"),
        ("flipped", "not an .npz file of arrays"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(kind, message, capsys, tmp_path):
    path = damaged(tmp_path / "numbers.npz", kind)
    code, said = call(capsys, f"--hf={M1}", f"--goldens={path}", f"--out={tmp_path / 'o.png'}")
    assert (code, said.err.count("\n")) == (2, 1) and said.err.startswith(f"error: {path}: {message}"), said.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda g: {"model.norm.weight": g["model.norm.weight"]},
            "lm_head.weight is missing (154 such names); expected one gradient for every weight",
        ),
        (lambda g: g | {"odd": g["lm_head.weight"]}, "odd is of no weight of the model (1 such names)"),
        (
            lambda g: g | {"lm_head.weight": g["lm_head.weight"][:5]},
            "lm_head.weight has shape (5, 40), expected (256, 40)",
        ),
        (lambda g: None, "not a safetensors file, or a damaged one ("),
    ],
)
def test_gradients_that_are_not_the_models(change, message, capsys, tmp_path):
    file = tmp_path / "g.safetensors"
    changed = change(load_file(M1 / "grads" / "grads.safetensors"))
    if changed is None:
        file.write_bytes((M1 / "grads" / "grads.safetensors").read_bytes()[:-100])
    else:
        save_file(changed, file)
    code, said = check(capsys, tmp_path, recorded(*INPUTS["loss"]), M1, f"--gradients={file}")
    assert (code, said.err.count("\n")) == (2, 1) and said.err.startswith(f"error: {file}: {message}"), said.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --hf=PATH, or --random=NAME for random weights"),
        ([f"--hf={M1}", "--random=tiny"], "give --hf=PATH, or --random=NAME for random weights"),
        (["--random=tiny", "--goldens=x.npz"], "--goldens: recorded numbers need the weights that made them"),
        ([f"--hf={M1}", f"--goldens={M1 / 'goldens.npz'}", "--gradients=x"], "x: no such file"),
        ([f"--hf={M1}", "--tokens=1"], "--rows=2 --tokens=1: at least 1 row of 2 tokens"),
        (["--hf=nothing"], "nothing: no such folder"),
        (["--random=huge"], "--random: 'huge' is not in configs/models.py"),
        ([f"--hf={GOLDENS / 'llama_tiny_tied'}", "--head_gain=2"], "--head_gain: the head of this model is its embedd"),
        ([f"--hf={M1}", "--gradients=x"], "--gradients: they belong to recorded numbers; give --goldens=FILE.npz too"),
        (["--random=tiny", "--seed=-1"], "--seed=-1: expected a number from 0 to "),
        (["--random=tiny", "--head_gain=nan"], "--head_gain=nan: expected a finite number"),
        ([f"--hf={M1}", f"--out={GOLDENS}"], f"--out={GOLDENS}: is a folder; give the name of a file"),
        ([f"--hf={M1}", f"--out={__file__}/x.png"], f"--out={__file__}/x.png: cannot be written"),
        *(
            ([f"--hf={M1}", "--goldens=x.npz", f"--{name}=2"], f"--{name}: is of two modes of one model")
            for name in ("rows", "tokens", "seed", "head_gain")
        ),
        (["--golden=x"], "unrecognized arguments: --golden=x"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(argv, message, capsys):
    code, said = call(capsys, *argv)
    assert (code, said.err.count("\n")) == (2, 1) and said.err.startswith(f"error: {message}"), said.err


def table(out):
    """{pair: {row: numbers}} of what a comparison of modes printed."""
    pairs = {}
    for part in out.split("\n\n"):
        name, *rows = part.strip("\n").split("\n")
        found = [re.fullmatch(r"  (\S.*?)  +(\S.*)", row) for row in rows[1:]]
        pairs[name] = {
            row[1]: [float(x) for x in re.findall(r"\d+\.\d+(?:e[+-]\d+)?|\d+(?= *$)", row[2])] for row in found if row
        }
        pairs[name]["culprit"] = rows[-1].split(" the ")[-1] if rows else ""
    return pairs


EXACT, ROUNDED, TRUTH = (
    "chunked against decode, float32",
    "chunked against decode, bfloat16",
    "bfloat16 against float32, chunked",
)


def test_modes_show_rounding_and_a_loud_channel_shows_in_the_bfloat16_head(capsys, tmp_path, monkeypatch, observed):
    """Float32 paths agree to its rounding (2^-24 = 6e-8 a step), bfloat16 ones to theirs (2^-9 = 2e-3 a step).

    A channel that is 1000 times louder adds a thousand times as much to all logits alike, and a bfloat16 head, which
    rounds the sum, loses what tells the tokens apart; a float32 head does not.
    """
    argv = [f"--hf={GOLDENS / 'm1_kernel'}", "--rows=2", "--tokens=24", f"--out={tmp_path / 'o.png'}"]
    heads, real = [], modes.logits

    def watched(params, x, dtype):
        heads.append((str(params["embedding"].dtype), dtype))
        return real(params, x, dtype)

    monkeypatch.setattr(modes, "logits", watched)
    code, said = call(capsys, *argv)
    plain = table(said.out)
    assert code == 0 and is_png(tmp_path / "o.png") and said.out.endswith(f"\nplot: {tmp_path / 'o.png'}\n")
    assert set(observed) == {(p, d) for p in ("chunked", "decode") for d in ("float32", "bfloat16")}
    # Weights and head of either side: the two have the same head, but float32 as the truth keeps its own.
    f, b = "float32", "bfloat16"
    expected = [[(w, h)] * 2 for w in (f, b) for h in (f, b)] + [[(b, f), (f, f)], [(b, b), (f, f)]]
    assert heads == [side for pair in expected for side in pair]
    places = ["layer 0 (lightning)", "layer 1 (softmax)", "head's input"]
    for name in (EXACT, ROUNDED, TRUTH):
        assert list(plain[name]) == [*places, "float32 head", "bfloat16 head", "culprit"], name
        # Between two float32 paths the head may be either: one flip of a bfloat16 rounding outweighs all other gaps.
        assert name == EXACT or plain[name]["culprit"] == "layers"
    assert all(plain[EXACT][place][0] < 2e-6 for place in places)
    assert all(5e-4 < plain[name]["head's input"][0] < 0.2 for name in (ROUNDED, TRUTH))
    assert plain[EXACT]["float32 head"][0] == 1 and plain[EXACT]["float32 head"][2] < 1e-5
    assert plain[TRUTH]["float32 head"][0] > 0.99

    code, said = call(capsys, *argv, "--head_gain=1000")
    loud = table(said.out)
    assert code == 0
    assert loud[EXACT]["head's input"][1] > 100 * plain[EXACT]["head's input"][1]
    for name in (ROUNDED, TRUTH):
        exact, rounded = loud[name]["float32 head"], loud[name]["bfloat16 head"]
        assert exact[0] > 0.99 and 1 - rounded[0] > 3 * (1 - exact[0]) and rounded[1] > 2 * exact[1]
        assert loud[name]["culprit"] == "head in bfloat16"


def test_outputs_that_are_not_finite_are_not_compared(capsys, tmp_path):
    folder = shutil.copytree(GOLDENS / "m1_kernel", tmp_path / "m", ignore=shutil.ignore_patterns("*.npz"))
    weight = "model.layers.1.self_attn.o_proj.weight"
    (file,) = (file for file in folder.glob("*.safetensors") if weight in load_file(file))
    tensors = load_file(file)
    save_file(tensors | {weight: tensors[weight] * np.float32(np.nan)}, file)
    code, said = call(capsys, f"--hf={folder}", "--rows=2", "--tokens=24", f"--out={tmp_path / 'o.png'}")
    assert (code, said.err.count("\n")) == (2, 1) and not (tmp_path / "o.png").exists()
    assert re.search(r"^error: \w+, \w+: the output of layer 1 \(softmax\) is not finite", said.err), said.err


def test_correlation():
    rng = np.random.default_rng(0)
    p = rng.random(50)
    assert goldens.pearson(p, 2 * p + 1) == pytest.approx(1) and goldens.pearson(p, -p) == pytest.approx(-1)
    assert abs(goldens.pearson(p, rng.random(50))) < 0.5
    for odd in (np.full(50, np.nan), np.full(50, 0.3), np.where(p < 0.5, p, np.nan)):
        assert np.isnan(goldens.pearson(p, odd)) and np.isnan(goldens.pearson(odd, p))


@pytest.mark.slow
def test_random_weights_take_a_name_and_a_seed(capsys, tmp_path, monkeypatch):
    """On given tokens, so that it is the weights that differ; the tokens have the same seed."""
    seeds = []

    def tokens(params, config, rows, length, seed):
        seeds.append(seed)
        return np.arange(rows * length).reshape(rows, length)

    monkeypatch.setattr(modes, "sampled_tokens", tokens)
    monkeypatch.setattr(cli, "named_model", lambda name, flag: {"small": config("m1_kernel")}[name])
    argv = ["--random=small", "--rows=2", "--tokens=24", f"--out={tmp_path / 'o.png'}"]
    outputs = [call(capsys, *argv, f"--seed={seed}")[1].out for seed in (0, 0, 1)]
    assert outputs[0] == outputs[1] != outputs[2] and seeds == [0, 0, 1]


def test_a_loud_channel_changes_no_probability_in_exact_arithmetic():
    rng = np.random.default_rng(0)
    head_DV, scale_D, x_TD = rng.normal(size=(6, 11)), rng.normal(size=6), rng.normal(size=(5, 6))
    params = {"head": jnp.asarray(head_DV), "norm_final": {"scale": jnp.asarray(scale_D)}}

    def probabilities(gain):
        loud = modes.with_loud_channel(params, gain)
        logits_TV = (x_TD * np.asarray(loud["norm_final"]["scale"], np.float64)) @ np.asarray(loud["head"], np.float64)
        weights_TV = np.exp(logits_TV - logits_TV.max(-1, keepdims=True))
        return weights_TV / weights_TV.sum(-1, keepdims=True), np.abs(logits_TV).max()

    quiet, small = probabilities(1.0)
    same, large = probabilities(1000.0)
    np.testing.assert_allclose(same, quiet, rtol=1e-9)
    assert large > 100 * small and quiet.std() > 0.01
