"""Conversion in both directions: nothing changes on the way, a failure leaves nothing behind."""

import errno
import gc
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from m1jax.config import to_dict
from m1jax.data.tokenizer import load_tokenizer
from m1jax.errors import UserError
from m1jax.model import transformer
from m1jax.rl.loop import train
from m1jax.train import convert as convert_module
from m1jax.train.checkpoint import Checkpoints, restore_params
from m1jax.train.convert import convert
from m1jax.train.pretrained import differences, find_pretrained, init_params
from m1jax.weights.hf_folder import HFFolder
from m1jax.weights.load import load_params
from tests import runs
from tests.model.golden import GOLDENS, NAMES, config

ROOT = Path(__file__).parents[2]


def quiet(_):
    pass


def tensors(folder):
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_bits(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name, tmp_path):
    convert(GOLDENS / name, tmp_path / "ours", log=quiet)
    convert(tmp_path / "ours", tmp_path / "theirs", log=quiet)
    assert_same_bits(GOLDENS / name, tmp_path / "theirs")
    read = lambda folder: json.loads((folder / "config.json").read_text())  # noqa: E731
    assert read(tmp_path / "theirs") == read(GOLDENS / name)
    assert (tmp_path / "theirs" / "generation_config.json").is_file()
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]


def test_converted_checkpoint_is_what_loading_gives(tmp_path):
    convert(GOLDENS / "m1_tiny", tmp_path / "ours", log=quiet)
    params, meta = restore_params(tmp_path / "ours")
    model = find_pretrained(GOLDENS / "m1_tiny")
    assert model.source is not None
    jax.tree.map(np.testing.assert_array_equal, params, load_params(model.source, model.config))
    assert meta["step"] == 0
    assert find_pretrained(tmp_path / "ours").config == model.config


def test_dtype_converts_all_but_the_gates(tmp_path):
    convert(GOLDENS / "m1_tiny", tmp_path / "ours", "bfloat16", log=quiet)
    convert(tmp_path / "ours", tmp_path / "theirs", log=quiet)
    assert_same_bits(GOLDENS / "m1_tiny_bf16", tmp_path / "theirs")
    convert(tmp_path / "ours", tmp_path / "wide", "float32", log=quiet)
    wide = tensors(tmp_path / "wide")
    for name, value in tensors(GOLDENS / "m1_tiny_bf16").items():
        np.testing.assert_array_equal(wide[name], np.asarray(value, np.float32))


def test_a_checkpoint_in_the_middle_of_a_run(tmp_path):
    """Parameters, optimizer and all, saved by a run that goes on: the newest checkpoint's parameters come out."""
    model = config()
    params = transformer.init(jax.random.key(3), model)
    meta = {"step": 7, "config": {"model": to_dict(model), "tokenizer": {"path": "", "stop_tokens": []}}}
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2, log=quiet) as checkpoints:
        for step, factor in ((6, 0.0), (7, 1.0)):
            scaled = jax.tree.map(lambda x, f=factor: x * f, params)
            checkpoints.save(step, {"params": scaled, "opt_state": {"count": np.int32(3)}}, meta | {"step": step})
    said = []
    convert(tmp_path / "run", tmp_path / "theirs", log=said.append)
    source = find_pretrained(tmp_path / "theirs")
    assert source.source is not None and differences(source.config, model) == []
    jax.tree.map(np.testing.assert_array_equal, load_params(source.source, model), params)
    values = json.loads((tmp_path / "theirs" / "generation_config.json").read_text())
    assert (values["eos_token_id"], values["bos_token_id"], values["temperature"]) == (2, 1, 1.0)
    assert "no tokenizer file to copy" in said[-1]
    convert(tmp_path / "run" / "checkpoints" / "00000006", tmp_path / "zeros", log=quiet)
    assert not any(value.any() for value in tensors(tmp_path / "zeros").values())


def test_files_beside_the_weights_travel(tmp_path):
    source = shutil.copytree(GOLDENS / "qwen2_tiny", tmp_path / "source", ignore=shutil.ignore_patterns("grads"))
    shutil.copy(ROOT / "configs" / "tokenizers" / "reasoning_512.json", source / "tokenizer.json")
    (source / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    convert(source, tmp_path / "ours", log=quiet)
    assert find_pretrained(tmp_path / "ours").tokenizer == str(tmp_path / "ours" / "huggingface" / "tokenizer.json")
    convert(tmp_path / "ours", tmp_path / "theirs", log=quiet)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "theirs" / name).read_text() == (source / name).read_text()


def test_progress_counts_every_byte(tmp_path):
    totals, done = [], []

    def progress(total):
        totals.append(total)
        return done.append

    convert(GOLDENS / "m1_tiny", tmp_path / "ours", log=quiet, progress=progress)
    assert totals == [849_312] == [sum(done)] and len(done) == 155


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(UserError, match="full: exists already"):
        convert(GOLDENS / "m1_tiny", tmp_path / "full", log=quiet)
    assert (tmp_path / "full" / "mine").read_text() == "mine"


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_failure_leaves_no_half_folder(direction, tmp_path, monkeypatch):
    source = GOLDENS / "m1_tiny"
    if direction == "out":
        source = convert(source, tmp_path / "ours", log=quiet)
    seen = []

    def stop_halfway(done):
        seen.append(done)
        if len(seen) == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", log=quiet, progress=lambda total: stop_halfway)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["ours"] if direction == "out" else [])


def test_leftovers_of_a_killed_conversion_go_with_the_next(tmp_path):
    """SIGKILL leaves no time to clean up; the name never appears, and the next conversion starts afresh."""
    child = (
        "import os, signal, sys\n"
        "from m1jax.train.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2], progress=lambda total: lambda done: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    command = [sys.executable, "-c", child, str(GOLDENS / "m1_tiny"), str(tmp_path / "ours")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == [".ours.converting"]
    convert(GOLDENS / "m1_tiny", tmp_path / "ours", log=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_tensors_pass_one_at_a_time(tmp_path, monkeypatch):
    """A leaf of seven layers is written in seven reads, and no tensor is read before the writer has the one before."""
    order = []
    real_read = convert_module.HFTensor.to_ours

    def watched(self, array):
        order.append("read")
        return real_read(self, array)

    monkeypatch.setattr(convert_module.HFTensor, "to_ours", watched)
    convert(GOLDENS / "m1_tiny", tmp_path / "ours", log=quiet, progress=lambda total: lambda done: order.append("done"))
    assert order == ["read", "done"] * 155


def test_init_from_any_form_and_no_other_network(tmp_path):
    wanted = config()
    convert(GOLDENS / "m1_tiny", tmp_path / "ours", log=quiet)
    straight, _ = init_params(str(GOLDENS / "m1_tiny"), wanted)
    converted, meta = init_params(str(tmp_path / "ours"), replace(wanted, remat="layer", dtype="bfloat16"))
    jax.tree.map(np.testing.assert_array_equal, straight, converted)
    assert meta["step"] == 0
    with pytest.raises(UserError, match=r"rope_theta is 10000000.0 there and 10000.0 in config.model"):
        init_params(str(tmp_path / "ours"), replace(wanted, rope_theta=1e4))
    with pytest.raises(UserError, match="no such folder; give a Hugging Face folder"):
        find_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("written", [True, False])
def test_no_bound_on_positions_is_not_exported_as_zero(written, tmp_path):
    """With the config.json that came with the weights, and with one that is written anew."""
    source = shutil.copytree(GOLDENS / "qwen2_tiny", tmp_path / "source", ignore=shutil.ignore_patterns("grads"))
    values = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 0}
    (source / "config.json").write_text(json.dumps(values))
    convert(source, tmp_path / "ours", log=quiet)
    if written:
        shutil.rmtree(tmp_path / "ours" / "huggingface")
    said = []
    convert(tmp_path / "ours", tmp_path / "open", log=said.append)
    assert any("no max_position_embeddings in config.json; --max_positions=N" in line for line in said)
    convert(tmp_path / "ours", tmp_path / "bound", log=quiet, max_positions=77)
    read = lambda name: json.loads((tmp_path / name / "config.json").read_text())  # noqa: E731
    assert "max_position_embeddings" not in read("open") and read("bound")["max_position_embeddings"] == 77
    assert find_pretrained(tmp_path / "open").config.max_positions == 0
    with pytest.raises(UserError, match="--max_positions: only for an export"):
        convert(source, tmp_path / "never", log=quiet, max_positions=77)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from the array writer's event loop
@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_full_disk_takes_one_line_and_leaves_nothing(direction, tmp_path):
    source = GOLDENS / "m1_tiny"
    if direction == "out":
        source = convert(source, tmp_path / "ours", log=quiet)

    def full(done):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="target: no space left; nothing was written, make room for 849,312 bytes"):
        convert(source, tmp_path / "target", log=quiet, progress=lambda total: full)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"] * (direction == "out")
    gc.collect()  # what the writer left half done speaks up here and not in another test


def test_a_run_and_its_export_know_their_tokenizer_and_form_from_anywhere(tmp_path, monkeypatch):
    """The tokenizer that the config names is gone, as it is for whoever stands in another working directory."""
    (tmp_path / "form.jinja").write_text("{{ bos_token }}={{ messages[-1]['content'] }}")
    form = {"chat_template": str(tmp_path / "form.jinja"), "stop_tokens": ["</answer>", "<eos>"]}
    settings = runs.rl_config(tmp_path, tokenizer={"path": runs.tokenizer(tmp_path), **form}, steps=0)
    train(settings, tmp_path / "run", engine=runs.ScriptedEngine(), log=quiet)
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.chdir(tmp_path / "run")
    exported = convert(tmp_path / "run", tmp_path / "out", log=quiet)
    for found in (find_pretrained(tmp_path / "run"), find_pretrained(exported)):
        assert found.tokenizer is not None
        tokenizer = load_tokenizer(found.tokenizer)
        assert tokenizer.chat_template == "{{ bos_token }}={{ messages[-1]['content'] }}"
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [6, 2]


def test_a_checkpoint_is_loaded_in_the_dtype_and_onto_the_devices_asked_for(tmp_path):
    """From a run's checkpoint, whose leaves are whole, and from a converted one, whose leaves lie in pieces."""
    convert(GOLDENS / "m1_tiny", tmp_path / "ours", log=quiet)
    source = load_params(HFFolder(GOLDENS / "m1_tiny"), config())
    with Checkpoints(tmp_path / "saved") as checkpoints:
        checkpoints.save(0, {"params": source}, {"config": {"model": to_dict(config())}}, wait=True)
    for name in ("ours", "saved"):
        model, done = find_pretrained(tmp_path / name), []
        bfloat16 = replace(model, config=replace(model.config, param_dtype="bfloat16"))
        loaded = bfloat16.load(jax.sharding.SingleDeviceSharding(jax.devices()[0]), done.append)
        assert sum(done) == sum(x.nbytes for x in jax.tree.leaves(loaded))
        assert loaded["embedding"].dtype == "bfloat16" and "float32" in {str(x.dtype) for x in jax.tree.leaves(loaded)}
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)), loaded, source)


def test_a_checkpoint_of_another_shape_than_its_config_is_refused(tmp_path):
    values = to_dict(replace(config(), vocab_size=77))
    with Checkpoints(tmp_path / "saved") as checkpoints:
        params = load_params(HFFolder(GOLDENS / "m1_tiny"), config())
        checkpoints.save(0, {"params": params}, {"config": {"model": values}}, wait=True)
    with pytest.raises(
        UserError, match=r"embedding is \(\d+, \d+\) there and \(77, \d+\) by the config.model beside it"
    ):
        find_pretrained(tmp_path / "saved")
