"""What a kernel set must draw, worked out in float64 by the published formulas, and where rounding may decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.interfaces.kernels import SamplingInputs

MARGIN = 1e-3
"""Two scores nearer to each other than this may change places with the last bits of a logarithm."""

_SLACK = 1e-4  # of a probability, or of a score: what rounding may move across a border
_MIN_TEMPERATURE = 1e-5

Floats = NDArray[np.float64]
Bits = NDArray[np.uint32]


def sampling_inputs(num_samples: int, device: str = "cpu", **columns: Any) -> SamplingInputs:
    """Inputs of so many rows, each column one value for all or one for each row; by default plain draws.

    `sampling_inputs(3, seed=[1, 2, 3], top_k=2)`
    """

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(columns.pop(name, default), dtype=dtype).expand(num_samples).clone()

    temperature, top_p = column("temperature", 1.0, torch.float32), column("top_p", 1.0, torch.float32)
    top_k, min_p = column("top_k", 0, torch.int32), column("min_p", 0.0, torch.float32)
    seed, position = column("seed", 0, torch.int64), column("position", 1, torch.int32)
    sample_index = column("sample_index", 0, torch.int32)
    assert not columns, f"there are no inputs {', '.join(columns)}"
    return SamplingInputs(
        temperature=temperature.to(device),
        top_p=top_p.to(device),
        min_p=min_p.to(device),
        top_k=top_k.to(device),
        seed=seed.to(device),
        sample_index=sample_index.to(device),
        position=position.to(device),
        all_greedy=not temperature.any(),
        any_top_k=bool((top_k > 0).any()),
        any_top_p=bool((top_p < 1).any()),
        any_min_p=bool((min_p > 0).any()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """One row each.

    Attributes:
        token_ids: what is drawn.
        sure: whether that is so by MARGIN, and however the borders of top-p and min-p are rounded.
    """

    token_ids: NDArray[np.int64]
    sure: NDArray[np.bool_]


def draw(logits: Tensor, inputs: SamplingInputs) -> Draws:
    """What rows of logits [num_samples, vocab_size] give."""
    exact: Floats = logits.double().cpu().numpy()
    temperature = _column(inputs.temperature)
    scores = exact / np.maximum(temperature, _MIN_TEMPERATURE)[:, None]
    noisy = scores + gumbel_noise(inputs, exact.shape[1])
    limits = list(zip(_column(inputs.top_k), _column(inputs.top_p), _column(inputs.min_p), strict=True))
    found: list[tuple[int, bool]] = []
    for row, (top_k, top_p, min_p) in enumerate(limits):
        if temperature[row] == 0:
            found.append((int(exact[row].argmax()), True))
            continue
        narrow, usual, wide = (kept(scores[row], int(top_k), top_p, min_p, slack) for slack in (_SLACK, 0.0, -_SLACK))
        winner = int(np.where(usual, noisy[row], -np.inf).argmax())
        others = np.where(wide, noisy[row], -np.inf)
        others[winner] = -np.inf
        margin = max(MARGIN, 1e-6 * abs(scores[row, winner]))
        found.append((winner, bool(narrow[winner]) and bool(noisy[row, winner] - others.max(initial=-np.inf) > margin)))
    return Draws(token_ids=np.array([token for token, _ in found]), sure=np.array([sure for _, sure in found]))


def kept(scores: Floats, top_k: int, top_p: float, min_p: float, slack: float = 0.0) -> NDArray[np.bool_]:
    """Which tokens min-p, then top-k, then top-p leave, each of what is left; [vocab_size] each.

    Args:
        scores: logits over the temperature.
        slack: how much nearer to the most probable token the borders of min-p and top-p are.
    """
    left = np.full(scores.shape, True)
    if min_p > 0:
        left = (scores >= scores.max() + np.log(min_p) + slack) | (scores == scores.max())
    if top_k > 0:
        ordered = np.sort(scores[left])[::-1]
        left &= scores >= ordered[min(top_k, len(ordered)) - 1]
    if top_p < 1:
        ordered = np.sort(scores[left])[::-1]
        probabilities = np.exp(ordered - ordered[0])
        probabilities /= probabilities.sum()
        mass_before = np.cumsum(probabilities) - probabilities
        left &= scores >= ordered[max(int((mass_before < top_p - slack).sum()), 1) - 1]
    return left


def border_positions(
    logits: Tensor, limits: Mapping[str, float], num_each_side: int, num_tried: int = 2048
) -> list[int]:
    """Positions, under seed 0, at which the noise is best for the tokens on either side of the border of `limits`.

    Without top_k, top_p and min_p these tokens would be drawn there; with them, only those inside.

    Args:
        logits: [vocab_size], of temperature 1.
        limits: any of top_k, top_p and min_p.
    """
    scores: Floats = logits.double().cpu().numpy()
    left = kept(scores, int(limits.get("top_k", 0)), limits.get("top_p", 1.0), limits.get("min_p", 0.0))
    order = scores.argsort()[::-1]
    border = int(left.sum())
    wanted = order[max(border - num_each_side, 0) : border + num_each_side]
    positions = range(1, num_tried + 1)
    winners = (scores + gumbel_noise(sampling_inputs(num_tried, position=positions), len(scores))).argmax(axis=1)
    found = [int(np.flatnonzero(winners == token)[0]) + 1 for token in wanted if token in winners]
    assert len(found) == len(wanted), "the logits of a border scene must be near enough for each to be drawn"
    return found


def gumbel_noise(inputs: SamplingInputs, vocab_size: int) -> Floats:
    """-log(-log(1 - u)) with u hashed from each row's key and each token id, [num_samples, vocab_size]."""
    seed = inputs.seed.cpu().numpy().view(np.uint64)
    low, high = (seed & np.uint64(_MASK)).astype(np.uint32), (seed >> np.uint64(32)).astype(np.uint32)
    key = _mix(low ^ _mix(high + _GOLDEN))
    key = _mix(key ^ _mix(_unsigned(inputs.sample_index) * _GOLDEN + np.uint32(1)))
    key = _mix(key ^ _mix(_unsigned(inputs.position) * _GOLDEN + np.uint32(2)))
    second_key = _mix(key + _GOLDEN)
    token_ids = np.arange(vocab_size, dtype=np.uint32)
    bits = _mix(_mix((token_ids * _GOLDEN)[None] ^ key[:, None]) + second_key[:, None])
    uniform = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    below_1 = np.minimum(uniform, np.float32(1 - 2.0**-24)).astype(np.float64)
    noise: Floats = -np.log(-np.log1p(-below_1))
    return noise


def describe(inputs: SamplingInputs, row: int) -> str:
    """A row's parameters, for the message of a fault."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "sample_index", "position")
    return ", ".join(f"{name} {getattr(inputs, name)[row].item():g}" for name in names)


_MASK = 0xFFFFFFFF
_GOLDEN = np.uint32(0x9E3779B9)


def _mix(x: Bits) -> Bits:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain)."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _unsigned(column: Tensor) -> Bits:
    return column.cpu().numpy().view(np.uint32)


def _column(column: Tensor) -> Floats:
    values: Floats = column.double().cpu().numpy()
    return values
