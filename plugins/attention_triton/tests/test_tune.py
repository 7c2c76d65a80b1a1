"""The tuner, its GPU played by numbers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest

from octavo.plugins import tuned_data
from octavo.plugins.tuned_data import as_text, cases_of
from octavo_attention_triton import tune
from octavo_attention_triton.tune import Case
from octavo_attention_triton.tuned import CONFIGS

DECODE = Case(kernel="paged_decode", when={"bits": 16, "kv_bits": 16, "head_dim": 128})
PREFILL = Case(kernel="flash_prefill", when={"bits": 16, "kv_bits": 16, "head_dim": 128, "max_query_len": 512})
FACTS = {"gpu": "Imagined", "versions": {"triton": "3"}, "date": "2026-01-02", "multiprocessors": 7}


# ------------------------------------------------------------------------------------------------ selection


def test_long_prefills_are_timed_on_whole_prompts_too() -> None:
    assert [workload.context for workload in PREFILL.workloads()] == [1024, 0]
    short = Case(kernel="flash_prefill", when={**PREFILL.when, "max_query_len": 64})
    assert [workload.context for workload in short.workloads()] == [1024]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_are_among_the_candidates(path: Any) -> None:
    document = json.loads(path.read_text())
    entries = [one for of_kernel in document["kernels"].values() for one in of_kernel]
    for case, one in zip(cases_of(document, Case), entries, strict=True):
        assert one["config"] in case.candidates(), case


# ------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_are_as_the_tuner_writes_them(path: Any) -> None:
    assert as_text(json.loads(path.read_text())) == path.read_text()


# -------------------------------------------------------------------------------------------------- the GPU


def test_machine_without_a_gpu_is_told_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tune.main([]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err


def test_only_the_cases_that_are_asked_for_are_measured(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tuned_data, "gpu_facts", lambda distribution: FACTS)
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
