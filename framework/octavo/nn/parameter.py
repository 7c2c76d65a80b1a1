"""A tensor of the checkpoint that is in no other layer."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.nn.weights import WeightLoader


class Parameter:
    """() -> the tensor, as the checkpoint shapes it, in the model's dtype on its device."""

    def __init__(
        self, loader: WeightLoader, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
    ) -> None:
        self._device = device
        self._tensor: Tensor
        loader.expect(name, shape, dtype, self._receive)

    def _receive(self, tensor: Tensor) -> None:
        self._tensor = tensor.to(self._device)

    def __call__(self) -> Tensor:
        return self._tensor
