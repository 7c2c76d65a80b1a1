"""Rotary position embedding: a table of cosines and sines, and the rotation of one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.model_config import RopeConfig
from octavo.nn.rope_types import frequencies, rotary_dim


class RotaryTable:
    """cos and sin of position * frequency for every position, times the rope type's attention scaling.

    Kept as [max_model_len, rotary_dim]: the cosines twice, the sines once negated, so that a rotation is
    `x * cos + swap_halves(x) * sin`.

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


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """x [num_tokens, heads, head_dim] turned by its tokens' angles, halves paired (the GPT-NeoX convention).

    Of a partial rotation the first rotary_dim elements are turned and the others kept.
    """
    cos, sin = cos_sin
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos_sin), x[..., size:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


def rotary_bytes_per_position(rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> int:
    """Of a RotaryTable."""
    return 2 * rotary_dim(rope, head_dim) * dtype.itemsize
