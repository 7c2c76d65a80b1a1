"""RMSNorm with the residual addition that always precedes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from octavo.nn.weights import WeightLoader


class RMSNorm:
    """y = s / sqrt(mean(s^2) + eps) * weight, where s = hidden + residual.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(
        self, loader: WeightLoader, prefix: str, hidden_size: int, eps: float, dtype: torch.dtype, device: str
    ) -> None:
        self._eps = eps
        self._device = device
        self._weight: Tensor
        loader.expect(f"{prefix}.weight", (hidden_size,), dtype, self._receive)

    def _receive(self, weight: Tensor) -> None:
        self._weight = weight.to(self._device)

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = hidden if residual is None else hidden + residual
        return functional.rms_norm(total, self._weight.shape, self._weight, self._eps), total
