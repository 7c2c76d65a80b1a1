"""Unquantized: the packed product is the plain one, and where torch cannot pack the plain one is used."""

from __future__ import annotations

import pytest
import torch

from octavo.builtin import unquantized
from octavo.builtin.unquantized import Unquantized
from octavo.interfaces import LinearKernels, LinearShape, StoredLinear

SHAPE = LinearShape(in_features=96, out_features=80)
NO_KERNELS = LinearKernels({})
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("num_tokens", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_product_equals_float64(
    monkeypatch: pytest.MonkeyPatch, packs: bool, num_tokens: int, dtype: torch.dtype, with_bias: bool
) -> None:
    if packs and not unquantized.can_prepack(dtype):
        pytest.skip(f"this torch packs no {dtype}")
    monkeypatch.setattr(unquantized, "can_prepack", lambda dtype: packs)
    generator = torch.Generator().manual_seed(num_tokens)
    x, bias = torch.randn(num_tokens, 96, generator=generator), torch.randn(80, generator=generator)
    weights = [torch.randn(size, 96, generator=generator) * 96**-0.5 for size in (48, 32)]
    x, bias, *weights = (tensor.to(dtype) for tensor in (x, bias, *weights))

    method = Unquantized({}, dtype, "cpu", {}, NO_KERNELS)
    shapes = [LinearShape(in_features=96, out_features=len(weight)) for weight in weights]
    prepared = method.prepare(
        [
            StoredLinear(prefix="up", shape=shape, tensors={"weight": weight})
            for shape, weight in zip(shapes, weights, strict=True)
        ]
    )
    y = method.apply(prepared, x, bias if with_bias else None)

    wanted = x.double() @ torch.cat(weights).double().T + (bias.double() if with_bias else 0)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_torch_without_the_packing_operators_cannot_prepack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not unquantized.can_prepack.__wrapped__(torch.float32)


def test_one_parameter_in_the_models_dtype() -> None:
    (weight,) = Unquantized({}, torch.bfloat16, "cpu", {}, NO_KERNELS).parameters("layer.up", SHAPE)
    assert (weight.name, weight.shape, weight.dtype) == ("weight", (80, 96), None)
    assert (weight.output_axis, weight.input_axis) == (0, 1)


def test_dequantize_gives_the_weight_itself() -> None:
    weight = torch.randn(80, 96).bfloat16()
    stored = StoredLinear(prefix="up", shape=SHAPE, tensors={"weight": weight})
    dense = Unquantized({}, torch.bfloat16, "cpu", {}, NO_KERNELS).dequantize(stored)
    torch.testing.assert_close(dense, weight.float(), rtol=0, atol=0)
