"""Frequencies of the rotary position embedding, by the type that config.json names.

Two types, "dynamic" and "longrope", go by the length of the text. A cached key is rotated once and read by every
later token, so here the length is the longest that the engine admits, `max_model_len`, and not the current one
(docs/decisions/0006-rope-goes-by-max-model-len.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.model_config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """Radians per position, [rotary_dim / 2] float32, and the factor of all cosines and sines.

    Raises:
        CheckpointError: a rope type that is not known, or one of its numbers is missing or makes no sense.
    """
    compute = _TYPES.get(rope.rope_type)
    if compute is None:
        raise CheckpointError(f"rope type {rope.rope_type!r} is not supported; known: {', '.join(_TYPES)}.")
    dim = rotary_dim(rope, head_dim)
    try:
        return compute(rope, dim, max_model_len)
    except KeyError as error:
        raise CheckpointError(f"rope type {rope.rope_type!r} lacks the parameter {error}.") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"rope type {rope.rope_type!r} cannot use {dict(rope.parameters)}: {error}.") from error


def rotary_dim(rope: RopeConfig, head_dim: int) -> int:
    """Elements of a head that are rotated."""
    return int(head_dim * rope.partial_rotary_factor)


def _powers(theta: float, dim: int) -> Tensor:
    """theta ** (2 i / dim): positions per radian of a plain rotation."""
    return theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def _default(rope: RopeConfig, dim: int, max_model_len: int) -> tuple[Tensor, float]:
    return 1.0 / _powers(rope.theta, dim), 1.0


def _linear(rope: RopeConfig, dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """All positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""
    return 1.0 / _powers(rope.theta, dim) / float(rope.parameters["factor"]), 1.0


def _dynamic(rope: RopeConfig, dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """A larger base, as far as max_model_len exceeds the length the model was trained with ("dynamic NTK")."""
    factor, trained = float(rope.parameters["factor"]), int(rope.parameters["max_position_embeddings"])
    excess = factor * max(max_model_len, trained) / trained - (factor - 1)
    return 1.0 / _powers(rope.theta * excess ** (dim / (dim - 2)), dim), 1.0


def _llama3(rope: RopeConfig, dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """Slow frequencies divided by `factor`, fast ones kept, a ramp over those between (arXiv:2407.21783, 3.4)."""
    factor, low, high = (float(rope.parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = int(rope.parameters["original_max_position_embeddings"])
    plain = 1.0 / _powers(rope.theta, dim)
    turns = trained / (2 * math.pi / plain)  # within the length the model was trained with
    keep = (turns - low) / (high - low)
    between = (1 - keep) * plain / factor + keep * plain
    return torch.where(turns < low, plain / factor, torch.where(turns > high, plain, between)), 1.0


def _yarn(rope: RopeConfig, dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """As llama3 with the ramp over the index of a frequency, and scores sharpened (Peng et al., arXiv:2309.00071)."""
    parameters = rope.parameters
    trained = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or parameters["max_position_embeddings"] / trained

    def index_of(num_turns: float) -> float:
        """Of the frequency that turns so often within the trained length."""
        return (dim * math.log(trained / (num_turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = index_of(parameters.get("beta_fast") or 32), index_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    powers = _powers(rope.theta, dim)
    return (1.0 / (factor * powers)) * (1 - keep) + (1.0 / powers) * keep, _yarn_scaling(rope, factor)


def _yarn_scaling(rope: RopeConfig, factor: float) -> float:
    given = rope.parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def sharpened(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weights = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    if weights[0] and weights[1]:
        return sharpened(weights[0]) / sharpened(weights[1])
    return sharpened(1.0)


def _longrope(rope: RopeConfig, dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """Each frequency divided by a factor of its own, one list for short texts and one for long (arXiv:2402.13753)."""
    parameters = rope.parameters
    trained = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or parameters["max_position_embeddings"] / trained
    divisors = _divisors(rope, "long_factor" if max_model_len > trained else "short_factor", dim)
    scaling = parameters.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return 1.0 / (divisors * _powers(rope.theta, dim)), float(scaling)


def _factors(rope: RopeConfig, dim: int, max_model_len: int) -> tuple[Tensor, float]:
    """Each plain frequency divided by a factor of its own, as GGUF files store what their writer computed."""
    return 1.0 / _powers(rope.theta, dim) / _divisors(rope, "factors", dim), 1.0


def _divisors(rope: RopeConfig, name: str, dim: int) -> Tensor:
    """One for each frequency, [dim / 2] float32."""
    divisors = torch.tensor(rope.parameters[name], dtype=torch.float32)
    if divisors.shape != (dim // 2,):
        raise ValueError(f"{name} has {divisors.numel()} numbers, and {dim // 2} pairs of a head are rotated")
    return divisors


_TYPES: dict[str, Callable[[RopeConfig, int, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "factors": _factors,
}
