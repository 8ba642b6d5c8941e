"""config.json of Hugging Face folders as our ModelConfig and back: MiniMax-M1 / Text-01, Qwen2, Llama.

Reading is strict, because a key that is dropped builds another network without a word: every key of the file must be
known here, the ones that shape the network must be there, and two that say the same thing must agree. All complaints
come in one line.

Two spellings of MiniMax exist: the released one (`attn_type_list`, `layernorm_*_alpha`, `rotary_dim`, `postnorm`) and
that of Transformers' own class (`layer_types`, `*_alpha_factor`). Either is read, a mixture is refused, and the
released one is written.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from m1jax.errors import UserError
from m1jax.model.config import ModelConfig

MINIMAX, QWEN2, LLAMA = "minimax", "qwen2", "llama"
MODEL_TYPES = {
    "minimax_m1": MINIMAX, "MiniMaxM1": MINIMAX, "minimax_text_01": MINIMAX, "MiniMaxText01": MINIMAX,
    "minimax": MINIMAX, "qwen2": QWEN2, "llama": LLAMA,
}  # fmt: skip
"""`model_type` of the file -> family. The released MiniMax code and its config.json differ in the spelling."""

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
    "norm_eps": "rms_norm_eps", "max_positions": "max_position_embeddings",
}  # fmt: skip
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
    fields: dict[str, Any] = {field: reader.need(key) for field, key in SIZES.items()}
    fields["init_std"] = reader.take("initializer_range", 0.02)
    fields["tied_embeddings"] = reader.take("tie_word_embeddings", False)
    fields |= _minimax(reader) if family == MINIMAX else _dense(reader, family)
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

    def __init__(self, values: Mapping[str, Any]):
        self.values, self.read, self.problems = dict(values), set(), []

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return self.values.get(key, default)

    def need(self, key: str) -> Any:
        """The value of a key that shapes the network; without it a default would build another one."""
        value = self.take(key)
        if value is None:
            self.problems.append(f"{key} is missing")
        return value

    def agree(self, options: Mapping[str, Any]) -> Any:
        """The one value that all the spellings of it which are there give."""
        given = {name: value for name, value in options.items() if value is not None}
        if len(set(given.values())) > 1:
            self.problems.append("contradiction: " + ", ".join(f"{k} says {v}" for k, v in given.items()))
        if not given:
            self.problems.append(f"{' or '.join(options)} is missing")
        return next(iter(given.values()), None)

    def check_fixed(self, family: str) -> None:
        for key, allowed in FIXED.items():
            if key in self.values and self.take(key) not in allowed:
                self.problems.append(f"{key} is {self.values[key]!r}; only {allowed[0]!r} is implemented")
        if self.take("sliding_window") is not None and (family != QWEN2 or self.values.get("use_sliding_window")):
            self.problems.append(f"sliding_window is {self.values['sliding_window']!r}; only null is implemented")

    def check_unknown(self) -> None:
        known = self.read | WITHOUT_EFFECT
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)
                self.problems.append(f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else ""))


def _rotary(reader: _Reader, head_dim: int | None, partial: bool) -> dict[str, Any]:
    """rope_theta and rotary_dim, which newer files keep inside `rope_parameters`."""
    inside = reader.take("rope_parameters") or {}
    if (kind := inside.get("rope_type", "default")) != "default":
        reader.problems.append(f"rope_parameters.rope_type is {kind!r}; only 'default' is implemented")
    if odd := set(inside) - {"rope_type", "rope_theta", "partial_rotary_factor", "rotary_dim"}:
        reader.problems.append(f"rope_parameters: unknown keys {', '.join(sorted(odd))}")
    theta = reader.agree(
        {"rope_theta": reader.take("rope_theta"), "rope_parameters.rope_theta": inside.get("rope_theta")}
    )
    if not partial:
        return {"rope_theta": theta and float(theta), "rotary_dim": head_dim}
    width: Callable[[Any], Any] = lambda factor: None if factor is None or not head_dim else round(factor * head_dim)  # noqa: E731
    rotary = reader.agree({
        "rotary_dim": reader.take("rotary_dim"),
        "partial_rotary_factor": width(reader.take("partial_rotary_factor")),
        "rope_parameters.partial_rotary_factor": width(inside.get("partial_rotary_factor")),
    })  # fmt: skip
    return {"rope_theta": theta and float(theta), "rotary_dim": rotary}


def _minimax(reader: _Reader) -> dict[str, Any]:
    head_dim = reader.need("head_dim")
    fields = {field: reader.need(key) for field, key in EXPERTS.items()}
    experts = fields["num_experts"]
    if isinstance(experts, list):
        if len(set(experts)) != 1:
            reader.problems.append(f"num_local_experts is {experts}; only one number for all layers is implemented")
        fields["num_experts"] = experts[0]
    if isinstance(shared := reader.take("shared_intermediate_size"), list) and not any(shared):
        reader.values["shared_intermediate_size"] = 0

    released = [key for key in ("attn_type_list", "postnorm", *RELEASED.values()) if key in reader]
    other = [key for key in ("layer_types", *TRANSFORMERS.values()) if key in reader]
    if released and other:
        reader.problems.append(f"two spellings mixed: {released[0]} and {other[0]}; keep one")
    names = TRANSFORMERS if other and not released else RELEASED
    fields |= {field: reader.need(key) for field, key in names.items()}
    for key in (*RELEASED.values(), *TRANSFORMERS.values()):
        reader.read.add(key)
    if names is RELEASED:
        reader.read.add("layer_types")
        fields["layer_pattern"] = _pattern(reader, "attn_type_list", KIND_OF_TYPE)
        fields["postnorm"] = reader.need("postnorm")
    else:  # Transformers' class has no such flag: it is always post-norm
        fields["layer_pattern"] = _pattern(reader, "layer_types", KIND_OF_NAME)
        fields["postnorm"] = True
    for field in names:
        if fields[field] is not None:
            fields[field] = float(fields[field])
    return fields | {"head_dim": head_dim} | _rotary(reader, head_dim, partial=True)


def _dense(reader: _Reader, family: str) -> dict[str, Any]:
    hidden, heads = reader.values.get("hidden_size"), reader.values.get("num_attention_heads")
    head_dim = reader.take("head_dim")
    if head_dim is None and hidden and heads:
        if hidden % heads:
            reader.problems.append(f"head_dim is missing and hidden_size {hidden} is no multiple of {heads} heads")
        head_dim = hidden // heads
    if "layer_types" in reader and set(reader.take("layer_types")) != {"full_attention"}:
        reader.problems.append("layer_types: only full_attention is implemented for this model_type")
    return {
        "head_dim": head_dim, "num_experts": 0, "experts_per_token": 0, "postnorm": False, "qkv_bias": family == QWEN2,
        "layer_pattern": ("softmax",), **{field: 1.0 for field in RELEASED}, **_rotary(reader, head_dim, partial=False),
    }  # fmt: skip


def _pattern(reader: _Reader, key: str, kinds: Mapping[Any, str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, is the file's list of layers."""
    listed = reader.need(key)
    if listed is None:
        return ("softmax",)
    if unknown := {item for item in listed if item not in kinds}:
        reader.problems.append(f"{key}: {sorted(map(str, unknown))} are none of {list(kinds)}")
        return ("softmax",)
    layers = reader.values.get("num_hidden_layers")
    if len(listed) != layers:
        reader.problems.append(f"contradiction: {key} lists {len(listed)} layers, num_hidden_layers says {layers}")
    names = tuple(kinds[item] for item in listed)
    for length in range(1, len(names) + 1):
        if len(names) % length == 0 and names[:length] * (len(names) // length) == names:
            return names[:length]
    return names
