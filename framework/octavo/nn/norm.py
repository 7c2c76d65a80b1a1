"""RMSNorm with the residual addition that always precedes it."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.interfaces.kernels import Kernels
from octavo.nn.weights import WeightLoader


class RMSNorm:
    """y = s / sqrt(mean(s^2) + eps) * (weight + weight_offset), where s = hidden + residual.

    With an offset the weight is kept in float32 and the product rounded once: weight + 1 in bfloat16 would lose most
    of what the weight says.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(
        self,
        kernels: Kernels,
        loader: WeightLoader,
        prefix: str,
        hidden_size: int,
        eps: float,
        dtype: torch.dtype,
        device: str,
        weight_offset: float = 0.0,
    ) -> None:
        self._kernels = kernels
        self._eps = eps
        self._device = device
        self._weight_offset = weight_offset
        self._weight: Tensor
        loader.expect(f"{prefix}.weight", (hidden_size,), torch.float32 if weight_offset else dtype, self._receive)

    def _receive(self, weight: Tensor) -> None:
        self._weight = (weight + self._weight_offset if self._weight_offset else weight).to(self._device)

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._kernels.add_rms_norm(hidden, residual, self._weight, self._eps)
