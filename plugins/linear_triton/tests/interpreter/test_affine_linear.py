"""Products with scaled codes in Triton's interpreter, against the dequantised weight in float64."""

from __future__ import annotations

import pytest
import torch
from weights import act_order, activations, affine, assert_is_product

from octavo.interfaces import AffineWeight
from octavo_linear_triton import affine as component
from octavo_linear_triton.affine import TritonAffine
from octavo_linear_triton.tuned import ProductConfig


def check(
    weight: AffineWeight, num_tokens: int, dtype: torch.dtype = torch.float16, *, with_bias: bool = False
) -> None:
    kernel = TritonAffine(dtype, "cpu")
    out_features, in_features = weight.codes.shape
    x = activations(num_tokens, in_features, dtype)
    bias = activations(1, out_features, dtype, seed=2)[0] if with_bias else None
    assert_is_product(kernel.apply(kernel.prepare(weight), x, bias), x, weight, bias)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_of_any_bits_are_multiplied_with_and_without_zeros(bits: int, symmetric: bool) -> None:
    check(affine(bits, 256, symmetric=symmetric), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 64])
def test_any_number_of_tokens_in_any_dtype(dtype: torch.dtype, num_tokens: int) -> None:
    check(affine(4), num_tokens, dtype, with_bias=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 320])
def test_groups_of_any_size(bits: int, group_size: int) -> None:
    check(affine(bits, 320, group_size=group_size), 2, torch.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_inputs_in_an_order_of_their_own(bits: int, group_size: int) -> None:
    check(affine(bits, 320, group_size=group_size, group_index=act_order(320, group_size)), 2, torch.float32)


@pytest.mark.parametrize("group_size", [16, 24, 48])
def test_groups_that_fill_no_whole_pair(group_size: int) -> None:
    check(affine(4, 100, group_size=group_size), 2, torch.float32)


def test_groups_of_several_sizes_as_a_share_of_an_act_order_linear_has_them() -> None:
    index = torch.tensor([0] * 3 + [1] * 70 + [3] * 32 + [2] * 23, dtype=torch.int32)  # and none of group 4
    check(affine(4, 128, group_size=26, group_index=index), 2, torch.float32)


@pytest.mark.parametrize(("in_features", "out_features"), [(100, 7), (129, 33), (31, 1)])
def test_sizes_that_no_block_divides(in_features: int, out_features: int) -> None:
    check(affine(4, in_features, out_features), 5, torch.float32, with_bias=True)


def test_last_group_may_be_short() -> None:
    check(affine(4, 192, group_size=128), 2, torch.float32)


@pytest.mark.parametrize("num_tokens", [129, 200])
def test_many_tokens_are_multiplied_with_the_dequantised_weight(num_tokens: int) -> None:
    check(affine(3, 100, group_size=32, group_index=act_order(100, 32)), num_tokens, torch.float32, with_bias=True)


def test_zeros_as_large_as_codes_can_be_are_exact() -> None:
    weight = affine(8)
    largest = AffineWeight(
        bits=8, codes=torch.zeros_like(weight.codes), scales=weight.scales, zeros=weight.zeros | 255, group_size=64
    )
    check(largest, 2, torch.float32)


@pytest.mark.parametrize("programs", [2, 8, 64])
def test_inputs_cut_into_splits_give_the_same_product(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    config = ProductConfig(block_outputs=32, block_tokens=8, num_warps=4, num_stages=1, programs=programs)
    monkeypatch.setattr(component, "product_config", lambda *_: config)
    monkeypatch.setattr(component, "most_splits", lambda *_: programs)
    check(affine(4, 700, group_size=32), 3, torch.float32, with_bias=True)


def test_same_product_has_the_same_bits() -> None:
    kernel, weight = TritonAffine(torch.float16, "cpu"), affine(4, 300)
    prepared, x = kernel.prepare(weight), activations(3, 300, torch.float16)
    assert torch.equal(kernel.apply(prepared, x, None), kernel.apply(prepared, x, None))


def test_row_of_a_batch_is_the_row_alone() -> None:
    kernel, weight = TritonAffine(torch.float16, "cpu"), affine(4, 300)
    prepared, x = kernel.prepare(weight), activations(5, 300, torch.float16)
    assert torch.equal(kernel.apply(prepared, x, None)[2:3], kernel.apply(prepared, x[2:3], None))


def test_activations_are_read_where_they_lie() -> None:
    kernel, weight = TritonAffine(torch.float32, "cpu"), affine(4)
    prepared, wide = kernel.prepare(weight), activations(3, 300, torch.float32)
    assert_is_product(kernel.apply(prepared, wide[:, 100:228], None), wide[:, 100:228], weight)
    assert_is_product(kernel.apply(prepared, wide.T[:128, :3].T, None), wide[:, :128], weight)


def test_no_tokens_make_no_outputs() -> None:
    kernel = TritonAffine(torch.float16, "cpu")
    assert kernel.apply(kernel.prepare(affine(4)), torch.zeros(0, 128).half(), None).shape == (0, 24)
