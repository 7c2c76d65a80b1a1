"""EngineConfig: what can be set, what is said when a setting is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from octavo.config import ComponentConfig, EngineConfig, PluginsConfig
from octavo.errors import ConfigError

SETTINGS: dict[str, Any] = {
    "model": "demo",
    "tokenizer": None,
    "revision": None,
    "device": "auto",
    "dtype": "auto",
    "max_model_len": None,
    "block_size": 16,
    "kv_cache_memory_bytes": None,
    "kv_cache_dtype": "auto",
    "gpu_memory_utilization": 0.9,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": True,
    "max_steps_in_flight": None,
    "enforce_eager": False,
    "seed": 0,
    "generation_config": "auto",
    "max_logprobs": 20,
    "tensor_parallel_size": 1,
    "attention": "auto",
    "quantization": "auto",
    "linear_kernel": "auto",
    "kernels": "auto",
    "scheduler": "auto",
    "executor": "auto",
    "proposer": "none",
    "num_speculative_tokens": 4,
    "logits_rules": (),
    "enable_lora": False,
    "max_loras": 8,
    "max_lora_rank": 16,
    "max_cpu_loras": None,
    "lora_modules_to_save": False,
    "lora_modules": {},
    "lora_root": None,
    "lora": "auto",
    "adapter_resolvers": (),
    "plugins": PluginsConfig(),
}
"""Every setting and its default. A new one needs a reader, a unit, a default right for most, and a line here."""


def faults(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.create(**settings)
    return str(caught.value)


def test_every_setting_is_listed_here() -> None:
    config = EngineConfig.create()
    found = {name: getattr(config, name) for name in EngineConfig.model_fields}
    assert found == {
        name: type(value)(name=default) if isinstance(value := found[name], ComponentConfig) else default
        for name, default in SETTINGS.items()
    }


def test_every_setting_is_documented() -> None:
    assert [name for name, field in EngineConfig.model_fields.items() if not field.description] == []


def test_an_unknown_setting_names_the_nearest() -> None:
    message = faults(max_num_seq=4)
    assert message.startswith("There is no setting 'max_num_seq'. Did you mean 'max_num_seqs'?")
    assert "max_num_batched_tokens" in message


def test_an_unknown_setting_like_no_other_lists_them_all() -> None:
    message = faults(qqq=4)
    assert "Did you mean" not in message
    assert all(name in message for name in SETTINGS)


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 0},
        {"block_size": "many"},
        {"max_model_len": -1},
        {"max_num_seqs": 1.5},
        {"device": "tpu"},
        {"dtype": "float8"},
        {"generation_config": "theirs"},
        {"max_logprobs": -2},
        {"attention": 5},
        {"enable_prefix_caching": "perhaps"},
        {"model": None},
        {"max_loras": 0},
        {"max_lora_rank": 0},
        {"max_cpu_loras": 0},
        {"lora_modules": 5},
        {"lora_modules": "sql"},
        {"lora_modules": ["=path"]},
        {"lora_modules": ["sql="]},
        {"lora_modules": [5]},
        {"lora_modules": ["sql=a", "sql=b"]},
        {"lora_modules": ['{"name": "sql"']},
        {"lora_modules": [{"name": "sql", "path": 5}]},
        {"lora_modules": [{"name": "sql", "path": "a", "rank": 8}]},
        {"adapter_resolvers": 5},
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_setting(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    assert f"{name}={value!r}: " in faults(**settings)


def test_all_faults_are_named_together() -> None:
    message = faults(block_size=0, device="tpu", nonsense=1)
    assert all(name in message for name in ("block_size=0", "device='tpu'", "'nonsense'"))


@pytest.mark.parametrize("kind", ["attention", "quantization", "scheduler", "executor", "proposer", "lora"])
def test_a_name_is_short_for_a_component_without_options(kind: str) -> None:
    short, long = EngineConfig.create(**{kind: "torch"}), EngineConfig.create(**{kind: {"name": "torch"}})
    assert short == long
    assert getattr(short, kind).options == {}
    assert getattr(EngineConfig.create(**{kind: None}), kind).name == SETTINGS[kind]


def test_a_component_takes_options_of_its_own() -> None:
    config = EngineConfig.create(attention={"name": "triton", "num_kv_splits": 8})
    assert (config.attention.name, config.attention.options) == ("triton", {"num_kv_splits": 8})


@pytest.mark.parametrize("modules", [{"sql": "a"}, "sql=a", ["sql=a"], [{"name": "sql", "path": "a"}]], ids=str)
def test_adapters_are_paths_by_name_in_every_form(modules: object) -> None:
    assert EngineConfig.create(enable_lora=True, lora_modules=modules).lora_modules == {"sql": "a"}


@pytest.mark.parametrize(
    "settings", [{"lora_modules": {"sql": "a"}}, {"lora_root": "a"}, {"adapter_resolvers": ["hf"]}], ids=str
)
def test_adapters_without_lora_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    assert faults(**settings) == f"{name} was given, but no adapters are served: set enable_lora=True."


def test_an_adapter_without_a_path_is_named() -> None:
    assert "lora_modules.sql=None: Input should be a valid string" in faults(lora_modules={"sql": None})


def test_the_host_keeps_four_times_as_many_adapters_as_the_device_unless_said() -> None:
    assert EngineConfig.create(max_loras=3).num_cpu_loras == 12
    assert EngineConfig.create(max_loras=3, max_cpu_loras=5).num_cpu_loras == 5


def test_the_host_keeps_what_the_device_has() -> None:
    assert faults(max_loras=3, max_cpu_loras=2).startswith("max_cpu_loras=2 is less than max_loras=3")


def test_resolvers_are_named_with_commas_or_take_options() -> None:
    short = EngineConfig.create(enable_lora=True, adapter_resolvers="filesystem, hf")
    assert [one.name for one in short.adapter_resolvers] == ["filesystem", "hf"]
    long = EngineConfig.create(enable_lora=True, adapter_resolvers=[{"name": "hf", "allowed": ["org/*"]}])
    assert long.adapter_resolvers[0].options == {"allowed": ["org/*"]}
    assert EngineConfig.create(enable_lora=True, adapter_resolvers={"name": "hf", "allowed": ["org/*"]}) == long


def test_a_config_does_not_change() -> None:
    config = EngineConfig.create()
    with pytest.raises(ValidationError):
        config.block_size = 32
