"""Products with codes into codebooks in Triton's interpreter, against the dequantised weight in float64."""

from __future__ import annotations

import pytest
import torch
from weights import activations, assert_is_product, lookup

from octavo.interfaces import LookupWeight, sparse_rows
from octavo_linear_triton import lookup as component
from octavo_linear_triton.lookup import TritonLookup
from octavo_linear_triton.tuned import ProductConfig


def check(
    weight: LookupWeight, num_tokens: int, dtype: torch.dtype = torch.float32, *, with_bias: bool = False
) -> None:
    kernel = TritonLookup(dtype, "cpu")
    out_features, in_features = weight.codes.shape
    x = activations(num_tokens, in_features, dtype)
    bias = activations(1, out_features, dtype, seed=2)[0] if with_bias else None
    assert_is_product(kernel.apply(kernel.prepare(weight), x, bias), x, weight, bias)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("density", [0.0, 0.05])
def test_codes_of_up_to_four_bits_with_and_without_outliers(bits: int, density: float) -> None:
    check(lookup(bits, density=density), 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 64])
def test_any_number_of_tokens_in_any_dtype(dtype: torch.dtype, num_tokens: int) -> None:
    check(lookup(4, 128, 24 if num_tokens < 64 else 8, density=0.02), num_tokens, dtype, with_bias=True)


@pytest.mark.parametrize(("in_features", "out_features"), [(100, 7), (129, 33), (31, 1)])
def test_sizes_that_no_block_divides(in_features: int, out_features: int) -> None:
    check(lookup(3, in_features, out_features, density=0.1), 5, with_bias=True)


def test_outputs_with_no_outliers_and_with_more_than_fit_at_once() -> None:
    outliers = torch.zeros(24, 128)
    outliers[3] = torch.arange(128) / 64
    outliers[23, 127] = 5.0
    rows, columns = outliers.nonzero(as_tuple=True)
    matrix = sparse_rows((outliers != 0).sum(dim=1), columns, outliers[rows, columns], 128)
    weight = lookup(4)
    check(LookupWeight(bits=4, codes=weight.codes, table=weight.table, outliers=matrix), 2)


@pytest.mark.parametrize("density", [0.0, 0.05])
def test_many_tokens_are_multiplied_with_the_dequantised_weight(density: float) -> None:
    check(lookup(3, 100, 33, density=density), 130, with_bias=True)


def test_inputs_cut_into_splits_give_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ProductConfig(block_outputs=32, block_tokens=8, num_warps=4, num_stages=1, programs=1)
    monkeypatch.setattr(component, "product_config", lambda *_: config)
    monkeypatch.setattr(component, "most_splits", lambda *_: 3)
    check(lookup(4, 700, 33, density=0.01), 3, with_bias=True)


def test_codes_of_more_bits_are_refused_with_both_numbers() -> None:
    (reason,) = TritonLookup(torch.float16, "cpu").why_not(lookup(5).facts)
    assert reason == "looks up codes of at most 4 bits; these have 5"


def test_same_product_has_the_same_bits() -> None:
    kernel, weight = TritonLookup(torch.float16, "cpu"), lookup(4, 300, density=0.05)
    prepared, x = kernel.prepare(weight), activations(3, 300, torch.float16)
    assert torch.equal(kernel.apply(prepared, x, None), kernel.apply(prepared, x, None))
