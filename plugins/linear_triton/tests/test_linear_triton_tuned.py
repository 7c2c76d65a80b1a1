"""Which sizes a product gets, what shipped files say, and how they are measured anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.plugins.tuned_data import as_text, cases_of
from octavo_linear_triton import tune
from octavo_linear_triton.tune import Case
from octavo_linear_triton.tuned import CONFIGS, ProductConfig, most_splits, product_config, product_heuristic

FILES = sorted(CONFIGS.glob("sm_*.json"))


def shipped(path: Path = FILES[-1]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kernel", ["affine_linear", "lookup_linear"])
def test_shipped_configuration_of_each_case_is_the_one_that_is_chosen(path: Path, kernel: str) -> None:
    capability = int(path.stem.removeprefix("sm_"))
    for one in shipped(path)["kernels"][kernel]:
        when = one["when"]
        dtype = {16: torch.bfloat16, 32: torch.float32}[when["dtype_bits"]]
        chosen = product_config(capability, kernel, when["bits"], dtype, when["num_tokens"])
        assert chosen == ProductConfig(**one["config"]), when


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_that_was_not_measured_says_so(path: Path) -> None:
    document = shipped(path)
    measured = [one for entries in document["kernels"].values() for one in entries if "microseconds" in one]
    assert bool(measured) == (document["gpu"] is not None) == (document["date"] is not None)
    assert measured or document["source"].startswith("not measured")


def test_many_tokens_are_left_to_dequantised_weights() -> None:
    sizes = [product_config(90, "affine_linear", 4, torch.bfloat16, number) for number in (1, 128, 129, 4096)]
    assert [size is None for size in sizes] == [False, False, True, True]


def test_gpu_without_a_file_gets_the_heuristic() -> None:
    assert product_config(89, "affine_linear", 4, torch.float16, 5) == product_heuristic(16, 8)


@pytest.mark.parametrize(("outputs", "splits"), [(4096, 4 * 132 // 32), (14336, 4 * 132 // 112), (128256, 1)])
def test_inputs_are_cut_until_every_multiprocessor_has_its_programs(outputs: int, splits: int) -> None:
    config = ProductConfig(block_outputs=128, block_tokens=8, num_warps=4, num_stages=4, programs=4)
    assert most_splits(90, config, torch.zeros(1, 4096), outputs) == splits


# ------------------------------------------------------------------------------------------------- the tuner


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_configurations_are_among_the_candidates(path: Path) -> None:
    entries = [one for of_kernel in shipped(path)["kernels"].values() for one in of_kernel]
    for case, one in zip(cases_of(shipped(path), Case), entries, strict=True):
        assert one["config"] in case.candidates(), case


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_are_as_the_tuner_writes_them(path: Path) -> None:
    assert as_text(shipped(path)) == path.read_text()


def test_machine_without_a_gpu_is_told_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tune.main([]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err
