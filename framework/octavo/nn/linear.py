"""Linear layers: a quantization method's product, then the bias; one linear or several that read one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.interfaces.quantization import LinearShape, QuantizationMethod
from octavo.nn.weights import WeightLoader

_BIAS = "bias"


class Linear:
    """y = x @ W.T + b, W being one or more parts stacked along out_features.

    x [num_tokens, in_features] -> [num_tokens, sum(out_features)]. The tensors arrive through the loader in any
    order; with the last one the method prepares them for the device and the checkpoint's copies are let go.
    """

    def __init__(
        self,
        method: QuantizationMethod,
        loader: WeightLoader,
        prefixes: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
    ) -> None:
        self._method = method
        self._shape = LinearShape(in_features=in_features, out_features=sum(out_features))
        self._parts: list[dict[str, Tensor]] = [{} for _ in prefixes]
        self._num_awaited = 0
        self._prepared: object = None
        self._bias: Tensor | None = None
        for part, prefix, size in zip(self._parts, prefixes, out_features, strict=True):
            shape = LinearShape(in_features=in_features, out_features=size)
            expected = {spec.name: (spec.shape, spec.dtype) for spec in method.parameters(prefix, shape)}
            if bias:
                expected[_BIAS] = ((size,), None)
            for name, (tensor_shape, dtype) in expected.items():
                self._num_awaited += 1
                loader.expect(f"{prefix}.{name}", tensor_shape, dtype or method.dtype, self._receiver(part, name))

    def __call__(self, x: Tensor) -> Tensor:
        return self._method.apply(self._prepared, x, self._bias)

    def _receiver(self, part: dict[str, Tensor], name: str) -> WeightLoader.Receiver:
        def receive(tensor: Tensor) -> None:
            part[name] = tensor
            self._num_awaited -= 1
            if self._num_awaited == 0:
                self._prepare()

        return receive

    def _prepare(self) -> None:
        biases = [part.pop(_BIAS) for part in self._parts if _BIAS in part]
        self._bias = torch.cat(biases).to(self._method.device) if biases else None
        self._prepared = self._method.prepare(self._shape, self._parts)
        self._parts = []


class StackedLinear:
    """Projections of one input as one product, or one by one when the method cannot stack them."""

    def __init__(self, linears: Sequence[Linear], sizes: Sequence[int]) -> None:
        self._linears = linears
        self._sizes = list(sizes)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if len(self._linears) == 1:
            return torch.split(self._linears[0](x), self._sizes, dim=-1)
        return tuple(linear(x) for linear in self._linears)
