"""Writes a step's keys and values into pages of the layout "torch-nhd", before a library attends over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.interfaces import BatchLayout, KVCache


@dataclass(frozen=True, kw_only=True, slots=True)
class KVWrites:
    """Where a step's tokens go.

    Attributes:
        slots: [num_tokens] int64 cache slots.
        source: [num_tokens] int64, which token is written to each; None: its own. A padding token writes once more
            what another token of the step writes, to the same slot, so that nobody waits to learn how many there are.
        written: [num_tokens, 1, 1] bool; False everywhere when all tokens are padding: slot 0 then keeps its content.
    """

    slots: Tensor
    source: Tensor | None = None
    written: Tensor | None = None


def plan_writes(layout: BatchLayout) -> KVWrites:
    """Of one step, for all layers; never waits for the device."""
    if not layout.has_padding:
        return KVWrites(slots=layout.slot_mapping)
    valid = layout.slot_mapping >= 0
    own = torch.arange(len(valid), device=valid.device)
    source = torch.where(valid, own, valid.int().argmax())
    slots = layout.slot_mapping[source]
    return KVWrites(slots=slots.clamp(min=0), source=source, written=(slots >= 0)[:, None, None])


def write_kv(key: Tensor, value: Tensor, kv_cache: KVCache, writes: KVWrites) -> None:
    """Scatter this step's keys and values into the cache, in place.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim].
        kv_cache: keys and values, each [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
    """
    for buffer, new in zip(kv_cache, (key, value), strict=True):
        slots = buffer.flatten(0, 1)
        if writes.source is not None and writes.written is not None:
            new = torch.where(writes.written, new[writes.source], slots[writes.slots])
        slots.index_copy_(0, writes.slots, new)
