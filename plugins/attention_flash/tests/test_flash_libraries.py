"""What the probes say of libraries, GPUs and needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.plugins.specs import AttentionNeed
from octavo_attention_flash.libraries import find_library, why_not_flash_attention, why_not_flashinfer

NEED = AttentionNeed(
    device="cuda",
    dtype="bfloat16",
    features=frozenset({"prefill"}),
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    block_size=16,
)
OLD, AMPERE, HOPPER, BLACKWELL, GEFORCE_BLACKWELL = (7, 5), (8, 0), (9, 0), (10, 0), (12, 0)

Install = Callable[..., None]
SetGPU = Callable[[tuple[int, int] | None], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SetGPU:
    """A function that gives this machine a GPU of a compute capability, or none."""

    def set_gpu(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return set_gpu


def found(need: AttentionNeed = NEED) -> str | None:
    library = find_library(need)
    return None if library is None else library.title


def test_without_any_library_the_reason_says_what_to_install(gpu: SetGPU) -> None:
    gpu(HOPPER)
    [reason] = why_not_flash_attention(NEED)
    assert reason.startswith(
        "needs FlashAttention, of which no generation is installed. `pip install --pre flash-attn-4`"
    )


@pytest.mark.parametrize(
    ("capability", "generation"),
    [
        (None, "FlashAttention-3"),  # a plan for another machine: nothing is known against any
        (AMPERE, "FlashAttention-2"),
        (HOPPER, "FlashAttention-3"),
        (BLACKWELL, "FlashAttention-4"),
        (GEFORCE_BLACKWELL, "FlashAttention-2"),
        (OLD, None),
    ],
)
def test_of_all_generations_the_first_that_the_gpu_can_run_is_taken(
    install: Install, gpu: SetGPU, capability: tuple[int, int] | None, generation: str | None
) -> None:
    install("flash-attn-2", "flash-attn-3", "flash-attn-4")
    gpu(capability)
    assert found(replace(NEED, block_size=256)) == generation


def test_hopper_is_served_by_the_fourth_generation_where_the_third_is_missing(install: Install, gpu: SetGPU) -> None:
    install("flash-attn-4")
    gpu(HOPPER)
    assert found() == "FlashAttention-4"


def test_large_pages_are_what_the_second_generation_asks_for(install: Install, gpu: SetGPU) -> None:
    install("flash-attn-2")
    gpu(AMPERE)
    assert why_not_flash_attention(NEED) == [
        "FlashAttention-2 (flash-attn 2.8.3.post2) reads pages of a multiple of 256 tokens only; block_size is 16: set "
        "block_size=256, or install FlashAttention-3 or FlashInfer, which take any"
    ]
    assert why_not_flash_attention(replace(NEED, block_size=512)) == []


def test_every_installed_generation_says_what_it_lacks(install: Install, gpu: SetGPU) -> None:
    install("flash-attn-2", "flash-attn-3", "flash-attn-4")
    gpu(GEFORCE_BLACKWELL)
    reasons = why_not_flash_attention(NEED)
    assert [reason.partition(" ")[0] for reason in reasons] == [f"FlashAttention-{number}" for number in (3, 4, 2)]
    assert "is made for compute capability 9.0 (Hopper); this GPU has 12.0" in reasons[0]


def test_generation_older_than_what_is_asked_of_it_is_refused(install: Install, gpu: SetGPU) -> None:
    install("flash-attn-2", version="2.5.9")
    gpu(AMPERE)
    [reason] = why_not_flash_attention(replace(NEED, block_size=256))
    assert reason == "FlashAttention-2 (flash-attn 2.5.9) is too old; 2.6 is the oldest that can serve"


@pytest.mark.parametrize(
    ("library", "capability", "able", "unable"),
    [
        ("flash-attn-2", AMPERE, (8, 72, 256), (7, 264)),
        ("flash-attn-3", HOPPER, (8, 72, 256), (7, 264)),
        ("flash-attn-4", HOPPER, (16, 80, 192, 256), (72, 264)),
        ("flash-attn-4", BLACKWELL, (16, 80, 128, 256), (72, 192)),
    ],
)
def test_head_sizes_of_a_generation(
    install: Install,
    gpu: SetGPU,
    library: str,
    capability: tuple[int, int],
    able: tuple[int, ...],
    unable: tuple[int, ...],
) -> None:
    install(library)
    gpu(capability)
    for head_dim in able + unable:
        need = replace(NEED, head_dim=head_dim, block_size=256)
        reasons = why_not_flash_attention(need)
        assert (not reasons) == (head_dim in able), reasons
        assert head_dim in able or f"the model has {head_dim}" in reasons[0]


def test_flashinfer_without_a_compiler_or_built_kernels_is_refused(
    gpu: SetGPU, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu(HOPPER)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    [reason] = why_not_flashinfer(NEED)
    assert "no CUDA compiler (nvcc) here" in reason
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert why_not_flashinfer(NEED) == []


def test_flashinfer_is_not_refused_in_a_plan_for_another_machine(gpu: SetGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(None)
    monkeypatch.setenv("PATH", "")
    assert why_not_flashinfer(NEED) == []


def test_flashinfer_needs_a_gpu_that_computes_in_bfloat16(gpu: SetGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(OLD)
    monkeypatch.setattr("octavo_attention_flash.libraries._has_flashinfer_kernels", lambda: True)
    assert why_not_flashinfer(NEED) == ["serves compute capability 8.0 (Ampere) and later; this GPU has 7.5"]
