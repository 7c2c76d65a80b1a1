"""CpuInt4 and CpuInt8: groups, order and blocks of the operators, few and many rows, and what the probe says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from octavo.interfaces import AffineWeight, LinearKernel, WeightFacts
from octavo.plugins.specs import LinearKernelNeed, Need
from octavo_linear_cpu import int4, int8, nibbles, probe
from octavo_linear_cpu.int4 import CpuInt4
from octavo_linear_cpu.int8 import CpuInt8

Probe = Callable[[Need], list[str]]
NEED = LinearKernelNeed(device="cpu", dtype="bfloat16", form="affine")


def draw(
    bits: int = 4, in_features: int = 128, out_features: int = 80, group_size: int = 32, index: list[int] | None = None
) -> AffineWeight:
    generator = torch.Generator().manual_seed(in_features)
    num_groups = -(-in_features // group_size)
    return AffineWeight(
        bits=bits,
        codes=torch.randint(2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scales=torch.rand(num_groups, out_features, generator=generator).half() + 0.1,
        zeros=torch.randint(2**bits, (num_groups, out_features), generator=generator, dtype=torch.uint8),
        group_size=group_size,
        group_index=None if index is None else torch.tensor(index, dtype=torch.int32),
    )


def error(kernel: LinearKernel, weight: AffineWeight, num_tokens: int) -> float:
    """Of the product with random x, as a share of |x| @ |W|.T."""
    x = torch.randn(num_tokens, weight.codes.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    y = kernel.apply(kernel.prepare(weight), x, None).double()
    dense = weight.dequantize().double()
    return float(((y - x.double() @ dense.T).abs() / (x.double().abs() @ dense.abs().T)).max())


# ------------------------------------------------------------------------------------------- groups and their order


@pytest.mark.parametrize(
    ("sizes", "group_size"),
    [
        ([128] * 4, 128),
        ([64] * 9, 64),
        ([576], 64),  # without groups: the largest that divides
        ([512], 256),
        ([1024, 1024], 256),
        ([96] * 3, 32),
        ([64, 64, 32], 32),  # a short last group
        ([30, 34, 64], 32),  # a device's share of act-order
    ],
)
def test_group_size_of_the_operator_is_that_of_the_least_memory(sizes: list[int], group_size: int) -> None:
    assert nibbles.choose_group_size(sizes) == group_size


def test_inputs_of_one_group_come_together_and_each_group_is_padded() -> None:
    groups = torch.tensor([1, 0] * 20 + [1] * 24)  # 20 and 44 inputs
    order, group_of = nibbles.order_by_group(groups, 32)
    nothing = len(groups)
    assert group_of.tolist() == [0, 1, 1]
    assert order[:20].tolist() == list(range(1, 40, 2))
    assert order[20:32].tolist() == [nothing] * 12
    assert order[32:76].tolist() == [*range(0, 40, 2), *range(40, 64)]
    assert order[76:].tolist() == [nothing] * 20


def test_groups_that_no_input_is_in_take_no_memory() -> None:
    order, group_of = nibbles.order_by_group(torch.tensor([3] * 32 + [1] * 32), 32)
    assert (len(order), group_of.tolist()) == (64, [1, 3])


@pytest.mark.parametrize("num_tokens", [3, 64])
def test_share_of_act_order_with_uneven_groups_is_right(num_tokens: int) -> None:
    index = torch.randint(4, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    assert error(CpuInt4(torch.bfloat16, "cpu"), draw(index=index), num_tokens) < 8e-3


def test_inputs_in_order_are_not_gathered() -> None:
    kernel = CpuInt4(torch.bfloat16, "cpu")
    assert kernel.prepare(draw()).order is None
    assert kernel.prepare(draw(index=[0, 1, 2, 3] * 32)).order is not None


@pytest.mark.parametrize(("group_size", "refused"), [(16, True), (48, True), (32, False), (96, False), (512, False)])
def test_groups_that_would_be_padded_everywhere_are_refused(group_size: int, refused: bool) -> None:
    facts = WeightFacts(form="affine", bits=4, in_features=1024, out_features=64, group_size=group_size)
    assert bool(CpuInt4(torch.bfloat16, "cpu").why_not(facts)) == refused


# ------------------------------------------------------------------------------------------------ few and many rows


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_ways_to_multiply_agree(bits: int) -> None:
    prepared = CpuInt4(torch.bfloat16, "cpu").prepare(draw(bits))
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    outputs = nibbles.outputs_interleaved()
    assert outputs is not None
    by_operator, dequantised = int4._by_operator(prepared, x), int4._dequantised(prepared, x, outputs)
    torch.testing.assert_close(dequantised, by_operator, rtol=2e-2, atol=2e-2 * by_operator.abs().max().item())


def test_dequantising_some_blocks_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, kernel = draw(out_features=200), CpuInt4(torch.bfloat16, "cpu")
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    at_once = kernel.apply(kernel.prepare(weight), x, None)
    monkeypatch.setattr(int4, "_MOST_WEIGHTS_AT_ONCE", 1)
    torch.testing.assert_close(kernel.apply(kernel.prepare(weight), x, None), at_once, rtol=1e-2, atol=1e-2)


def test_order_of_nibbles_that_is_not_known_leaves_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nibbles, "outputs_interleaved", lambda: None)
    monkeypatch.setattr(int4, "_dequantised", None)
    assert error(CpuInt4(torch.bfloat16, "cpu"), draw(), 64) < 8e-3


def test_packing_in_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = draw(out_features=192).codes
    whole = nibbles.pack(codes)
    monkeypatch.setattr(nibbles, "_PACKED_AT_ONCE", 1)
    assert torch.equal(nibbles.pack(codes), whole)


# ------------------------------------------------------------------------------------------------------------- int8


def test_int8_refuses_what_the_operator_would_read_past() -> None:
    facts = WeightFacts(form="affine", bits=8, in_features=100, out_features=64, group_size=100, symmetric=True)
    (reason,) = CpuInt8(torch.bfloat16, "cpu").why_not(facts)
    assert "multiple of 16" in reason
    assert "100" in reason


@pytest.mark.parametrize("num_tokens", [int8._OPERATOR_ROWS, int8._OPERATOR_ROWS + 1])
def test_int8_is_right_on_both_sides_of_the_crossover(num_tokens: int) -> None:
    weight = draw(8, group_size=128)
    symmetric = AffineWeight(bits=8, codes=weight.codes, scales=weight.scales, zeros=None, group_size=128)
    assert error(CpuInt8(torch.bfloat16, "cpu"), symmetric, num_tokens) < 8e-3


# ------------------------------------------------------------------------------------------------------------ probe


@pytest.fixture(autouse=True)
def _forget_what_was_probed() -> None:
    probe._why_not.cache_clear()


@pytest.mark.parametrize("why_not", [probe.why_not_int4, probe.why_not_int8])
def test_torch_without_the_operators_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, why_not: Probe) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.ops, "aten", object())
    (reason,) = why_not(NEED)
    assert "cannot multiply with its operator _weight_int" in reason


@pytest.mark.parametrize(("kernel", "why_not"), [(CpuInt4, probe.why_not_int4), (CpuInt8, probe.why_not_int8)])
def test_operator_that_is_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, kernel: type[LinearKernel], why_not: Probe
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    right = kernel.apply
    monkeypatch.setattr(kernel, "apply", lambda self, prepared, x, bias: 1.05 * right(self, prepared, x, bias))
    (reason,) = why_not(NEED)
    assert "wrong products" in reason


def test_cpu_for_which_torch_has_no_vectorised_operator_is_refused() -> None:
    code = (
        "from octavo.plugins.specs import LinearKernelNeed as Need; from octavo_linear_cpu import probe;"
        "need = Need(device='cpu', dtype='bfloat16', form='affine');"
        "print(*probe.why_not_int4(need), *probe.why_not_int8(need))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("torch finds DEFAULT") == 2


@pytest.mark.parametrize("capability", ["avx512", "avx2"])
def test_each_instruction_sets_order_of_nibbles_is_known(capability: str) -> None:
    """Of a CPU that has less, torch takes what is there."""
    code = "from octavo_linear_cpu import nibbles; print(nibbles.outputs_interleaved())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in {"64", "32"}
