"""What "auto" comes to before an engine is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_llama

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.selection import Selection, select


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def selected(folder: Path, device: str, **settings: Any) -> Selection:
    return select(EngineConfig.create(model=str(folder), **settings), device=device)


def test_two_steps_are_in_flight_on_a_gpu_and_one_on_a_cpu(folder: Path) -> None:
    assert selected(folder, "cuda").max_steps_in_flight == 2
    assert selected(folder, "cpu").max_steps_in_flight == 1


def test_one_step_is_in_flight_where_guesses_are_verified(folder: Path) -> None:
    pytest.importorskip("octavo_proposer_ngram")
    assert selected(folder, "cuda", proposer="ngram").max_steps_in_flight == 1


def test_as_many_steps_are_in_flight_as_the_user_says(folder: Path) -> None:
    assert selected(folder, "cuda", max_steps_in_flight=1).max_steps_in_flight == 1
    assert selected(folder, "cpu", max_steps_in_flight=3).max_steps_in_flight == 3


def test_an_fp8_cache_is_asked_for_as_a_feature(folder: Path) -> None:
    need = selected(folder, "cpu", kv_cache_dtype="fp8").attention_need
    assert need.kv_cache_dtype == "fp8"
    assert "fp8_kv_cache" in need.features


def test_a_root_of_adapters_that_no_plugin_serves_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"No installed plugin finds adapters in lora_root='/srv'"):
        selected(folder, "cpu", enable_lora=True, lora_root="/srv", plugins={"allow": []})
