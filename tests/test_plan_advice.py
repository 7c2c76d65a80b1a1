"""Advice of plans that do not fit: each, followed alone, makes the longest request fit, and a step less does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from llama_configs import LLAMA_3_8B, LLAMA_3_70B, write_config
from lora_plugin import install_lora_plugin

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.plan import Advice, Plan, make_plan

GIB = 2**30
LONG_8B = {**LLAMA_3_8B, "max_position_embeddings": 131072}
LORA = {"enable_lora": True, "lora": "counted"}
BLOCK = 16 * 131072  # bytes of a KV block of Llama-3-8B

# config.json, what is asked for, and the settings that are advised
MISFITS: dict[str, tuple[Mapping[str, Any], dict[str, Any], set[str]]] = {
    "weights larger than the device": (
        LLAMA_3_70B,
        {"memory": 80 * GIB, "device": "cuda", "max_model_len": 8192},
        {"tensor_parallel_size", "memory"},
    ),
    "weights larger than two devices": (
        LLAMA_3_70B,
        {"memory": 24 * GIB, "device": "cuda", "tensor_parallel_size": 2, "max_model_len": 8192},
        {"tensor_parallel_size", "memory"},
    ),
    "weights alone fit": (
        LLAMA_3_8B,
        {"memory": 16 * GIB, "device": "cuda", "max_model_len": 8192},
        {"tensor_parallel_size", "memory"},
    ),
    "requests too long": (
        LONG_8B,
        {"memory": 24 * GIB, "device": "cuda", "max_model_len": 100_000},
        {"tensor_parallel_size", "max_model_len", "memory"},
    ),
    "KV cache set too small": (
        LLAMA_3_8B,
        {"memory": 24 * GIB, "device": "cuda", "max_model_len": 8000, "kv_cache_memory_bytes": 300 * BLOCK + 7},
        {"tensor_parallel_size", "max_model_len", "kv_cache_memory_bytes"},
    ),
    "KV cache set too large": (
        LLAMA_3_8B,
        {"memory": 24 * GIB, "device": "cuda", "max_model_len": 8192, "kv_cache_memory_bytes": 10 * GIB},
        {"tensor_parallel_size", "kv_cache_memory_bytes", "memory"},
    ),
    "a GPU that is not used in full": (
        LLAMA_3_8B,
        {"memory": 24 * GIB, "device": "cuda", "gpu_memory_utilization": 0.7, "max_model_len": 8192},
        {"tensor_parallel_size", "max_model_len", "gpu_memory_utilization", "max_num_seqs", "memory"},
    ),
    "more requests at once than there is room for": (
        LLAMA_3_8B,
        {"memory": 20 * GIB, "device": "cuda", "max_num_seqs": 1024, "max_model_len": 4096},
        {"tensor_parallel_size", "gpu_memory_utilization", "max_num_seqs", "memory"},
    ),
    "the rule of a CPU": (
        LONG_8B,
        {"memory": 48 * GIB, "device": "cpu", "dtype": "bfloat16", "max_model_len": 40_000},
        {"tensor_parallel_size", "max_model_len", "kv_cache_memory_bytes"},
    ),
    "twice as wide as need be": (
        LLAMA_3_8B,
        {"memory": 24 * GIB, "device": "cuda", "dtype": "float32", "max_model_len": 8192},
        {"tensor_parallel_size", "dtype", "memory"},
    ),
    "too many adapters": (
        LLAMA_3_8B,
        {"memory": 24 * GIB, "device": "cuda", "max_model_len": 8192, "max_loras": 100, "max_lora_rank": 64, **LORA},
        {"tensor_parallel_size", "max_loras", "memory"},
    ),
}


def plan_of(model: str, asked: dict[str, Any]) -> Plan:
    settings = dict(asked)
    memory = settings.pop("memory")
    return make_plan(EngineConfig.create(model=model, **settings), memory_bytes=memory)


def steps_less(advice: Advice, asked: dict[str, Any]) -> list[int | float]:
    """Values of the setting that fall short of what is advised; [] for a dtype."""
    if isinstance(advice.value, str):
        return []
    if advice.setting == "tensor_parallel_size":
        return list(range(asked.get("tensor_parallel_size", 1), advice.value))
    if isinstance(advice.value, float):
        return [round(advice.value - 0.01, 2)]
    if advice.setting in ("max_model_len", "max_loras", "max_num_seqs"):
        return [advice.value + 1]
    if "Lower" in advice.sentence:
        return [advice.value + BLOCK]
    return [advice.value - 1]


@pytest.mark.parametrize("case", MISFITS)
def test_each_advice_is_enough_and_a_step_less_is_not(case: str, site_packages: Any, tmp_path: Path) -> None:
    install_lora_plugin(site_packages)
    config, asked, settings = MISFITS[case]
    model = write_config(tmp_path, config)
    plan = plan_of(model, asked)
    assert not plan.fits
    assert {one.setting for one in plan.advice} == settings
    for advice in plan.advice:
        followed = plan_of(model, {**asked, advice.setting: advice.value})
        assert followed.fits, advice
        assert followed.serves_max_model_len, advice
        for value in steps_less(advice, asked):
            try:
                fits = plan_of(model, {**asked, advice.setting: value}).fits
            except ConfigError:  # so many devices cannot share the model
                fits = False
            assert not fits, advice


def test_a_model_s_own_length_need_not_fit_but_what_would_serve_it_is_told(tmp_path: Path) -> None:
    model = write_config(tmp_path, LONG_8B)
    asked = {"memory": 24 * GIB, "device": "cuda"}
    plan = plan_of(model, asked)
    assert plan.fits
    assert plan.longest_context == plan.num_tokens < 131072
    assert {one.setting for one in plan.advice} == {"tensor_parallel_size", "memory"}
    for advice in plan.advice:
        assert plan_of(model, {**asked, advice.setting: advice.value}).longest_context == 131072
        assert isinstance(advice.value, int)
        assert plan_of(model, {**asked, advice.setting: advice.value - 1}).longest_context < 131072


def test_an_engine_that_cannot_start_is_helped_to_the_model_s_own_length_where_that_is_possible(
    tmp_path: Path,
) -> None:
    model = write_config(tmp_path, LONG_8B)
    asked = {"memory": 16 * GIB, "device": "cuda"}
    plan = plan_of(model, asked)
    assert not plan.fits
    for advice in plan.advice:
        assert plan_of(model, {**asked, advice.setting: advice.value}).longest_context == 131072, advice


def test_advice_that_only_lets_an_engine_start_says_how_long_requests_may_be(tmp_path: Path) -> None:
    model = write_config(tmp_path, LONG_8B)
    asked = {"memory": 24 * GIB, "device": "cuda", "kv_cache_memory_bytes": 10 * GIB}
    (advice,) = [one for one in plan_of(model, asked).advice if one.setting == "kv_cache_memory_bytes"]
    followed = plan_of(model, {**asked, "kv_cache_memory_bytes": advice.value})
    assert followed.fits
    assert advice.sentence.endswith(f"Requests may then have up to {followed.longest_context:,} tokens.")
    assert isinstance(advice.value, int)
    assert not plan_of(model, {**asked, "kv_cache_memory_bytes": advice.value + BLOCK}).fits


def test_the_longest_request_s_cache_is_told_to_the_byte(tmp_path: Path) -> None:
    model = write_config(tmp_path, LONG_8B)
    asked = {"memory": 48 * GIB, "device": "cpu", "dtype": "bfloat16"}
    advice = {one.setting: one.value for one in plan_of(model, asked).advice}
    assert advice["kv_cache_memory_bytes"] == 131072 * 131072
    assert plan_of(model, {**asked, "kv_cache_memory_bytes": 131072 * 131072}).longest_context == 131072
    assert plan_of(model, {**asked, "kv_cache_memory_bytes": 131072 * 131072 - 1}).longest_context == 131072 - 16


def test_what_serves_all_that_is_asked_is_given_no_advice(tmp_path: Path) -> None:
    plan = plan_of(write_config(tmp_path, LLAMA_3_8B), {"memory": 24 * GIB, "device": "cuda"})
    assert plan.fits
    assert plan.advice == ()


def test_advice_to_use_more_devices_says_when_no_executor_can(tmp_path: Path) -> None:
    plan = plan_of(write_config(tmp_path, LLAMA_3_70B), {"memory": 80 * GIB, "device": "cuda"})
    assert plan.advice[0].sentence == (
        "Raise tensor_parallel_size to 2 devices with as much memory each; no executor installed here runs so many."
    )


def test_faults_have_their_numbers(site_packages: Any, tmp_path: Path) -> None:
    install_lora_plugin(site_packages)
    model = write_config(tmp_path, LLAMA_3_8B)
    static = 16_060_522_496 + 4_194_304 + 256 * 128256 * 32  # weights, rotary tables, activations
    assert plan_of(model, {"memory": 10**10, "device": "cuda"}).faults == (
        f"Weights, rotary tables and activations take {static:,} bytes of each device, and only 10,000,000,000 are "
        "free.",
    )
    assert (
        plan_of(model, {"memory": 10**10, "device": "cpu", "dtype": "bfloat16", "max_loras": 1, **LORA})
        .faults[0]
        .startswith("Weights, rotary tables and adapters take ")
    )
    too_large = {"memory": 24 * GIB, "device": "cuda", "kv_cache_memory_bytes": 10 * GIB}
    assert plan_of(model, too_large).faults == (
        f"The KV cache of {10 * GIB:,} bytes does not fit beside the {static:,} bytes of the rest: "
        f"{24 * GIB - static:,} are free.",
    )
