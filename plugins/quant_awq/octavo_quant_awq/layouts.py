"""How AWQ's versions lay a linear's tensors out: their shapes, and what they mean.

K is in_features, N out_features, G = K / group_size. `W[n, k] = scales[g, n] * (code[n, k] - zero[g, n])` with
g = k // group_size, in both versions.

| | gemm | gemv |
|---|---|---|
| qweight, int32 | [K, N / 8] | [N, K / 8] |
| qzeros, int32 | [G, N / 8] | [N, Z] |
| scales, floating | [G, N] | [N, 8 * Z] |

A word of version gemm holds 8 outputs in the order 0 2 4 6 1 3 5 7, from its lowest bits up; one of version gemv 8
inputs, or groups, in their own order. Z is the words that G zeros take, rounded up for small groups: there is padding.

Source: Lin et al. 2023, AWQ, arXiv:2306.00978; the layouts of AutoAWQ 0.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.packing import unpack_columns

BITS = 4
CODES_PER_WORD = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word of version gemm holds the outputs 0 to 7."""


def tensor_shapes(version: str, in_features: int, out_features: int, group_size: int) -> dict[str, tuple[int, int]]:
    """By suffix: of the qweight, qzeros and scales of a linear; whole groups and words are assumed."""
    num_groups = in_features // group_size
    if version == "gemm":
        num_words = out_features // CODES_PER_WORD
        return {
            "qweight": (in_features, num_words),
            "qzeros": (num_groups, num_words),
            "scales": (num_groups, out_features),
        }
    zero_words = _gemv_zero_words(num_groups, group_size)
    return {
        "qweight": (out_features, in_features // CODES_PER_WORD),
        "qzeros": (out_features, zero_words),
        "scales": (out_features, CODES_PER_WORD * zero_words),
    }


def unpack_gemm(words: Tensor) -> Tensor:
    """[rows, N / 8] int32 -> [rows, N] uint8: codes or zeros."""
    num_columns = words.shape[1] * CODES_PER_WORD
    codes = unpack_columns(words, BITS, num_columns).view(-1, words.shape[1], CODES_PER_WORD)
    return codes[..., torch.tensor(_PLACES, device=words.device)].flatten(1)


def unpack_gemv(words: Tensor) -> Tensor:
    """[N, words] int32 -> [N, 8 * words] uint8: codes or zeros."""
    return unpack_columns(words, BITS, words.shape[1] * CODES_PER_WORD)


def _gemv_zero_words(num_groups: int, group_size: int) -> int:
    """Words of an output's zeros: its kernel reads 1 at once, 2 for groups of 64, 4 for smaller ones."""
    at_once = 1 if group_size >= 128 else 2 if group_size >= 64 else 4
    num_words = -(-num_groups // CODES_PER_WORD)
    return -(-num_words // at_once) * at_once
