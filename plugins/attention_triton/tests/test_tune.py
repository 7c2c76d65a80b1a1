"""The tuner, its GPU played by numbers."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from typing import Any

import pytest

from octavo_attention_triton import tune
from octavo_attention_triton.tune import Case, Config, Measured, Workload, as_text, best, cases_of, with_measured
from octavo_attention_triton.tuned import CONFIGS

DECODE = Case(kernel="paged_decode", when={"bits": 16, "kv_bits": 16, "head_dim": 128})
PREFILL = Case(kernel="flash_prefill", when={"bits": 16, "kv_bits": 16, "head_dim": 128, "max_query_len": 512})
FACTS = {"gpu": "Imagined", "versions": {"triton": "3"}, "date": "2026-01-02", "multiprocessors": 7}


def shipped() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((CONFIGS / "sm_90.json").read_text())
    return document


def no_faults(case: Case, config: Config) -> list[str]:
    return []


def measured(case: Case, **config: int) -> Measured:
    return Measured(case=case, config=config, seconds=1.5e-5)


# ------------------------------------------------------------------------------------------------ selection


def test_fastest_candidate_is_taken() -> None:
    wanted = {"block_n": 32, "num_warps": 8, "num_stages": 3}
    found = best(DECODE, no_faults, lambda case, workload, config: 1.0 if config == wanted else 2.0)
    assert found == Measured(case=DECODE, config=wanted, seconds=1.0)


def test_candidate_with_faults_is_neither_timed_nor_taken() -> None:
    timed: list[int] = []

    def seconds(case: Case, workload: Workload, config: Config) -> float:
        timed.append(config["num_warps"])
        return config["num_warps"] / 8

    found = best(DECODE, lambda case, config: ["spills"] if config["num_warps"] == 4 else [], seconds)
    assert found.config["num_warps"] == 8
    assert set(timed) == {8}


def test_workloads_count_alike_whatever_they_take() -> None:
    long = max(DECODE.workloads(), key=lambda workload: workload.num_requests)

    def seconds(case: Case, workload: Workload, config: Config) -> float:
        if config["block_n"] == 16:  # a little faster on the longest, much slower on the others
            return 0.9 if workload == long else 2e-3
        return 1.0 if workload == long else 1e-3

    found = best(DECODE, no_faults, seconds)
    assert found.config["block_n"] != 16
    assert found.seconds == pytest.approx(math.prod([1.0, 1e-3, 1e-3]) ** (1 / 3))


def test_case_that_no_candidate_serves_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"paged_decode: none of 32 .* spills a lot.*smaller tiles"):
        best(DECODE, lambda case, config: ["spills a lot"], lambda *_: 1.0)


def test_long_prefills_are_timed_on_whole_prompts_too() -> None:
    assert [workload.context for workload in PREFILL.workloads()] == [1024, 0]
    short = Case(kernel="flash_prefill", when={**PREFILL.when, "max_query_len": 64})
    assert [workload.context for workload in short.workloads()] == [1024]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_are_among_the_candidates(path: Any) -> None:
    document = json.loads(path.read_text())
    entries = [one for of_kernel in document["kernels"].values() for one in of_kernel]
    for case, one in zip(cases_of(document), entries, strict=True):
        assert one["config"] in case.candidates(), case


# ------------------------------------------------------------------------------------------------- the file


def test_text_reads_back_as_the_document() -> None:
    document = with_measured(shipped(), [measured(DECODE, block_n=16, num_warps=8, num_stages=4)], FACTS)
    assert json.loads(as_text(document)) == document


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_are_as_the_tuner_writes_them(path: Any) -> None:
    assert as_text(json.loads(path.read_text())) == path.read_text()


def test_measured_entry_takes_its_cases_place_and_the_others_stay() -> None:
    config = {"block_n": 16, "num_warps": 8, "num_stages": 4}
    before, after = shipped()["kernels"], with_measured(shipped(), [measured(DECODE, **config)], FACTS)["kernels"]
    changed = [one for one in after["paged_decode"] if one not in before["paged_decode"]]
    assert changed == [{"when": DECODE.when, "config": config, "microseconds": 15.0}]
    assert after["flash_prefill"] == before["flash_prefill"]
    assert [one["when"] for one in after["paged_decode"]] == [one["when"] for one in before["paged_decode"]]


def test_file_says_what_was_measured_and_what_was_not() -> None:
    once = with_measured(shipped(), [measured(DECODE, block_n=16)], FACTS)
    assert once["gpu"] == "Imagined"
    assert once["source"].startswith("measured by octavo_attention_triton.tune where")
    assert once["source"].endswith(shipped()["source"])
    twice = with_measured(once, [measured(PREFILL, block_m=16)], FACTS)
    assert twice["source"] == once["source"]


def test_file_whose_every_entry_was_measured_says_only_that() -> None:
    document = with_measured(shipped(), [measured(case, block_n=16) for case in cases_of(shipped())], FACTS)
    assert document["source"] == "measured by octavo_attention_triton.tune"


# -------------------------------------------------------------------------------------------------- the GPU


def test_machine_without_a_gpu_is_told_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err


def test_only_the_cases_that_are_asked_for_are_measured(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune._GPU, "facts", lambda self: FACTS)
    monkeypatch.setattr(tune._GPU, "faults", lambda self, case, config: [])
    monkeypatch.setattr(tune._GPU, "seconds", lambda self, case, workload, config: config["block_n"] / 1e6)
    out = tmp_path / "sm_90.json"
    assert tune.main(["--kernel", "paged_decode", "--head-dim", "128", "--out", str(out)]) == 0
    entries = [one for of_kernel in json.loads(out.read_text())["kernels"].values() for one in of_kernel]
    new = [one for one in entries if "microseconds" in one]
    assert {one["when"]["head_dim"] for one in new} == {128}
    assert all("max_query_len" not in one["when"] for one in new)
    assert {one["config"]["block_n"] for one in new} == {16}
    assert f"{len(new)} entries measured" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is published for Linux only")
def test_candidate_that_spills_has_faults_and_one_that_does_not_has_none() -> None:
    gpu = tune._GPU(90)
    assert gpu.faults(DECODE, {"block_n": 64, "num_warps": 4, "num_stages": 2}) == []
    exact = Case(kernel="paged_decode", when={"bits": 32, "kv_bits": 32, "head_dim": 128})
    found = gpu.faults(exact, {"block_n": 32, "num_warps": 4, "num_stages": 2})
    assert any("spills" in fault for fault in found)
