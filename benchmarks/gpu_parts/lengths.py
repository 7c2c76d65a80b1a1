"""Lengths of prompts and outputs as in ShareGPT conversations, without the data: quantiles of a distribution."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

LONGEST = 1024
DESCRIPTION = (
    "prompts log-normal with median 110 and sigma 1.2, outputs with median 130 and sigma 1.0, each cut to 4 .. 1024; "
    "evenly spaced quantiles in an order shuffled with seed 0"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One request: random tokens of the prompt's length, and exactly so many of the output."""

    prompt_token_ids: list[int]
    num_output_tokens: int


def log_normal_lengths(count: int, median: float, sigma: float, seed: int) -> list[int]:
    """`count` evenly spaced quantiles, shuffled: the same in every run, and of the same mean for every seed."""
    normal = statistics.NormalDist()
    quantiles = (normal.inv_cdf((index + 0.5) / count) for index in range(count))
    lengths = [min(LONGEST, max(4, round(median * math.exp(sigma * quantile)))) for quantile in quantiles]
    random.Random(seed).shuffle(lengths)
    return lengths


def conversations(count: int, vocab_size: int, *, longest: int = LONGEST) -> list[Conversation]:
    """`count` requests in order of arrival; DESCRIPTION says how long, `longest` shortens them for tiny runs."""
    rng = random.Random(0)
    inputs = log_normal_lengths(count, 110, 1.2, seed=0)
    outputs = log_normal_lengths(count, 130, 1.0, seed=1)
    return [
        Conversation(
            prompt_token_ids=[rng.randrange(vocab_size) for _ in range(min(num_in, longest))],
            num_output_tokens=min(num_out, longest),
        )
        for num_in, num_out in zip(inputs, outputs, strict=True)
    ]
