"""One layer's keys or values in the cache, plain or in fp8: written and read by slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.interfaces.attention import KVCache

LARGEST = 448.0
"""Of float8_e4m3fn."""

_TINY = 1e-30  # of a head's largest element: the scale of a head of zeros must not be zero


@dataclass(frozen=True, kw_only=True, slots=True)
class Pages:
    """Keys, or values, by slot.

    Attributes:
        stored: [num_slots, num_kv_heads, head_dim].
        scale: [num_slots, num_kv_heads] float32, what an fp8 cache is to be multiplied with; None: as it is.
    """

    stored: Tensor
    scale: Tensor | None = None

    def write(self, slots: Tensor, new: Tensor) -> None:
        """Put new [num_written, num_kv_heads, head_dim] in these slots."""
        if self.scale is None:
            self.stored.index_copy_(0, slots, new)
            return
        elements, scale = to_fp8(new)
        self.scale.index_copy_(0, slots, scale)
        # As bytes: on a CPU torch does not copy fp8 by index.
        self.stored.view(torch.uint8).index_copy_(0, slots, elements.view(torch.uint8))

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """[num_slots_read, num_kv_heads, head_dim]."""
        found = self.stored.index_select(0, slots)
        if self.scale is None:
            return found
        return (found.float() * self.scale.index_select(0, slots).unsqueeze(-1)).to(dtype)


def pages_of(kv_cache: KVCache) -> tuple[Pages, Pages]:
    """Keys and values of one layer, from the buffers of the layout "torch-nhd"."""
    key, value, *scales = (buffer.flatten(0, 1) for buffer in kv_cache)
    if not scales:
        return Pages(stored=key), Pages(stored=value)
    return Pages(stored=key, scale=scales[0]), Pages(stored=value, scale=scales[1])


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] -> (stored float8_e4m3fn, scale [...] float32), such that x = stored * scale but for rounding.

    Rounded to the nearest, the scale taking the head's largest magnitude to the largest number there is.
    Source: Micikevicius et al. 2022, FP8 formats for deep learning, arXiv:2209.05433.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1).clamp(min=_TINY) / LARGEST
    return (x / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale
