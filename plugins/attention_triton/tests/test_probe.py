"""Where the Triton backends are chosen, and what they say where they are not."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from octavo.plugins.host import discover
from octavo.plugins.registry import Registry
from octavo.plugins.specs import AttentionNeed
from octavo_attention_triton.probe import why_not

CUDA = AttentionNeed(device="cuda", dtype="bfloat16", num_heads=32, num_kv_heads=8, head_dim=128, block_size=16)
CPU = replace(CUDA, device="cpu")
FP8 = replace(CUDA, kv_cache_dtype="fp8", features=frozenset({"fp8_kv_cache"}))


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")


def test_cpu_is_refused_and_told_of_the_interpreter() -> None:
    (reason,) = why_not(CPU)
    assert reason.startswith("Triton needs a GPU")
    assert "TRITON_INTERPRET=1" in reason


def test_cpu_serves_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not(CPU) == []


def test_plan_for_a_gpu_elsewhere_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, None)
    assert why_not(CUDA) == why_not(FP8) == []


def test_gpu_that_is_too_old_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    assert why_not(CUDA) == ["needs a GPU of compute capability 8.0 or newer; A GPU has 7.5"]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_newer_gpus_serve(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    pretend_gpu(monkeypatch, capability)
    assert why_not(CUDA) == []


def test_gpu_that_cannot_convert_fp8_is_refused_for_an_fp8_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (8, 6))
    assert why_not(CUDA) == []
    (reason,) = why_not(FP8)
    assert reason.startswith("an fp8 KV cache needs a GPU of compute capability 8.9 or newer; A GPU has 8.6.")


@pytest.mark.parametrize("head_dim", [8, 320])
def test_head_size_that_fits_no_tile_is_refused(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    pretend_gpu(monkeypatch, None)
    reasons = why_not(replace(CUDA, head_dim=head_dim))
    assert reasons == [f"supports head sizes from 16 to 256; the model has {head_dim}"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is published for Linux only")
@pytest.mark.parametrize(("phase", "chosen"), [("prefill", "triton-flash"), ("decode", "triton-paged")])
def test_of_the_two_auto_takes_the_one_made_for_the_phase(
    monkeypatch: pytest.MonkeyPatch, phase: str, chosen: str
) -> None:
    pretend_gpu(monkeypatch, None)
    ranked = [
        (one.spec.priority_for(phase), one.spec.name)
        for one in Registry(discover()).ask("attention", replace(CUDA, features=frozenset({phase})))
        if one.plugin.name == "attention-triton" and not one.reasons
    ]
    assert max(ranked)[1] == chosen
    assert len(ranked) == 2
