"""Which tiles a kernel gets."""

from __future__ import annotations

import json
import timeit
from pathlib import Path

import pytest
import torch

from octavo_attention_triton import tuned
from octavo_attention_triton.tuned import CONFIGS, PagedConfig, flash_config, paged_config

FILES = sorted(CONFIGS.glob("sm_*.json"))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tuned, "CONFIGS", tmp_path)
    return tmp_path


def write_entry(folder: Path, **when: int) -> None:
    config = {"block_n": 7, "num_warps": 4, "num_stages": 1}
    (folder / "sm_12.json").write_text(json.dumps({"kernels": {"paged_decode": [{"when": when, "config": config}]}}))


@pytest.mark.parametrize(
    ("head_dim", "fp8", "block_n"), [(128, False, 7), (64, False, 7), (256, False, 32), (128, True, 64)]
)
def test_entry_for_other_elements_or_a_smaller_head_does_not_fit(
    folder: Path, head_dim: int, fp8: bool, block_n: int
) -> None:
    write_entry(folder, bits=16, kv_bits=16, head_dim=128)
    paged_config.cache_clear()
    chosen = paged_config(12, torch.bfloat16, head_dim, 4, 16, fp8)
    paged_config.cache_clear()
    assert chosen.block_n == block_n


def test_odd_head_size_takes_the_tiles_of_the_next_power_of_two() -> None:
    assert paged_config(90, torch.bfloat16, 80, 4, 16, False) == paged_config(90, torch.bfloat16, 128, 4, 16, False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_configuration_of_each_case_is_the_one_that_is_chosen(path: Path) -> None:
    capability = int(path.stem.removeprefix("sm_"))
    for one in json.loads(path.read_text())["kernels"]["paged_decode"]:
        when = one["when"]
        dtype = {16: torch.bfloat16, 32: torch.float32}[when["bits"]]
        chosen = paged_config(capability, dtype, when["head_dim"], 4, 16, when["kv_bits"] == 8)
        assert chosen == PagedConfig(**one["config"]), when


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_that_was_not_measured_says_so(path: Path) -> None:
    document = json.loads(path.read_text())
    measured = [one for entries in document["kernels"].values() for one in entries if "microseconds" in one]
    assert bool(measured) == (document["gpu"] is not None) == (document["date"] is not None)
    assert measured or document["source"].startswith("not measured")


def test_long_prefills_take_more_rows_than_short_ones() -> None:
    short, long = (flash_config(90, torch.bfloat16, 128, rows, False) for rows in (16, 4096))
    assert short.block_m < long.block_m


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("fp8", [False, True])
def test_gpu_without_a_file_gets_tiles_that_fit_in_its_shared_memory(
    dtype: torch.dtype, head_dim: int, fp8: bool
) -> None:
    kv_bytes = 1 if fp8 else dtype.itemsize
    padded = 1 << (head_dim - 1).bit_length()
    flash = flash_config(89, dtype, head_dim, 4096, fp8)
    queries, keys = flash.block_m * padded * dtype.itemsize, flash.block_n * padded * kv_bytes
    assert queries + 2 * flash.num_stages * keys <= 99 * 1024
    paged = paged_config(89, dtype, head_dim, 4, 16, fp8)
    assert 2 * paged.num_stages * paged.block_n * padded * kv_bytes <= 99 * 1024


def test_interpreter_gets_small_tiles_whatever_is_asked() -> None:
    assert paged_config(0, torch.float32, 256, 4, 16, False).num_stages == 1
    assert flash_config(0, torch.bfloat16, 256, 4096, True).block_m == 32


def test_asking_again_costs_less_than_a_microsecond() -> None:
    def ask() -> None:
        flash_config(90, torch.bfloat16, 128, 300, False)
        paged_config(90, torch.bfloat16, 128, 4, 16, False)

    assert min(timeit.repeat(ask, number=1000, repeat=20)) / 1000 / 2 < 1e-6


def test_multiprocessors_of_a_gpu_that_is_not_there_are_those_of_its_file() -> None:
    assert tuned.num_multiprocessors(90, "cpu") == 132
    assert tuned.num_multiprocessors(80, "cpu") == 108
