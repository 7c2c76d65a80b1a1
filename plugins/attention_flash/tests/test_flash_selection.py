"""Whom `auto` takes for prefill and for decode, and what is said of those that cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from octavo.config import ComponentConfig
from octavo.errors import UnavailableComponentError
from octavo.plugins.attention_pair import choose_attention
from octavo.plugins.host import BUILTIN, Plugin, PluginHost
from octavo.plugins.registry import Candidate, Choice, Registry
from octavo.plugins.specs import AttentionNeed, AttentionSpec, Spec
from octavo_attention_flash import octavo_components

NEED = AttentionNeed(
    device="cuda",
    dtype="bfloat16",
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    block_size=16,
)
# The ranks of two kernels that other packages bring, one made for each phase.
KERNELS = [
    AttentionSpec(
        name=name,
        target="anywhere:Kernel",
        features=frozenset({"prefill", "decode"}),
        kv_layout="torch-nhd",
        priority=priority,
        decode_priority=decode_priority,
    )
    for name, priority, decode_priority in (("triton-flash", 10, 5), ("triton-paged", 5, 10))
]

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nvcc, so that FlashInfer could build its kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("octavo_attention_flash.libraries._has_flashinfer_kernels", lambda: True)


def choose(need: AttentionNeed, *others: Spec, prefill: str = "auto", decode: str = "auto") -> tuple[Choice, Choice]:
    plugins = [PluginHost().load(BUILTIN)]
    for name, specs in (("attention-flash", octavo_components()), ("kernels", others)):
        plugins.append(Plugin(name=name, distribution="octavo", version="0", module=name, specs=tuple(specs)))
    wishes = ComponentConfig(name=prefill), ComponentConfig(name=decode)
    return choose_attention(Registry(plugins), need, wishes)


def taken(*choices: Choice) -> list[str | None]:
    return [next((one.spec.name for one in choice.candidates if one.chosen), None) for choice in choices]


def candidate(choice: Choice, name: str) -> Candidate:
    return next(one for one in choice.candidates if one.spec.name == name)


def test_auto_takes_the_library_for_prefill_and_the_kernel_made_for_decode(install: Install) -> None:
    install("flash-attn-3")
    assert taken(*choose(NEED, *KERNELS)) == ["flash-attn", "triton-paged"]


def test_auto_takes_flashinfer_for_prefill_where_flash_attn_is_missing(install: Install) -> None:
    install("flashinfer")
    assert taken(*choose(NEED, *KERNELS)) == ["flashinfer", "triton-paged"]


def test_auto_takes_flash_attn_before_flashinfer(install: Install) -> None:
    install("flashinfer", "flash-attn-4")
    assert taken(*choose(NEED, *KERNELS)) == ["flash-attn", "triton-paged"]


def test_auto_takes_flash_attn_for_both_where_only_plain_torch_is_beside_it(install: Install) -> None:
    install("flash-attn-3")
    assert taken(*choose(NEED)) == ["flash-attn", "flash-attn"]


def test_auto_takes_flashinfer_for_prefill_and_plain_torch_for_decode(install: Install) -> None:
    install("flashinfer")
    assert taken(*choose(NEED)) == ["flashinfer", "torch"]


def test_auto_goes_on_without_either_library_and_says_what_to_install() -> None:
    prefill, decode = choose(NEED, *KERNELS)
    assert taken(prefill, decode) == ["triton-flash", "triton-paged"]
    assert candidate(prefill, "flash-attn").reasons[0].startswith("needs FlashAttention")
    assert candidate(prefill, "flashinfer").reasons == (
        "needs the Python package 'flashinfer', which is not installed; "
        "install it with `pip install flashinfer-python`",
    )


def test_flash_attn_by_name_with_small_pages_and_the_second_generation_is_an_error_that_says_so(
    install: Install,
) -> None:
    install("flash-attn-2")
    prefill, _ = choose(NEED, prefill="flash-attn")
    with pytest.raises(UnavailableComponentError, match=r"block_size is 16: set block_size=256"):
        prefill.get()


def test_flashinfer_is_not_offered_for_decode(install: Install) -> None:
    install("flashinfer")
    _, decode = choose(NEED, *KERNELS)
    assert candidate(decode, "flashinfer").reasons == ("does not support decode",)


def test_neither_takes_an_fp8_cache_or_float32_or_a_cpu(install: Install) -> None:
    install("flash-attn-3", "flashinfer")
    fp8 = replace(NEED, features=frozenset({"fp8_kv_cache"}), kv_cache_dtype="fp8")
    for need in (fp8, replace(NEED, dtype="float32"), replace(NEED, device="cpu")):
        prefill, _ = choose(need, *KERNELS)
        for name in ("flash-attn", "flashinfer"):
            assert candidate(prefill, name).reasons, f"{name} accepts {need}"
