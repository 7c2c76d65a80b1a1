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
