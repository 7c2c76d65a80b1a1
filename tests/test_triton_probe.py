"""Which machines run Triton kernels, and what is said of the others."""

from __future__ import annotations

import pytest
import torch

from octavo.plugins.specs import Need
from octavo.plugins.triton_probe import why_not

CPU, CUDA = Need(device="cpu", dtype="bfloat16"), Need(device="cuda", dtype="bfloat16")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


def test_cpu_is_refused_and_told_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (reason,) = why_not(CPU)
    assert "TRITON_INTERPRET=1" in reason


def test_cpu_serves_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not(CPU) == []


def test_plan_for_a_gpu_elsewhere_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, None)
    assert why_not(CUDA) == []


def test_gpu_that_is_too_old_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    assert why_not(CUDA) == ["needs a GPU of compute capability 8.0 or newer; Tesla T4 has 7.5"]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_newer_gpus_serve(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    pretend_gpu(monkeypatch, capability)
    assert why_not(CUDA) == []
