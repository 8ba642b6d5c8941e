"""config.json of Hugging Face folders as our ModelConfig and back: MiniMax-M1 / Text-01, Qwen2, Llama.

Reading is strict, because a key that is dropped builds another network without a word: every key of the file must be
known here and hold what belongs there, the ones that shape the network must be there, and two that say the same thing
must agree. All complaints come in one line.

Two spellings of MiniMax exist: the released one (`attn_type_list`, `layernorm_*_alpha`, `rotary_dim`, `postnorm`) and
that of Transformers' own class (`layer_types`, `*_alpha_factor`). Either is read, a mixture is refused, and the
released one is written.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m1jax.errors import UserError
from m1jax.model.config import ModelConfig


@dataclass(frozen=True)
class _Kind:
    """What a key may hold: in words, as a test that is safe for any JSON value, and as what it is handed on."""

    told: str
    holds: Callable[[Any], bool]
    cast: Callable[[Any], Any] = lambda value: value


def _integer(value: Any, low: int) -> bool:
    return type(value) is int and low <= value < 1 << 53  # True is no number here


def _number(value: Any, low: float = -1e300) -> bool:
    return type(value) in (int, float) and low < value < 1e300  # so neither NaN nor what no float holds


def _each(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(test, value))


SIZE = _Kind("an integer of at least 1", lambda value: _integer(value, 1))
COUNT = _Kind("an integer of at least 0", lambda value: _integer(value, 0))
NUMBER = _Kind("a finite number", _number, float)
POSITIVE = _Kind("a finite number above 0", lambda value: _number(value, 0), float)
FRACTION = _Kind("a number above 0 and at most 1", lambda value: _number(value, 0) and value <= 1)
FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = _Kind("an object with keys", lambda value: isinstance(value, dict))
SIZES_OF_LAYERS = _Kind(
    f"{SIZE.told} or a list of such", lambda value: SIZE.holds(value) or value != [] and _each(SIZE.holds)(value)
)
INTEGERS = _Kind("a list of integers", _each(lambda item: type(item) is int))
STRINGS = _Kind("a list of strings", _each(lambda item: isinstance(item, str)))

MINIMAX, QWEN2, LLAMA = "minimax", "qwen2", "llama"
MODEL_TYPES = {
    "minimax_m1": MINIMAX, "MiniMaxM1": MINIMAX, "minimax_text_01": MINIMAX, "MiniMaxText01": MINIMAX,
    "minimax": MINIMAX, "qwen2": QWEN2, "llama": LLAMA,
}  # fmt: skip
"""`model_type` of the file -> family. The released MiniMax code and its config.json differ in the spelling."""

_CLASSES = {name.lower().replace("_", "") + "forcausallm": family for name, family in MODEL_TYPES.items()}
"""Class in `architectures`, in lower case -> family."""

KIND_OF_TYPE = {0: "lightning", 1: "softmax"}
KIND_OF_NAME = {"linear_attention": "lightning", "full_attention": "softmax"}

RELEASED = {
    "lightning_alpha": "layernorm_linear_attention_alpha", "lightning_beta": "layernorm_linear_attention_beta",
    "softmax_alpha": "layernorm_full_attention_alpha", "softmax_beta": "layernorm_full_attention_beta",
    "mlp_alpha": "layernorm_mlp_alpha", "mlp_beta": "layernorm_mlp_beta",
}  # fmt: skip
TRANSFORMERS = {
    "lightning_alpha": "linear_attn_alpha_factor", "lightning_beta": "linear_attn_beta_factor",
    "softmax_alpha": "full_attn_alpha_factor", "softmax_beta": "full_attn_beta_factor",
    "mlp_alpha": "mlp_alpha_factor", "mlp_beta": "mlp_beta_factor",
}  # fmt: skip
"""Our field -> the key, in the released spelling and in that of Transformers' own class."""

SIZES = {
    "vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "expert_dim": "intermediate_size",
}  # fmt: skip
NORM_EPS, MAX_POSITIONS = "rms_norm_eps", "max_position_embeddings"
EXPERTS = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}

FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_dropout": (0,), "rope_scaling": (None,), "pretraining_tp": (1,),
    "rope_interleaved": (False,), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "shared_intermediate_size": (0,), "router_jitter_noise": (0,), "use_qk_norm": (False,), "qk_norm": (False,),
    "use_mrope": (False,), "clip_qkv": (None,), "quantization_config": (None,),
}  # fmt: skip
"""Keys that would change the network if they had another value; there is no code for another one."""

WITHOUT_EFFECT = frozenset(
    """_name_or_path architectures auto_map bos_token_id eos_token_id pad_token_id dtype torch_dtype initializer_range
    transformers_version use_cache output_router_logits router_aux_loss_coef shared_moe_mode max_window_layers
    block_size model_type is_llama_config transformers.js_config chunk_size_feed_forward id2label label2id
    is_encoder_decoder is_decoder add_cross_attention output_attentions output_hidden_states return_dict problem_type
    task_specific_params finetuning_task torchscript use_bfloat16 tie_encoder_decoder cross_attention_hidden_size
    unk_token_id sep_token_id decoder_start_token_id prefix tokenizer_class pruned_heads name_or_path""".split()  # noqa: SIM905  # a table of forty quoted words reads worse
)
"""Keys that say nothing about the forward pass: ids (tokenizer and generation config have them), storage, training."""


def from_hf(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The decoder that a config.json describes, float32 until somebody says otherwise.

    Args:
        values: the file's keys.
        where: its name, for messages.

    Raises:
        UserError: keys are missing, unknown, contradictory or ask for something that is not here; all in one line.
    """
    reader = _Reader(values)
    family = MODEL_TYPES.get(str(values.get("model_type")))
    if family is None:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"{where}: model_type {values.get('model_type')!r} is not one of {known}")
    fields: dict[str, Any] = {field: reader.need(key, SIZE) for field, key in SIZES.items()}
    fields["norm_eps"] = reader.need(NORM_EPS, POSITIVE)
    fields["max_positions"] = reader.take(MAX_POSITIONS, COUNT, 0)
    fields["init_std"] = reader.take("initializer_range", NUMBER, 0.02)
    fields["tied_embeddings"] = reader.take("tie_word_embeddings", FLAG, False)
    for name in reader.take("architectures", STRINGS, []):
        if _CLASSES.get(name.lower()) != family:
            reader.problems.append(f"contradiction: architectures says {name}, model_type says {values['model_type']}")
    fields |= _minimax(reader, fields) if family == MINIMAX else _dense(reader, fields, family)
    reader.check_fixed(family)
    reader.check_unknown()
    if not reader.problems:
        try:
            return ModelConfig(**fields)
        except (ValueError, TypeError) as error:
            reader.problems.append(str(error))
    raise UserError(f"{where}: " + "; ".join(reader.problems))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json for this decoder, in the released spelling.

    A decoder without a bound on positions (max_positions 0) gets no `max_position_embeddings`: a server would take 0
    for the limit. Without the key it chooses a limit of its own.

    Raises:
        UserError: no released family has this form.
    """
    dense = config.num_experts == 0
    family = MINIMAX if not dense else QWEN2 if config.qkv_bias else LLAMA
    wanted: dict[str, Any] = {"lightning_norm_eps": 1e-6} if family == MINIMAX else {
        "postnorm": False, "rotary_dim": config.head_dim, **dict.fromkeys(RELEASED, 1.0),
        "layer_pattern": ("softmax",) * len(config.layer_pattern),
    }  # fmt: skip
    wanted["qkv_bias"] = family == QWEN2
    odd = [f"{k} is {getattr(config, k)!r}, not {v!r}" for k, v in wanted.items() if getattr(config, k) != v]
    if odd:
        raise UserError(f"config.model: {family} has no config.json for this decoder: {'; '.join(odd)}")

    classes = {MINIMAX: "MiniMaxM1ForCausalLM", QWEN2: "Qwen2ForCausalLM", LLAMA: "LlamaForCausalLM"}
    values: dict[str, Any] = {
        "architectures": [classes[family]],
        "model_type": {MINIMAX: "minimax_m1"}.get(family, family),
        **{key: getattr(config, field) for field, key in SIZES.items()},
        NORM_EPS: config.norm_eps,
        **({MAX_POSITIONS: config.max_positions} if config.max_positions else {}),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "torch_dtype": config.param_dtype,
        "use_cache": True,
    }  # fmt: skip
    if family == MINIMAX:
        type_of_kind = {kind: number for number, kind in KIND_OF_TYPE.items()}
        values |= {
            **{key: getattr(config, field) for field, key in EXPERTS.items()},
            **{key: getattr(config, field) for field, key in RELEASED.items()},
            "attn_type_list": [type_of_kind[kind] for kind in config.kinds],
            "rotary_dim": config.rotary_dim,
            "postnorm": config.postnorm,
            "sliding_window": None,
            "shared_intermediate_size": 0,
            "router_jitter_noise": 0.0,
        }
    elif family == QWEN2:
        values |= {"use_sliding_window": False}
    else:
        values |= {"attention_bias": False, "mlp_bias": False}
    return values


class _Reader:
    """Keys of a config.json on their way out: what was read, and what there is to complain about."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "", problems: list[str] | None = None):
        self.values, self.prefix, self.read = dict(values), prefix, set()
        self.problems: list[str] = [] if problems is None else problems

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, kind: _Kind, default: Any = None) -> Any:
        """The value of a key; `default` where it is null, not there, or (which is told) no `kind`."""
        self.read.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if not kind.holds(value):
            self.problems.append(f"{self.prefix}{key} is {value!r:.80}; it must be {kind.told}")
            return default
        return kind.cast(value)

    def need(self, key: str, kind: _Kind) -> Any:
        """The value of a key that shapes the network; without it a default would build another one."""
        if self.values.get(key) is None:
            self.problems.append(f"{self.prefix}{key} is missing")
        return self.take(key, kind)

    def agree(self, options: Mapping[str, Any]) -> Any:
        """The one value that all the spellings of it which are there give."""
        given = {name: value for name, value in options.items() if value is not None}
        if len(set(given.values())) > 1:
            self.problems.append("contradiction: " + ", ".join(f"{k} says {v}" for k, v in given.items()))
        if not given and not any(problem.startswith(tuple(options)) for problem in self.problems):
            self.problems.append(f"{' or '.join(options)} is missing")
        return next(iter(given.values()), None)

    def check_fixed(self, family: str) -> None:
        for key, allowed in FIXED.items():
            self.read.add(key)
            if key in self.values and self.values[key] not in allowed:
                self.problems.append(f"{key} is {self.values[key]!r:.80}; only {allowed[0]!r} is implemented")
        self.read.add("sliding_window")
        window = self.values.get("sliding_window")
        if window is not None and (family != QWEN2 or self.values.get("use_sliding_window")):
            self.problems.append(f"sliding_window is {window!r:.80}; only null is implemented")

    def check_unknown(self) -> None:
        known = self.read | WITHOUT_EFFECT
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)
                self.problems.append(f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else ""))


def _rotary(reader: _Reader, head_dim: int | None, whole: bool) -> dict[str, Any]:
    """rope_theta and rotary_dim, which newer files keep inside `rope_parameters`; `whole` heads turn in some models."""
    inside = _Reader(reader.take("rope_parameters", OBJECT, {}), "rope_parameters.", reader.problems)
    if (kind := inside.values.get("rope_type", "default")) != "default":
        reader.problems.append(f"rope_parameters.rope_type is {kind!r:.80}; only 'default' is implemented")
    thetas: dict[str, float | None] = {}
    widths: dict[str, int | None] = {"head_dim": head_dim} if whole else {}
    for place in (reader, inside):
        thetas[f"{place.prefix}rope_theta"] = place.take("rope_theta", POSITIVE)
        widths[f"{place.prefix}rotary_dim"] = place.take("rotary_dim", COUNT)
        factor = place.take("partial_rotary_factor", FRACTION)
        widths[f"{place.prefix}partial_rotary_factor"] = factor and head_dim and round(factor * head_dim)
    if odd := set(inside.values) - inside.read - {"rope_type"}:
        reader.problems.append(f"rope_parameters: unknown keys {', '.join(sorted(odd))}")
    return {"rope_theta": reader.agree(thetas), "rotary_dim": reader.agree(widths)}


def _minimax(reader: _Reader, sizes: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = reader.need("head_dim", SIZE)
    fields = {field: reader.need(key, SIZES_OF_LAYERS) for field, key in EXPERTS.items()}
    for field, key in EXPERTS.items():
        if isinstance(numbers := fields[field], list):
            if len(set(numbers)) != 1:
                reader.problems.append(f"{key} is {numbers!r:.80}; only one number for all layers is implemented")
            fields[field] = numbers[0]
    if isinstance(shared := reader.values.get("shared_intermediate_size"), list) and not any(shared):
        reader.values["shared_intermediate_size"] = 0

    released = [key for key in ("attn_type_list", "postnorm", *RELEASED.values()) if key in reader]
    other = [key for key in ("layer_types", *TRANSFORMERS.values()) if key in reader]
    if released and other:
        reader.problems.append(f"two spellings mixed: {released[0]} and {other[0]}; keep one")
    names = TRANSFORMERS if other and not released else RELEASED
    fields |= {field: reader.need(key, NUMBER) for field, key in names.items()}
    reader.read |= {"layer_types", *RELEASED.values(), *TRANSFORMERS.values()}
    if names is RELEASED:
        fields["layer_pattern"] = _pattern(reader, "attn_type_list", INTEGERS, KIND_OF_TYPE, sizes["num_layers"])
        fields["postnorm"] = reader.need("postnorm", FLAG)
    else:  # Transformers' class has no such flag: it is always post-norm
        fields["layer_pattern"] = _pattern(reader, "layer_types", STRINGS, KIND_OF_NAME, sizes["num_layers"])
        fields["postnorm"] = True
    return fields | {"head_dim": head_dim} | _rotary(reader, head_dim, whole=False)


def _dense(reader: _Reader, sizes: Mapping[str, Any], family: str) -> dict[str, Any]:
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    head_dim = reader.take("head_dim", SIZE)
    if head_dim is None and hidden and heads:
        if hidden % heads:
            reader.problems.append(f"head_dim is missing and hidden_size {hidden} is no multiple of {heads} heads")
        head_dim = hidden // heads
    if reader.values.get("layer_types") is not None:
        pattern = _pattern(reader, "layer_types", STRINGS, KIND_OF_NAME, sizes["num_layers"])
        if pattern != ("softmax",):
            reader.problems.append("layer_types: only full_attention is implemented for this model_type")
    reader.read.add("layer_types")
    return {
        "head_dim": head_dim, "num_experts": 0, "experts_per_token": 0, "postnorm": False, "qkv_bias": family == QWEN2,
        "layer_pattern": ("softmax",), **{field: 1.0 for field in RELEASED}, **_rotary(reader, head_dim, whole=True),
    }  # fmt: skip


def _pattern(reader: _Reader, key: str, kind: _Kind, kinds: Mapping[Any, str], layers: int | None) -> tuple[str, ...]:
    """The shortest pattern that, repeated, is the file's list of layers."""
    listed = reader.need(key, kind)
    if listed is None:
        return ("softmax",)
    if unknown := {item for item in listed if item not in kinds}:
        reader.problems.append(f"{key}: {sorted(map(str, unknown))} are none of {list(kinds)}")
        return ("softmax",)
    if layers is not None and len(listed) != layers:
        reader.problems.append(f"contradiction: {key} lists {len(listed)} layers, num_hidden_layers says {layers}")
    names = tuple(kinds[item] for item in listed)
    for length in range(1, len(names) + 1):
        if len(names) % length == 0 and names[:length] * (len(names) // length) == names:
            return names[:length]
    return names
