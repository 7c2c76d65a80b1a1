"""Devices that share a linear: tensors cut along their axes, the sparse ones whole and cut by the method."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezellm_layers import decode, method_of, random_tensors, share_of, stored_linear

from octavo.interfaces import LinearShape
from octavo.nn.linear import Linear, LinearPart, Stack
from octavo.nn.weights import WeightLoader
from octavo.testing.stored_weight import PREFIX, headers_of

SHAPE = LinearShape(in_features=256, out_features=24)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([3, 4]),
    axis_name=st.sampled_from(["output_axis", "input_axis"]),
    num_shards=st.sampled_from([2, 4, 8]),
    density=st.floats(0.0, 0.5),
    num_full=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_shares_are_the_whole_cut(
    bits: int, axis_name: str, num_shards: int, density: float, num_full: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = random_tensors(SHAPE, bits, generator, density=density, num_full=num_full)
    method, whole = method_of(headers_of(tensors)), stored_linear(tensors, SHAPE)
    shares = [share_of(whole, method, axis_name, index, num_shards) for index in range(num_shards)]
    found = torch.cat([method.dequantize(share) for share in shares], dim=0 if axis_name == "output_axis" else 1)
    assert torch.equal(found, method.dequantize(whole))


def test_products_of_shares_of_the_inputs_sum_to_the_whole_s() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = random_tensors(SHAPE, 4, generator, density=0.05)
    method, x = method_of(headers_of(tensors)), torch.randn(3, SHAPE.in_features, generator=generator)
    shares = [share_of(stored_linear(tensors, SHAPE), method, "input_axis", index, 2) for index in range(2)]
    products = [
        method.apply(method.prepare([share]), part.contiguous(), None)
        for share, part in zip(shares, x.chunk(2, dim=1), strict=True)
    ]
    assert torch.allclose(sum(products), x @ decode(tensors, 4).T, atol=1e-4)


@pytest.mark.parametrize(("bits", "num_inputs"), [(3, 32), (4, 8)])
def test_codes_are_never_cut_inside_their_words(bits: int, num_inputs: int) -> None:
    shape = LinearShape(in_features=32 * num_inputs, out_features=4)
    tensors = random_tensors(shape, bits, torch.Generator())
    specs = {spec.name: spec for spec in method_of(headers_of(tensors)).parameters(PREFIX, shape)}
    part = LinearPart(prefix=PREFIX, in_features=shape.in_features, out_features=4, parallel="row", num_shards=32)
    shard = part.shard(specs["qweight"])
    assert shard is not None
    words_of_one = shard.shape(specs["qweight"].shape)[0]
    assert words_of_one * 32 == num_inputs * bits


def test_sparse_tensors_are_whole_on_every_device() -> None:
    tensors = random_tensors(SHAPE, 3, torch.Generator(), density=0.1, num_full=2, balanced=True)
    specs = method_of(headers_of(tensors)).parameters(PREFIX, SHAPE)
    whole = {spec.name for spec in specs if spec.output_axis is None and spec.input_axis is None}
    assert whole == {"rows", "cols", "vals", "startrows", "full_rows", "full_row_indices"}


def test_projections_that_the_checkpoint_holds_as_one_have_each_their_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = random_tensors(SHAPE, 4, generator, density=0.05, num_full=2)
    loader, sizes = WeightLoader(), (12, 4, 8)
    parts = [
        LinearPart(
            prefix=f"layers.0.{name}_proj",
            in_features=SHAPE.in_features,
            out_features=size,
            stack=Stack(prefix=PREFIX, offset=offset, out_features=SHAPE.out_features),
        )
        for name, size, offset in zip("qkv", sizes, (0, 12, 16), strict=True)
    ]
    linear = Linear(method_of(headers_of(tensors)), loader, parts, bias=False)
    loader.load((f"{PREFIX}.{name}", tensor) for name, tensor in tensors.items())
    x = torch.randn(3, SHAPE.in_features, generator=generator)
    assert torch.allclose(linear(x), x @ decode(tensors, 4).T, atol=1e-4)
