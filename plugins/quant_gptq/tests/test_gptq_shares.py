"""Shares of a linear on several devices: every cut along the declared axes is that part of the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from gptq_layers import Kind, make_method

from octavo.builtin.torch_linear import TorchPacked
from octavo.errors import ConfigError
from octavo.interfaces import LinearKernels, LinearShape, StoredLinear
from octavo.nn.linear import Linear, LinearPart, Stack
from octavo.nn.weights import WeightLoader
from octavo.testing import StoredWeight
from octavo.testing.stored_weight import PREFIX, headers_of
from octavo_quant_gptq.method import GPTQMethod

SHAPE = LinearShape(in_features=384, out_features=128)
KINDS = [
    Kind(2, 32),
    Kind(3, 32),
    Kind(3, 64, act_order=True),
    Kind(4, 64, symmetric=True),
    Kind(4, 80),
    Kind(4, 80, act_order=True),
    Kind(4, 128, "gptq_v2"),
    Kind(5, 64),
    Kind(8, -1),
    Kind(8, 24, "gptq_v2", act_order=True),
]


def made(kind: Kind) -> tuple[GPTQMethod, StoredWeight]:
    stored = kind.store(SHAPE)
    return make_method(kind.config, headers_of(stored.tensors)), stored


def shares(
    method: GPTQMethod, stored: StoredWeight, parallel: Literal["column", "row"], num_shares: int
) -> list[StoredLinear]:
    """As the loader cuts them."""
    part = LinearPart(prefix=PREFIX, in_features=384, out_features=128, parallel=parallel, num_shards=num_shares)
    shards = {one.name: part.shard(one) for one in method.parameters(PREFIX, SHAPE)}
    shape = part.shape_of_one
    return [
        StoredLinear(
            prefix=PREFIX,
            shape=shape,
            tensors={
                name: tensor if (cut := shards[name]) is None else tensor.chunk(num_shares, dim=cut.axis)[index]
                for name, tensor in stored.tensors.items()
            },
            output_start=index * shape.out_features if parallel == "column" else 0,
            input_start=index * shape.in_features if parallel == "row" else 0,
        )
        for index in range(num_shares)
    ]


@pytest.mark.parametrize("num_shares", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shares_of_the_inputs_are_columns_of_the_whole(kind: Kind, num_shares: int) -> None:
    method, stored = made(kind)
    parts = [method.dequantize(share) for share in shares(method, stored, "row", num_shares)]
    assert torch.equal(torch.cat(parts, dim=1), stored.weight)


@pytest.mark.parametrize("num_shares", [2, 3, 4])
@pytest.mark.parametrize("group_size", [64, 80, -1])
def test_shares_of_the_inputs_without_an_index_are_columns_of_the_whole(group_size: int, num_shares: int) -> None:
    kind = Kind(4, group_size)
    whole = kind.store(SHAPE)
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name != "g_idx"}
    stored, method = replace(whole, tensors=tensors), make_method(kind.config, headers_of(tensors))
    parts = [method.dequantize(share) for share in shares(method, stored, "row", num_shares)]
    assert torch.equal(torch.cat(parts, dim=1), whole.weight)


@pytest.mark.parametrize("num_shares", [2, 4])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shares_of_the_outputs_are_rows_of_the_whole(kind: Kind, num_shares: int) -> None:
    method, stored = made(kind)
    parts = [method.dequantize(share) for share in shares(method, stored, "column", num_shares)]
    assert torch.equal(torch.cat(parts), stored.weight)


@pytest.mark.parametrize("kind", [Kind(4, 32, act_order=True), Kind(3, 32), Kind(4, -1, symmetric=True)], ids=str)
def test_projections_that_are_stored_as_one_linear_are_its_rows(kind: Kind) -> None:
    whole = kind.store(LinearShape(in_features=128, out_features=192))
    kernels = LinearKernels({"torch-packed": TorchPacked(torch.float32, "cpu")})
    method = GPTQMethod(kind.config, torch.float32, "cpu", headers_of(whole.tensors, "qkv"), kernels)
    parts = [
        LinearPart(
            prefix=name, in_features=128, out_features=64, stack=Stack(prefix="qkv", offset=offset, out_features=192)
        )
        for name, offset in (("q", 0), ("k", 64), ("v", 128))
    ]
    loader = WeightLoader()
    linear = Linear(method, loader, parts, bias=False)
    loader.load(((f"qkv.{name}", tensor) for name, tensor in whole.tensors.items()), ())
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x), x @ whole.weight.T)


def test_share_that_begins_inside_a_group_has_an_index_of_its_own_groups() -> None:
    method, stored = made(Kind(4, 128))
    first, second = (method.weight(share) for share in shares(method, stored, "row", 2))
    assert first.group_index is None
    assert second.group_index is not None
    assert second.group_index.tolist() == [0] * 64 + [1] * 128
    assert (first.scales.shape, second.scales.shape) == ((2, 128), (2, 128))


def test_share_of_groups_in_order_holds_its_own_scales_only() -> None:
    method, stored = made(Kind(4, 64))
    weight = method.weight(shares(method, stored, "row", 2)[1])
    assert weight.group_index is None
    assert torch.equal(weight.scales, stored.tensors["scales"][3:])
    assert weight.scales.untyped_storage().nbytes() == weight.scales.nbytes


def test_inputs_of_three_bits_that_devices_cannot_share_are_refused_before_loading() -> None:
    method, stored = made(Kind(3, 32))
    with pytest.raises(ConfigError, match=r"qweight cannot be cut into 8 equal parts: its 384 inputs"):
        shares(method, stored, "row", 8)


def test_outputs_whose_zeros_devices_cannot_share_are_refused_before_loading() -> None:
    method, stored = made(Kind(3, 32))
    with pytest.raises(ConfigError, match=r"qzeros cannot be cut into 8 equal parts: its 128 outputs"):
        shares(method, stored, "column", 8)
