"""Shares of a linear on several devices, beyond the halves of the conformance suite."""

from __future__ import annotations

import pytest
import torch
from awq_layers import make_method, store

from octavo.errors import ConfigError
from octavo.interfaces import LinearShape, StoredLinear
from octavo.nn.linear import LinearPart
from octavo.testing.stored_weight import PREFIX, headers_of
from octavo_quant_awq.method import AWQMethod

SHAPE = LinearShape(in_features=256, out_features=64)


def row_shares(method: AWQMethod, tensors: dict[str, torch.Tensor], num_shares: int) -> list[StoredLinear]:
    """As the loader cuts them along the inputs."""
    part = LinearPart(prefix=PREFIX, in_features=256, out_features=64, parallel="row", num_shards=num_shares)
    shards = {one.name: part.shard(one) for one in method.parameters(PREFIX, SHAPE)}
    return [
        StoredLinear(
            prefix=PREFIX,
            shape=part.shape_of_one,
            tensors={
                name: tensor if (cut := shards[name]) is None else tensor.chunk(num_shares, dim=cut.axis)[index]
                for name, tensor in tensors.items()
            },
            input_start=index * part.shape_of_one.in_features,
        )
        for index in range(num_shares)
    ]


@pytest.mark.parametrize(
    ("version", "group_size", "num_shares"),
    [("gemm", 64, 4), ("gemm", -1, 4), ("gemm", 256, 8), ("gemv", 32, 8), ("gemv", -1, 4), ("gemv", 64, 8)],
)
def test_shares_of_the_inputs_are_columns_of_the_whole(version: str, group_size: int, num_shares: int) -> None:
    stored = store(version, group_size)(SHAPE, torch.Generator())
    tensors = dict(stored.tensors)
    method = make_method({"version": version, "group_size": group_size}, headers_of(tensors))
    shares = row_shares(method, tensors, num_shares)
    assert torch.equal(torch.cat([method.dequantize(share) for share in shares], dim=1), stored.weight)


def test_share_of_gemv_that_begins_inside_a_group_has_its_own_order() -> None:
    stored = store("gemv", 64)(SHAPE, torch.Generator())
    method = make_method({"version": "gemv", "group_size": 64}, headers_of(stored.tensors))
    shares = row_shares(method, dict(stored.tensors), 8)
    assert [method.weight(share).group_index is None for share in shares] == [True, False] * 4


def test_groups_of_gemm_that_devices_cannot_share_are_refused_before_loading() -> None:
    stored = store("gemm", 128)(SHAPE, torch.Generator())
    method = make_method({"version": "gemm", "group_size": 128}, headers_of(stored.tensors))
    with pytest.raises(ConfigError, match=r"cannot be cut into 4 equal parts"):
        row_shares(method, dict(stored.tensors), 4)


def test_words_of_gemm_that_devices_cannot_share_are_refused_before_loading() -> None:
    method = make_method({"version": "gemm", "group_size": 64}, {})
    part = LinearPart(prefix=PREFIX, in_features=256, out_features=72, num_shards=2)
    [qweight] = [one for one in method.parameters(PREFIX, part.shape) if one.name == "qweight"]
    with pytest.raises(ConfigError, match=r"72 outputs are stored as 9 elements, 8 values in each"):
        part.shard(qweight)
