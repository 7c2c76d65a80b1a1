"""Rotary position embedding: a table of cosines and sines, and the rotation of one tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.model_config import RopeConfig


class RotaryTable:
    """cos and sin of position * frequency for every position.

    Kept as [max_model_len, head_dim]: the cosines twice, the sines once negated, so that a rotation is
    `x * cos + swap_halves(x) * sin`.

    Source: Su et al. 2021, arXiv:2104.09864; "llama3" scaling: Llama 3.1's published configuration.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_model_len: int, dtype: torch.dtype, device: str) -> None:
        angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies(rope, head_dim))
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [num_tokens] -> (cos, sin), each [num_tokens, 1, head_dim]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """x [num_tokens, heads, head_dim] turned by its tokens' angles, halves paired (the GPT-NeoX convention)."""
    cos, sin = cos_sin
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position, [head_dim / 2] float32.

    Raises:
        CheckpointError: a rope type that is not known, or one of its numbers is missing.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / rope.theta**exponents
    try:
        if rope.rope_type == "default":
            return plain
        if rope.rope_type == "llama3":
            return _llama3(plain, rope)
        if rope.rope_type == "factors":
            return plain / torch.tensor(rope.parameters["factors"], dtype=torch.float32)
    except KeyError as error:
        raise CheckpointError(f"rope type {rope.rope_type!r} lacks the parameter {error}.") from error
    raise CheckpointError(f"rope type {rope.rope_type!r} is not supported; known: default, llama3, factors.")


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Slow frequencies divided by `factor`, fast ones kept, a ramp over the wavelengths between."""
    factor, low, high = (float(rope.parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original_length = float(rope.parameters["original_max_position_embeddings"])
    wavelength = 2 * math.pi / plain
    keep = ((original_length / wavelength - low) / (high - low)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / factor
