"""Quantization methods of a few lines, and a factory that builds layers with one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from octavo.builtin.torch_attention import TorchAttention
from octavo.builtin.torch_kernels import TorchKernels
from octavo.builtin.unquantized import Unquantized
from octavo.interfaces import LinearKernels, LinearShape, ParameterSpec, QuantizationMethod, StoredLinear
from octavo.nn.factory import DeviceLayerFactory
from octavo.nn.weights import WeightLoader
from octavo.plugins.specs import AttentionNeed

NO_KERNELS = LinearKernels({})


class ScaledMethod(QuantizationMethod):
    """Weights in int8 with a scale each row: two tensors a linear, and no stacking."""

    can_stack = False

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return (
            ParameterSpec(name="qweight", shape=(shape.out_features, shape.in_features), dtype=torch.int8),
            ParameterSpec(name="scale", shape=(shape.out_features, 1)),
        )

    def prepare(self, parts: Sequence[StoredLinear]) -> Tensor:
        (stored,) = parts
        return self.dequantize(stored)

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, Tensor)
        return functional.linear(x, prepared, bias)

    def dequantize(self, stored: StoredLinear) -> Tensor:
        return stored.tensors["qweight"].float() * stored.tensors["scale"]


class PackedMethod(ScaledMethod):
    """Eight 4-bit inputs in one int32, [out, in / 8]; a scale for every output and 32 inputs."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        packed, groups = (shape.out_features, shape.in_features // 8), (shape.out_features, shape.in_features // 32)
        axes = {"output_axis": 0, "input_axis": 1}
        return (
            ParameterSpec(name="qweight", shape=packed, dtype=torch.int32, pack_factor=8, **axes),
            ParameterSpec(name="scales", shape=groups, dtype=torch.float16, **axes),
        )


class ThreeBits(ScaledMethod):
    """32 inputs in three int32, [in * 3 / 32, out]."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        words = (shape.in_features * 3 // 32, shape.out_features)
        packing = {"pack_factor": 32, "pack_elements": 3}
        return (ParameterSpec(name="qweight", shape=words, dtype=torch.int32, output_axis=1, input_axis=0, **packing),)


def factory(
    method_class: type[QuantizationMethod] = Unquantized, num_ranks: int = 1
) -> tuple[DeviceLayerFactory, WeightLoader]:
    loader = WeightLoader()
    need = AttentionNeed(num_heads=2, num_kv_heads=2, head_dim=4, block_size=4)
    method = method_class({}, torch.float32, "cpu", {}, NO_KERNELS)
    return DeviceLayerFactory(method, TorchAttention(need), TorchKernels(need), loader, num_ranks), loader
