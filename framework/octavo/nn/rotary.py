"""Rotary position embedding: the table of cosines and sines."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.model_config import RopeConfig
from octavo.nn.rope_types import frequencies, rotary_dim


class RotaryTable:
    """cos and sin of position * frequency for every position, times the rope type's attention scaling.

    Kept as [max_model_len, rotary_dim]: the cosines twice, the sines once negated, so that a rotation is
    `x * cos + swap_halves(x) * sin` (octavo.interfaces.attention.rotate).

    Source: Su et al. 2021, arXiv:2104.09864.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_model_len: int, dtype: torch.dtype, device: str) -> None:
        radians, scaling = frequencies(rope, head_dim, max_model_len)
        angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), radians)
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        self._cos = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [num_tokens] -> (cos, sin), each [num_tokens, 1, rotary_dim]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotary_bytes_per_position(rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> int:
    """Of a RotaryTable."""
    return 2 * rotary_dim(rope, head_dim) * dtype.itemsize
