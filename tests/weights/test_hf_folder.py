"""Hugging Face folders: what is in them is checked before it is read, and comes back bit for bit."""

import json
import shutil
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from m1jax.errors import UserError
from m1jax.model import transformer
from m1jax.train.pretrained import find_pretrained
from m1jax.weights.hf_config import from_hf
from m1jax.weights.hf_folder import HFFolder, check_index, hf_bytes, write_hf
from m1jax.weights.hf_names import hf_tensors, leaf_shapes, unflatten
from m1jax.weights.load import load_params
from tests.model.golden import GOLDENS, NAMES

SHARDS = "model-{:05d}-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of m1_tiny that a test may spoil."""
    return shutil.copytree(GOLDENS / "m1_tiny", tmp_path / "m1", ignore=shutil.ignore_patterns("grads", "*.npz"))


def spoil(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def reindex(folder):
    index = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_the_files_and_of_our_tree(name):
    config = HFFolder(GOLDENS / name).config
    stored = {}
    for file in (GOLDENS / name).glob("*.safetensors"):
        stored |= {key: value.shape for key, value in load_file(file).items()}
    assert {t.name: t.shape for t in hf_tensors(config)} == stored
    ours = unflatten({leaf: jax.ShapeDtypeStruct(*entry) for leaf, entry in leaf_shapes(config).items()})
    assert ours == jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_comes_back_bit_for_bit(name, tmp_path):
    source = HFFolder(GOLDENS / name)
    params = load_params(source, source.config)

    def read(tensor):
        leaf = params
        for key in tensor.leaf:
            leaf = leaf[key]
        return tensor.to_theirs(np.asarray(leaf[tensor.index]))

    write_hf(tmp_path / "out", source.config, source.values, read, shard_bytes=200_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = HFFolder(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == hf_bytes(hf_tensors(source.config), source.config.param_dtype)
    for tensor in hf_tensors(source.config):
        before, after = source.read(tensor.name), again.read(tensor.name)
        assert before.dtype == after.dtype and before.tobytes() == after.tobytes(), tensor.name


def test_bfloat16_keeps_its_float32_gates():
    source = HFFolder(GOLDENS / "m1_tiny_bf16")
    params = load_params(source, source.config)
    run = params["periods"]["0_lightning"]
    assert run["mlp"]["router"].dtype == np.float32 and run["mlp"]["gate"].dtype == ml_dtypes.bfloat16
    wide = HFFolder(GOLDENS / "m1_tiny_bf16", dtype="float32")
    assert wide.config.param_dtype == "float32"
    widened = load_params(wide, wide.config)["embedding"]
    np.testing.assert_array_equal(widened, np.asarray(params["embedding"], np.float32))


def test_qkv_rows_are_blocks_of_heads():
    """Row h * 3 * d + part * d + j of qkv_proj is channel j of q, k or v of head h: model.layers.2 of m1_tiny."""
    source = HFFolder(GOLDENS / "m1_tiny")
    matrix = source.read("model.layers.2.self_attn.qkv_proj.weight")
    qkv = load_params(source, source.config)["periods"]["0_lightning"]["attention"]["qkv"][0, 2]  # [D, N, 3, H]
    for head, part, channel in ((0, 0, 0), (3, 2, 15), (1, 1, 7)):
        np.testing.assert_array_equal(qkv[:, head, part, channel], matrix[head * 48 + part * 16 + channel])


def test_all_faults_are_listed_at_once(folder):
    def change(tensors):
        del tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
        tensors["model.layers.0.self_attn.surprise.weight"] = np.zeros(3, np.float32)
        tensors["model.layers.0.self_attn.norm.weight"] = np.zeros(65, np.float32)
        tensors["lm_head.weight"] = np.zeros((256, 40), np.float32)

    spoil(folder / SHARDS.format(1), change)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError) as caught:
        HFFolder(folder)
    told = str(caught.value)
    assert "missing tensors: model.layers.0.block_sparse_moe.experts.1.w1.weight" in told
    assert "unknown tensors: model.layers.0.self_attn.surprise.weight" in told
    assert "misshaped tensors: model.layers.0.self_attn.norm.weight is (65,), config.json asks for (64,)" in told
    assert "duplicate tensors: lm_head.weight (in model-00001" in told
    assert "\n" not in told


def test_a_tensor_that_is_not_where_the_index_says(folder):
    spoil(folder / SHARDS.format(1), lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(UserError, match=r"not where .*index.json says: model.embed_tokens.weight"):
        HFFolder(folder)


def test_a_truncated_shard_is_named(folder):
    shard = folder / SHARDS.format(2)
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors: truncated or damaged.*fetch it again"):
        HFFolder(folder)


def test_a_shard_that_is_not_there_is_named(folder):
    (folder / SHARDS.format(3)).unlink()
    with pytest.raises(UserError, match="names shards that are not there: model-00003-of-00003.safetensors"):
        HFFolder(folder)


def test_decay_buffers_are_left_aside_with_a_note(folder):
    buffers = {f"model.layers.0.self_attn.{n}": np.ones((4, 1, 1), np.float32) for n in ("slope_rate", "query_decay")}
    spoil(folder / SHARDS.format(1), lambda tensors: tensors.update(buffers))
    reindex(folder)
    source = HFFolder(folder)
    assert "ignored 2 buffers" in source.notes[0]
    load_params(source, source.config)


def test_dtypes_that_cannot_be_kept(folder):
    def halve(tensors):
        tensors["model.norm.weight" if "model.norm.weight" in tensors else "lm_head.weight"] = np.ones(
            (40,) if "model.norm.weight" in tensors else (256, 40), np.float16
        )

    spoil(folder / SHARDS.format(3), halve)
    with pytest.raises(UserError, match="several dtypes: .*F16.*give --dtype=float32"):
        HFFolder(folder)
    assert HFFolder(folder, dtype="float32").config.param_dtype == "float32"
    for number in (1, 2, 3):
        file = folder / SHARDS.format(number)
        save_file({name: value.astype(np.float16) for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="float16, which is not stored here"):
        HFFolder(folder)


def test_a_tied_model_may_not_bring_a_head(tmp_path):
    folder = shutil.copytree(GOLDENS / "llama_tiny_tied", tmp_path / "llama")
    spoil(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": np.zeros((256, 48), np.float32)}))
    with pytest.raises(UserError, match="unknown tensors: lm_head.weight"):
        HFFolder(folder)


def test_no_weights_at_all(tmp_path):
    shutil.copy(GOLDENS / "m1_tiny" / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"holds no \*.safetensors"):
        HFFolder(tmp_path)


def test_an_index_alone_is_checked_by_names_and_size(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    _, checked = check_index(folder)
    assert checked == ["155 names in 3 shards", "849,312 bytes, which is float32"]
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"metadata": {"total_size": 1}}))
    with pytest.raises(UserError, match="metadata.total_size is 1 bytes; the tensors of config.json take 427,"):
        check_index(folder)
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="missing tensors: model.norm.weight"):
        check_index(folder)


def test_an_index_alone_gives_the_dtype_that_its_size_speaks_of(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    size = hf_bytes(hf_tensors(from_hf(json.loads((folder / "config.json").read_text()))), "bfloat16")
    path.write_text(json.dumps(index | {"metadata": {"total_size": size}}))
    assert check_index(folder)[0].param_dtype == "bfloat16"
    assert check_index(folder, "float32")[0].param_dtype == "float32"
    path.write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert check_index(folder)[0].param_dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_map": None}, "weight_map must give every tensor a file name"),
        ({"weight_map": ["a"]}, "weight_map must give every tensor a file name"),
        ({"weight_map": {"a": 1}}, "weight_map must give every tensor a file name"),
        ({"weight_map": {"a": "../a.safetensors"}}, "weight_map must give every tensor a file name"),
        ({"metadata": None}, "metadata is None; it must be an object"),
        ({"metadata": {"total_size": "5"}}, "metadata.total_size is '5'; it must be a number of bytes"),
        ({"metadata": {"total_size": float("inf")}}, "metadata.total_size is inf; it must be a number of bytes"),
    ],
)
def test_a_faulty_index_takes_one_line(folder, changes, message):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for reading in (check_index, HFFolder):
        with pytest.raises(UserError, match=f"index.json: {message}"):
            reading(folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_all_damaged_shards_are_named_with_the_other_faults(folder, indexed):
    spoil(folder / SHARDS.format(1), lambda tensors: tensors.update(surprise=np.zeros(3, np.float32)))
    for number in (2, 3):
        shard = folder / SHARDS.format(number)
        shard.write_bytes(shard.read_bytes()[:-1000])
    if not indexed:
        (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError) as caught:
        HFFolder(folder)
    told = str(caught.value)
    assert told.count("truncated or damaged") == 2 and "unknown tensors: surprise" in told
    assert "missing" not in told and "not where" not in told and "\n" not in told


def test_widened_gates_are_noted(folder):
    assert HFFolder(folder).notes == []
    for file in folder.glob("*.safetensors"):
        save_file({name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(file).items()}, file)
    assert HFFolder(folder).notes == ["widened 8 router gates from BF16 to float32"]


def test_what_a_folder_lacks_is_named(folder):
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="config.json: model_type is missing; add it, one of minimax_m1"):
        find_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="holds model.safetensors.index.json but no config.json"):
        find_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="holds model-00001-of-00003.safetensors but no config.json"):
        find_pretrained(folder)


def test_the_released_model_has_8243_tensors_and_its_published_size():
    from experiments import cli

    config = cli.named_model("m1")
    tensors = hf_tensors(config)
    assert len(tensors) == len({t.name for t in tensors}) == 8_243
    assert hf_bytes(tensors, "bfloat16") == 912_210_767_872  # total_size of the released index
    by_name = {t.name: t.shape for t in tensors}
    assert by_name["model.layers.0.self_attn.qkv_proj.weight"] == (24_576, 6_144)
    assert by_name["model.layers.79.self_attn.k_proj.weight"] == (1_024, 6_144)
    assert by_name["model.layers.79.block_sparse_moe.experts.31.w2.weight"] == (6_144, 9_216)
    assert sum(np.prod(shape) for shape, _ in leaf_shapes(config).values()) == 456_089_655_296
    narrow = leaf_shapes(replace(config, param_dtype="bfloat16"))
    assert narrow["periods", "1_softmax", "mlp", "router"] == ((10, 1, 6144, 32), np.dtype(np.float32))
