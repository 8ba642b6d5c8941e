"""config.json: strict reading of both spellings, and writing what reads back as the same network."""

import json
import math
from dataclasses import replace

import pytest

from m1jax.errors import UserError
from m1jax.weights.hf_config import from_hf, to_hf
from tests.model.golden import GOLDENS, NAMES


def values(name="m1_tiny", **changes):
    read = json.loads((GOLDENS / name / "config.json").read_text())
    return {key: value for key, value in (read | changes).items() if value != "gone"}


def in_transformers_spelling():
    old = values()
    for kind, new in (("linear_attention", "linear_attn"), ("full_attention", "full_attn"), ("mlp", "mlp")):
        for letter in ("alpha", "beta"):
            old[f"{new}_{letter}_factor"] = old.pop(f"layernorm_{kind}_{letter}")
    types = old.pop("attn_type_list")
    del old["postnorm"]
    return old | {
        "model_type": "minimax",
        "layer_types": ["full_attention" if t else "linear_attention" for t in types],
        "rope_parameters": {"rope_type": "default", "rope_theta": old.pop("rope_theta"), "partial_rotary_factor": 0.5},
        "rotary_dim": old["rotary_dim"],
    }


@pytest.mark.parametrize("name", NAMES)
def test_written_config_reads_as_the_same_network(name):
    config = from_hf(values(name))
    assert from_hf(to_hf(config)) == config


def test_both_spellings_are_one_network():
    assert from_hf(in_transformers_spelling()) == from_hf(values())


def test_pattern_is_the_shortest_that_repeats():
    assert from_hf(values()).layer_pattern == ("lightning",) * 7 + ("softmax",)
    assert from_hf(values(attn_type_list=[0, 1] * 4)).layer_pattern == ("lightning", "softmax")
    assert from_hf(values(attn_type_list=[0, 0, 1, 0, 0, 0, 0, 1])).layer_pattern[2] == "softmax"
    assert from_hf(values("qwen2_tiny")).layer_pattern == ("softmax",)


def test_released_values_reach_their_fields():
    config = from_hf(values(rms_norm_eps=1e-6, rope_theta=5e5, rotary_dim=4, postnorm=False, layernorm_mlp_beta=0.5))
    assert (config.norm_eps, config.rope_theta, config.rotary_dim, config.postnorm) == (1e-6, 5e5, 4, False)
    assert (config.mlp_beta, config.lightning_norm_eps, config.max_positions) == (0.5, 1e-6, 8192)
    qwen = from_hf(values("qwen2_tiny_tied"))
    assert (qwen.qkv_bias, qwen.tied_embeddings, qwen.num_experts, qwen.head_dim, qwen.rotary_dim) == (
        True, True, 0, 8, 8,
    )  # fmt: skip


@pytest.mark.parametrize(
    "key",
    ["attn_type_list", "rotary_dim", "postnorm", "layernorm_mlp_alpha", "layernorm_linear_attention_beta", "head_dim",
     "num_local_experts", "rope_theta", "rms_norm_eps", "vocab_size", "num_key_value_heads"],
)  # fmt: skip
def test_a_missing_key_is_named(key):
    with pytest.raises(UserError, match=f"config.json: .*{key}.* is missing"):
        from_hf(values(**{key: "gone"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotery_dim": 8}, "rotery_dim: unknown key, did you mean rotary_dim"),
        ({"partial_rotary_factor": 0.25}, "contradiction: rotary_dim says 8, partial_rotary_factor says 4"),
        ({"attn_type_list": [0, 1]}, "contradiction: attn_type_list lists 2 layers, num_hidden_layers says 8"),
        ({"attn_type_list": [0] * 7 + [2]}, r"attn_type_list: \['2'\] are none of"),
        ({"layer_types": ["full_attention"] * 8}, "two spellings mixed: attn_type_list and layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"shared_intermediate_size": 64}, "shared_intermediate_size is 64; only 0"),
        ({"sliding_window": 4096}, "sliding_window is 4096; only null"),
        ({"num_local_experts": [4, 8]}, r"num_local_experts is \[4, 8\]"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is .*yarn.*; only None"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of minimax_m1"),
        ({"num_attention_heads": 3}, "num_kv_heads: 2 does not divide num_heads 3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"num_local_experts": 0}, "num_local_experts is 0; it must be an integer of at least 1 or a list of such"),
        ({"rope_parameters": {"rotary_dim": 4}}, "contradiction: rotary_dim says 8, rope_parameters.rotary_dim says 4"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "contradiction: architectures says LlamaForCausalLM, model_type says minimax_m1",
        ),
    ],
)
def test_what_would_be_another_network_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        from_hf(values(**changes))


def test_all_complaints_come_at_once():
    with pytest.raises(UserError) as caught:
        from_hf(values(rotary_dim="gone", postnorm="gone", hidden_act="gelu", nonsense=1))
    told = str(caught.value)
    assert all(word in told for word in ("rotary_dim", "postnorm is missing", "gelu", "nonsense: unknown key"))
    assert "\n" not in told


def test_qwen2_and_llama_refuse_what_they_are_not():
    with pytest.raises(UserError, match="use_sliding_window is True"):
        from_hf(values("qwen2_tiny", use_sliding_window=True, sliding_window=4096))
    assert from_hf(values("qwen2_tiny", sliding_window=131072)).qkv_bias  # named, but not used
    with pytest.raises(UserError, match="attention_bias is True"):
        from_hf(values("llama_tiny_tied", attention_bias=True))
    with pytest.raises(UserError, match="rope_parameters.rope_type is 'llama3'"):
        from_hf(values("llama_tiny_tied", rope_parameters={"rope_type": "llama3", "rope_theta": 1e5}))
    with pytest.raises(UserError, match="attn_type_list: unknown key"):
        from_hf(values("llama_tiny_tied", attn_type_list=[1] * 4))


def test_a_network_without_a_released_form_is_not_written():
    with pytest.raises(UserError, match="llama has no config.json.*postnorm is True"):
        to_hf(replace(from_hf(values("llama_tiny_tied")), postnorm=True))
    with pytest.raises(UserError, match="minimax has no config.json.*qkv_bias is True"):
        to_hf(replace(from_hf(values()), qkv_bias=True))
    with pytest.raises(UserError, match="lightning_norm_eps is 1e-05"):
        to_hf(replace(from_hf(values()), lightning_norm_eps=1e-5))


@pytest.mark.parametrize("name", ["qwen2_tiny", "llama_tiny_tied"])
def test_dense_models_have_whole_heads_and_one_kind_of_layer(name):
    theta, width = values(name)["rope_theta"], 16
    assert from_hf(values(name, rope_parameters={"partial_rotary_factor": 1.0})).rotary_dim == width
    assert from_hf(values(name, layer_types=None)) == from_hf(values(name))
    assert from_hf(values(name, layer_types=["full_attention"] * 4, rope_theta=theta)) == from_hf(values(name))
    for changes, message in (
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "head_dim says 16, rope_parameters.partial.* says 8"),
        ({"rope_parameters": {"rotary_dim": 4}}, "head_dim says 16, rope_parameters.rotary_dim says 4"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types lists 3 layers, num_hidden_layers says 4"),
        ({"layer_types": ["linear_attention"] * 4}, "only full_attention is implemented"),
        ({"architectures": ["MiniMaxForCausalLM"]}, "architectures says MiniMaxForCausalLM, model_type says"),
    ):
        with pytest.raises(UserError, match=message):
            from_hf(values(name, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"postnorm": "false"}, "postnorm is 'false'; it must be true or false"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a finite number above 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be"),
        ({"layernorm_mlp_alpha": math.inf}, "layernorm_mlp_alpha is inf; it must be a finite number"),
        ({"layernorm_mlp_alpha": 10**400}, "layernorm_mlp_alpha is 1000.*; it must be a finite number"),
        ({"hidden_size": 40.0}, "hidden_size is 40.0; it must be an integer of at least 1"),
        ({"vocab_size": True}, "vocab_size is True; it must be"),
        ({"attn_type_list": [True] * 8}, "attn_type_list is .*; it must be a list of integers"),
        ({"attn_type_list": [[0]]}, "attn_type_list is .*; it must be a list of integers"),
        ({"rope_parameters": {"rope_theta": []}}, r"rope_parameters.rope_theta is \[\]; it must be"),
    ],
)
def test_a_value_of_another_kind_is_told_with_what_it_must_be(changes, message):
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        from_hf(values(**changes))


FAMILIES = {
    "minimax": values(),
    "transformers": in_transformers_spelling(),
    "qwen2": values("qwen2_tiny", layer_types=["full_attention"] * 4, head_dim=16),
    "llama": values("llama_tiny_tied", rope_parameters={"rope_theta": 1e5, "partial_rotary_factor": 1}),
}


@pytest.mark.parametrize(
    "odd", [None, "x", [], {}, -1, math.nan, math.inf, True, 7.5, 10**400, [[0]], [None]], ids=lambda odd: str(odd)[:8]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_key_loads_or_is_refused_in_one_line(family, odd):
    valid = FAMILIES[family]
    cases = [valid | {key: odd} for key in valid]
    inside = valid.get("rope_parameters", {})
    cases += [valid | {"rope_parameters": inside | {key: odd}} for key in inside]
    for case in cases:
        try:
            from_hf(case)
        except UserError as error:
            assert "\n" not in str(error)


def test_no_bound_on_positions_is_a_key_left_out():
    config = replace(from_hf(values()), max_positions=0)
    assert "max_position_embeddings" not in to_hf(config)
    assert from_hf(to_hf(config)) == config
