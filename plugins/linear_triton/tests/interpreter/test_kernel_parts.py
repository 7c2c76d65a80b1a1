"""What products are made of: the numbers that codes become, the words they lie in, and the sum of partial sums."""

from __future__ import annotations

import pytest
import torch
from weights import act_order, affine, lookup

from octavo.interfaces import WeightFacts
from octavo_linear_triton.affine import TritonAffine
from octavo_linear_triton.kernels.codes import exponent_of
from octavo_linear_triton.kernels.dequantize import dequantize
from octavo_linear_triton.kernels.partials import Partials, add_partials, add_partials_reference
from octavo_linear_triton.layout import PackedAffine, bias_of, code_dtype_for, pack_affine, pack_lookup
from octavo_linear_triton.lookup import TritonLookup


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_code_in_the_low_bits_is_itself_and_the_bias(bits: int, dtype: torch.dtype) -> None:
    code_dtype = code_dtype_for(bits, dtype, interpreted=False)
    codes = torch.arange(2**bits)
    numbers = ((exponent_of(code_dtype) & 0xFFFF) | codes).to(torch.int16).view(code_dtype)
    assert torch.equal(numbers.float(), (codes + bias_of(code_dtype)).float())
    zeros = (codes + bias_of(code_dtype)).to(code_dtype)
    differences = numbers[:, None] - zeros[None, :]  # rounded to the dtype
    assert torch.equal(differences.float(), (codes[:, None] - codes[None, :]).float())


def test_both_halves_of_the_exponent_are_the_same() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert exponent_of(dtype) >> 16 == exponent_of(dtype) & 0xFFFF


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [24, 32, 128])
def test_dequantised_affine_weight_is_the_reference_rounded_once(bits: int, group_size: int) -> None:
    weight = affine(bits, 200, 33, group_size=group_size, group_index=act_order(200, group_size))
    packed = pack_affine(weight, torch.float16)
    assert torch.equal(dequantize(packed, torch.float32), weight.dequantize())
    assert torch.equal(dequantize(packed, torch.float16), weight.dequantize().half())


@pytest.mark.parametrize("density", [0.0, 0.1])
def test_dequantised_lookup_weight_is_the_reference(density: float) -> None:
    weight = lookup(3, 100, 33, density=density)
    assert torch.equal(dequantize(pack_lookup(weight, torch.float32), torch.float32), weight.dequantize())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("num_sums", "num_tokens", "out_features"), [(1, 3, 5), (4, 2, 700)])
def test_partial_sums_are_added(num_sums: int, num_tokens: int, out_features: int, with_bias: bool) -> None:
    sums = torch.randn(num_sums, num_tokens, out_features)
    bias = torch.randn(out_features) if with_bias else None
    partials = Partials(sums=sums, num_splits=num_sums, blocks_per_split=1)
    found = add_partials(partials, bias, torch.float32)
    assert (found.double() - add_partials_reference(sums, bias)).abs().max() < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 128, 300])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bytes_of_an_affine_weight_are_those_that_a_plan_counts(bits: int, group_size: int, symmetric: bool) -> None:
    weight = affine(bits, 300, 40, group_size=group_size, symmetric=symmetric)
    packed = pack_affine(weight, torch.float16)
    tensors = [packed.codes.words, packed.codes.order, packed.scales, packed.zeros]
    wanted = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert TritonAffine(torch.float16, "cpu").num_bytes(weight.facts) == wanted


def test_bytes_of_a_lookup_weight_are_those_that_a_plan_counts() -> None:
    weight = lookup(3, 300, 40, density=0.1)
    packed = pack_lookup(weight, torch.float16)
    assert packed.codes.order is not None
    wanted = packed.codes.words.nbytes + packed.codes.order.nbytes + packed.table.nbytes
    assert TritonLookup(torch.float16, "cpu").num_bytes(weight.facts) == wanted


@pytest.mark.parametrize(("bits", "share"), [(2, 1.0), (3, 1.09), (4, 1.0), (8, 1.0)])
def test_codes_take_hardly_more_than_their_bits(bits: int, share: float) -> None:
    facts = WeightFacts(form="affine", bits=bits, in_features=4096, out_features=4096, group_size=4096, symmetric=True)
    packed_bytes = 4096 * 4096 * bits / 8
    assert TritonAffine(torch.bfloat16, "cuda").num_bytes(facts) < (share + 0.002) * packed_bytes


def test_weight_in_its_own_order_needs_no_list_of_inputs() -> None:
    packed = TritonAffine(torch.float16, "cpu").prepare(affine(4, 256, group_size=128))
    assert isinstance(packed, PackedAffine)
    assert packed.codes.order is None
