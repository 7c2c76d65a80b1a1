"""ModelConfig: config.json in every spelling that models use."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import CheckpointError
from octavo.model_config import ModelConfig, RopeConfig

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(generation_config: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
    return ModelConfig.from_dict(CONFIG | keys, generation_config or {})


def test_what_a_config_leaves_out_has_the_values_transformers_gives_it() -> None:
    config = read()
    assert (config.num_kv_heads, config.head_dim) == (6, 16)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 2048)
    assert (config.dtype, config.tie_word_embeddings, config.quantization) == ("float32", False, {})
    assert config.rope == RopeConfig(theta=10000.0, rope_type="default", parameters={})
    assert config.eos_token_ids == frozenset()


def test_what_a_config_says_is_read() -> None:
    config = read(
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        quantization_config={"quant_method": "gptq", "bits": 4},
        of_one_architecture=7,
    )
    assert (config.architecture, config.vocab_size) == ("LlamaForCausalLM", 1000)
    assert (config.num_layers, config.num_heads) == (3, 6)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (2, 32, 1e-5)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (4096, True)
    assert config.quantization == {"quant_method": "gptq", "bits": 4}
    assert config.raw["of_one_architecture"] == 7


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    ],
    ids=["rope_scaling", "rope_scaling with type", "rope_parameters"],
)
def test_all_spellings_of_rope_are_one(keys: dict[str, Any]) -> None:
    parameters = LLAMA3 | {"max_position_embeddings": 2048}
    assert read(**keys).rope == RopeConfig(theta=500000.0, rope_type="llama3", parameters=parameters)


def test_a_rope_theta_alone_is_a_default_rope() -> None:
    assert read(rope_theta=1e6, rope_scaling=None).rope == RopeConfig(theta=1e6)


def test_partial_rotation_stands_in_the_rope_or_beside_it() -> None:
    assert read(partial_rotary_factor=0.5).rope == RopeConfig(partial_rotary_factor=0.5)
    assert read(rope_parameters={"partial_rotary_factor": 0.5}).rope == RopeConfig(partial_rotary_factor=0.5)


def test_the_older_name_of_longrope_is_known() -> None:
    rope = read(rope_scaling={"type": "su", "long_factor": [2.0], "short_factor": [1.0]}).rope
    assert rope.rope_type == "longrope"


def test_the_length_trained_with_stands_in_the_rope_or_beside_it_or_is_the_longest() -> None:
    def trained(**keys: Any) -> object:
        return read(max_position_embeddings=999, **keys).rope.parameters["original_max_position_embeddings"]

    assert trained(rope_scaling={"type": "yarn", "original_max_position_embeddings": 77}) == 77
    assert trained(rope_scaling={"type": "longrope"}, original_max_position_embeddings=88) == 88
    assert trained(rope_scaling={"type": "llama3"}) == 999


def test_of_ropes_by_layer_type_that_of_full_attention_is_the_models() -> None:
    by_type = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_type": "linear", "factor": 8.0}}
    config = read(rope_parameters=by_type, rope_theta=1e6)
    assert (config.rope.theta, config.rope.rope_type, config.rope.parameters["factor"]) == (1e6, "linear", 8.0)
    assert RopeConfig.from_dict(by_type["sliding_attention"], config.raw) == RopeConfig(theta=1e4)


def test_equal_ropes_are_one_key_and_others_another() -> None:
    first, second = (read(rope_scaling={"type": "yarn", "factor": 4.0, "truncate": False}).rope for _ in range(2))
    assert len({first: 1, second: 2}) == 1
    assert len({first: 1, read(rope_scaling={"type": "yarn", "factor": 8.0}).rope: 2}) == 2


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, None),
        ({"sliding_window": None}, None),
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 64, "use_sliding_window": True}, 64),
        ({"sliding_window": 64, "use_sliding_window": False}, None),
        ({"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, 64),
        ({"sliding_window": 64, "layer_types": ["full_attention", "full_attention"]}, None),
        ({"sliding_window": 64, "max_window_layers": 1}, 64),
        ({"sliding_window": 64, "max_window_layers": 99}, None),
    ],
)
def test_a_window_is_stated_only_if_some_layer_has_it(keys: dict[str, Any], wanted: int | None) -> None:
    assert read(**keys).sliding_window == wanted


def test_attention_is_asked_for_what_some_layers_have_and_contexts_reach() -> None:
    config = read(sliding_window=64, attn_logit_softcapping=50.0)
    assert config.attn_logit_softcapping == 50.0
    assert config.attention_features(65) == {"sliding_window", "logit_softcap"}
    assert config.attention_features(64) == {"logit_softcap"}
    assert read().attention_features(10**6) == frozenset()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_has_two_names(key: str) -> None:
    assert read(**{key: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("in_config", "in_generation", "wanted"),
    [
        (2, None, {2}),
        ([2, 5], None, {2, 5}),
        (2, [7, 2], {2, 7}),
        (None, 7, {7}),
        (0, None, {0}),
    ],
)
def test_end_of_sequence_ids_are_those_of_both_files(in_config: Any, in_generation: Any, wanted: set[int]) -> None:
    assert read({"eos_token_id": in_generation}, eos_token_id=in_config).eos_token_ids == wanted


def test_all_missing_keys_are_named() -> None:
    raw = {"architectures": ["ViT"], "hidden_size": 96, "num_attention_heads": 6}
    with pytest.raises(CheckpointError, match="lacks vocab_size, intermediate_size, num_hidden_layers: this is not a"):
        ModelConfig.from_dict(raw, {})
