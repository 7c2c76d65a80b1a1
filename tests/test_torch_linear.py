"""TorchPacked and TorchDequantized: the product of the dequantised weight, and the memory that was planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from octavo.builtin import torch_linear
from octavo.builtin.torch_linear import TorchDequantized, TorchPacked
from octavo.interfaces.linear_kernel import AffineWeight, LinearKernel, LookupWeight, PackedWeight, sparse_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of |x| @ |W|.T + |b|: roundings of the weight, of x's product and of the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NUM_TOKENS = (1, 2, 3, 40)


def affine(
    bits: int = 4,
    in_features: int = 96,
    out_features: int = 40,
    group_size: int = 32,
    *,
    symmetric: bool = False,
    groups: str = "slices",
) -> AffineWeight:
    """groups: "slices", "act-order" (each of its whole size), "uneven" (as a device's share of act-order has them)."""
    generator = torch.Generator().manual_seed(bits)
    num_groups = -(-in_features // group_size)
    index = torch.arange(in_features) // group_size
    if groups == "act-order":
        index = index[torch.randperm(in_features, generator=generator)]
    if groups == "uneven":
        index = torch.randint(num_groups, (in_features,), generator=generator)
    codes = torch.randint(2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(2**bits, (num_groups, out_features), generator=generator, dtype=torch.uint8)
    return AffineWeight(
        bits=bits,
        codes=codes,
        scales=(torch.rand(num_groups, out_features, generator=generator) + 0.1).half(),
        zeros=None if symmetric else zeros,
        group_size=group_size,
        group_index=None if groups == "slices" else index.int(),
    )


def lookup(bits: int = 4, in_features: int = 96, out_features: int = 40, *, sparse: bool = False) -> LookupWeight:
    generator = torch.Generator().manual_seed(bits)
    outliers = None
    if sparse:
        each = torch.arange(out_features) % 3  # outputs with none, with one, with two
        columns = torch.cat([torch.randperm(in_features, generator=generator)[:count] for count in each.tolist()])
        outliers = sparse_rows(each, columns, torch.randn(len(columns), generator=generator) * 5, in_features)
    return LookupWeight(
        bits=bits,
        codes=torch.randint(2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        table=torch.randn(out_features, 2**bits, generator=generator),
        outliers=outliers,
    )


WEIGHTS: dict[str, PackedWeight] = {
    **{f"affine, {bits} bits": affine(bits) for bits in (1, 2, 3, 4, 5, 8)},
    **{f"affine, {bits} bits, symmetric": affine(bits, symmetric=True) for bits in (3, 4, 8)},
    "affine, short last group": affine(in_features=80),
    "affine, odd inputs": affine(3, in_features=77, out_features=7),
    "affine, one group": affine(group_size=96),
    "affine, act-order": affine(groups="act-order"),
    "affine, act-order, short last group": affine(in_features=80, groups="act-order"),
    "affine, uneven groups": affine(groups="uneven"),
    **{f"lookup, {bits} bits": lookup(bits) for bits in (2, 3, 4, 6, 8)},
    **{f"lookup, {bits} bits, sparse": lookup(bits, sparse=True) for bits in (3, 4, 8)},
    "lookup, odd inputs, sparse": lookup(3, in_features=77, out_features=7, sparse=True),
}


@pytest.fixture(params=WEIGHTS)
def weight(request: pytest.FixtureRequest) -> PackedWeight:
    return WEIGHTS[request.param]


@pytest.mark.parametrize("kernel", [TorchPacked, TorchDequantized])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_is_that_of_the_dequantised_weight(
    kernel: type[LinearKernel], dtype: torch.dtype, weight: PackedWeight
) -> None:
    for num_tokens in NUM_TOKENS:
        for bias in (None, torch.linspace(-2, 2, weight.codes.shape[0]).to(dtype)):
            check_product(kernel(dtype, "cpu"), weight, num_tokens, bias)


def test_product_does_not_depend_on_how_many_weights_are_dequantised_at_once(
    monkeypatch: pytest.MonkeyPatch, weight: PackedWeight
) -> None:
    monkeypatch.setitem(torch_linear._WEIGHTS_AT_ONCE, weight.facts.form, 3 * weight.codes.shape[1])
    check_product(TorchPacked(torch.float32, "cpu"), weight, 3, torch.linspace(-2, 2, weight.codes.shape[0]))


def test_packed_weight_is_dequantised_bit_for_bit(weight: PackedWeight) -> None:
    in_features = weight.codes.shape[1]
    kernel = TorchPacked(torch.float32, "cpu")
    found = kernel.apply(kernel.prepare(weight), torch.eye(in_features), None).T
    torch.testing.assert_close(found, weight.dequantize(), rtol=0, atol=0)


def test_packed_weight_takes_the_memory_that_is_planned(weight: PackedWeight) -> None:
    kernel = TorchPacked(torch.bfloat16, "cpu")
    outliers = 0
    if isinstance(weight, LookupWeight) and weight.outliers is not None:
        outliers = 8 * weight.outliers.values().numel()  # a position and a value each
    planned = kernel.num_bytes(weight.facts) + outliers
    assert storage_bytes(kernel.prepare(weight)) == planned


def test_packed_codes_of_whole_bytes_take_no_more_than_their_bits() -> None:
    for bits in range(1, 9):
        kernel, weight = TorchPacked(torch.float32, "cpu"), affine(bits, symmetric=True)
        assert storage_bytes(kernel.prepare(weight)) - weight.scales.nbytes == 40 * 96 * bits // 8


def test_packing_keeps_none_of_the_weights_tensors(weight: PackedWeight) -> None:
    theirs = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(weight)}
    ours = {
        tensor.untyped_storage().data_ptr() for tensor in tensors_of(TorchPacked(torch.bfloat16, "cpu").prepare(weight))
    }
    assert not theirs & ours


def check_product(kernel: LinearKernel, weight: PackedWeight, num_tokens: int, bias: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, weight.codes.shape[1], generator=generator).to(kernel.dtype)
    y = kernel.apply(kernel.prepare(weight), x, bias)
    dense = weight.dequantize().double()
    wanted, bound = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        wanted, bound = wanted + bias.double(), bound + bias.double().abs()
    assert (y.dtype, y.shape) == (kernel.dtype, wanted.shape)
    assert ((y.double() - wanted).abs() / bound).max() <= TOLERANCE[kernel.dtype]


def storage_bytes(prepared: object) -> int:
    """Of every tensor it holds, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(prepared)
    }
    return sum(storages.values())


def tensors_of(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield from (
            [value] if value.layout == torch.strided else [value.crow_indices(), value.col_indices(), value.values()]
        )
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_of(one)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
