"""Plain linears: float weights, packed for oneDNN on a CPU where torch can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from octavo.interfaces.checkpoint import TensorHeader
from octavo.interfaces.linear_kernel import LinearKernels
from octavo.interfaces.quantization import LinearShape, ParameterSpec, QuantizationMethod, StoredLinear


class Unquantized(QuantizationMethod):
    """y = x @ W.T + b with W in the model's dtype.

    On a CPU the weight is reordered once into oneDNN's blocked layout, which its products read faster than the plain
    one (docs/decisions/0001-linears-are-packed-for-onednn.md); elsewhere torch's linear is used.
    """

    def __init__(
        self,
        quantization_config: Mapping[str, object],
        dtype: torch.dtype,
        device: str,
        headers: Mapping[str, TensorHeader],
        kernels: LinearKernels,
    ) -> None:
        super().__init__(quantization_config, dtype, device, headers, kernels)
        self._packs = device == "cpu" and can_prepack(dtype)

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return (
            ParameterSpec(name="weight", shape=(shape.out_features, shape.in_features), output_axis=0, input_axis=1),
        )

    def prepare(self, parts: Sequence[StoredLinear]) -> Tensor:
        weights = [part.tensors["weight"] for part in parts]
        weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).to(self.device)
        return torch.ops.mkldnn._reorder_linear_weight(weight) if self._packs else weight

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, Tensor)
        if not self._packs:
            return functional.linear(x, prepared, bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, prepared, bias, "none", [], "")
        return y

    def dequantize(self, stored: StoredLinear) -> Tensor:
        return stored.tensors["weight"].float()


@cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed linear is there and right for `dtype`: private torch operators, so they are tried."""
    weight, x = torch.randn(48, 32).to(dtype), torch.randn(3, 32).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(y.float(), functional.linear(x.float(), weight.float()), rtol=2e-2, atol=2e-1)
