"""Which sizes a product gets, what shipped files say, and how they are measured anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo_linear_triton import tune
from octavo_linear_triton.tune import Case, Config, Measured, Shape, as_text, best, cases_of, with_measured
from octavo_linear_triton.tuned import CONFIGS, ProductConfig, most_splits, nearest, product_config, product_heuristic

FILES = sorted(CONFIGS.glob("sm_*.json"))
DECODE = Case(kernel="affine_linear", when={"dtype_bits": 16, "bits": 4, "num_tokens": 8})
CONFIG = {"block_outputs": 64, "block_tokens": 8, "num_warps": 8, "num_stages": 3, "programs": 2}
FACTS = {"gpu": "Imagined", "versions": {"triton": "3"}, "date": "2026-01-02", "multiprocessors": 7}


def shipped(path: Path = FILES[-1]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def entry(number: int, **when: int) -> dict[str, Any]:
    return {"when": when, "config": {"number": number}}


def test_nearest_size_is_taken_by_its_logarithm() -> None:
    entries = [entry(1, dtype_bits=16, num_tokens=8), entry(2, dtype_bits=16, num_tokens=64)]
    found = [nearest(entries, {"dtype_bits": 16, "num_tokens": number}) for number in (16, 32)]
    assert found == [{"number": 1}, {"number": 2}]


def test_entry_for_other_activations_does_not_fit() -> None:
    assert nearest([entry(1, dtype_bits=16)], {"dtype_bits": 32}) is None


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


def no_faults(case: Case, config: Config) -> list[str]:
    return []


def test_fastest_candidate_is_taken() -> None:
    found = best(DECODE, no_faults, lambda case, shape, config: 1.0 if config == CONFIG else 2.0)
    assert found.config == CONFIG


def test_candidate_with_faults_is_neither_timed_nor_taken() -> None:
    timed: set[int] = set()

    def seconds(case: Case, shape: Shape, config: Config) -> float:
        timed.add(config["num_warps"])
        return config["num_warps"] / 8

    found = best(DECODE, lambda case, config: ["spills"] if config["num_warps"] == 4 else [], seconds)
    assert (found.config["num_warps"], timed) == (8, {8})


def test_case_that_no_candidate_serves_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"affine_linear: none of .* spills a lot.*smaller tiles"):
        best(DECODE, lambda case, config: ["spills a lot"], lambda *_: 1.0)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_configurations_are_among_the_candidates(path: Path) -> None:
    entries = [one for of_kernel in shipped(path)["kernels"].values() for one in of_kernel]
    for case, one in zip(cases_of(shipped(path)), entries, strict=True):
        assert one["config"] in case.candidates(), case


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_are_as_the_tuner_writes_them(path: Path) -> None:
    assert as_text(shipped(path)) == path.read_text()


def test_measured_entry_takes_its_cases_place_and_the_others_stay() -> None:
    before = shipped()
    after = with_measured(before, [Measured(case=DECODE, config=CONFIG, seconds=1.5e-5)], FACTS)
    changed = [one for one in after["kernels"]["affine_linear"] if one not in before["kernels"]["affine_linear"]]
    assert changed == [{"when": DECODE.when, "config": CONFIG, "microseconds": 15.0}]
    assert after["kernels"]["lookup_linear"] == before["kernels"]["lookup_linear"]
    assert "measured by octavo_linear_triton.tune where" in after["source"]


def test_machine_without_a_gpu_is_told_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err
