"""Attention in plain torch: the numerical reference for every kernel, and fast enough to serve on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from octavo.interfaces.attention import (
    AttentionBackend,
    AttentionParameters,
    BatchLayout,
    BatchLimits,
    KVBuffer,
    KVCache,
    KVLayout,
)
from octavo.plugins.specs import AttentionNeed

# Decode requests are gathered together while the shortest is at least this share of the longest: padding costs
# memory traffic, a group costs a handful of operator calls a layer.
_GROUP_MIN_SHARE = 0.75


@dataclass(slots=True)
class _DecodeGroup:
    """Requests of similar length that decode together.

    Attributes:
        rows: [group_size] int64, their tokens in this step; a slice when all of them decode together.
        slots: [group_size * padded_len] int64 cache slots of their contexts; padding repeats the first slot,
            which is always written.
        bias: [group_size, 1, 1, padded_len], 0 or -inf at padding, the model's dtype.
    """

    rows: Tensor | slice
    slots: Tensor
    bias: Tensor


@dataclass(slots=True)
class _Prefill:
    """One request with several tokens in this step.

    Attributes:
        start, end: its tokens in this step.
        slots: [context and tokens] int64, None when there is no context and the step's own tensors are enough.
        bias: [tokens, context and tokens] 0 or -inf above the diagonal; None with `slots`.
    """

    start: int
    end: int
    slots: Tensor | None
    bias: Tensor | None


@dataclass(slots=True)
class _State:
    """What `plan` prepared; `write_rows` is None when no token of the step is padding."""

    write_slots: Tensor = field(default_factory=lambda: torch.empty(0))
    write_rows: Tensor | None = None
    decodes: list[_DecodeGroup] = field(default_factory=list)
    prefills: list[_Prefill] = field(default_factory=list)


class TorchAttention(AttentionBackend):
    """Scaled dot-product attention over gathered pages.

    Decoding requests are one batched gather per group of similar lengths, the query heads of a KV head folded
    into the query length; a prefill is one call for each request. Layout "torch-nhd": keys and values apart,
    each [num_blocks, block_size, num_kv_heads, head_dim].

    Source: Kwon et al. 2023, PagedAttention, arXiv:2309.06180, section 4; grouped queries: arXiv:2305.13245.
    """

    def __init__(self, need: AttentionNeed) -> None:
        super().__init__(need)
        self._dtype: torch.dtype = getattr(torch, need.dtype or "float32")
        self._group = need.num_heads // need.num_kv_heads

    def kv_layout(self) -> KVLayout:
        shape = (self.need.block_size, self.need.num_kv_heads, self.need.head_dim)
        return KVLayout(
            name="torch-nhd",
            buffers=tuple(KVBuffer(name=name, block_shape=shape, dtype=self._dtype) for name in ("key", "value")),
        )

    def make_state(self, limits: BatchLimits) -> _State:
        return _State()

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, _State)
        state.write_slots, state.write_rows = layout.slot_mapping, None
        if layout.has_padding:
            state.write_rows = (layout.slot_mapping >= 0).nonzero().squeeze(1)
            state.write_slots = layout.slot_mapping[state.write_rows]
        state.decodes = [self._plan_decode(layout, group) for group in _decode_groups(layout)]
        state.prefills = [
            self._plan_prefill(layout, index) for index in range(layout.num_decode_requests, layout.num_requests)
        ]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        assert isinstance(state, _State)
        scale = parameters.scale
        keys, values = (buffer.flatten(0, 1) for buffer in kv_cache)  # [slots, num_kv_heads, head_dim]
        _write(keys, key, state)
        _write(values, value, state)
        output = torch.empty_like(query)
        for group in state.decodes:
            output[group.rows] = self._decode(query[group.rows], keys, values, group, scale)
        for prefill in state.prefills:
            span = slice(prefill.start, prefill.end)
            output[span] = self._prefill(query[span], key[span], value[span], keys, values, prefill, scale)
        return output.flatten(1)

    # ------------------------------------------------------------------------------------------------ decode

    def _plan_decode(self, layout: BatchLayout, members: Tensor) -> _DecodeGroup:
        padded_len = int(layout.host_seq_lens[members.numpy()].max())
        device = layout.seq_lens.device
        members = members.to(device)
        slots = _slots(layout.block_table[members], padded_len, layout.block_size)
        written = torch.arange(padded_len, device=device) < layout.seq_lens[members].unsqueeze(1)
        bias = torch.zeros(written.shape, dtype=self._dtype, device=device).masked_fill_(~written, float("-inf"))
        return _DecodeGroup(
            # A decode request has one token, and decodes come first: its token is its index.
            rows=members if len(members) < layout.num_decode_requests else slice(layout.num_decode_requests),
            slots=torch.where(written, slots, slots[:, :1]).flatten(),
            bias=bias[:, None, None, :],
        )

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, group: _DecodeGroup, scale: float) -> Tensor:
        num_requests, padded_len = group.bias.shape[0], group.bias.shape[-1]
        shape = (num_requests, padded_len, *keys.shape[1:])
        result = functional.scaled_dot_product_attention(
            query.view(num_requests, self.need.num_kv_heads, self._group, -1),
            keys.index_select(0, group.slots).view(shape).transpose(1, 2),
            values.index_select(0, group.slots).view(shape).transpose(1, 2),
            attn_mask=group.bias.expand(-1, self.need.num_kv_heads, self._group, -1),
            scale=scale,
        )
        return result.reshape(query.shape)

    # ----------------------------------------------------------------------------------------------- prefill

    def _plan_prefill(self, layout: BatchLayout, index: int) -> _Prefill:
        start, end = int(layout.host_query_start_loc[index]), int(layout.host_query_start_loc[index + 1])
        seq_len, num_tokens = int(layout.host_seq_lens[index]), end - start
        if seq_len == num_tokens:
            return _Prefill(start=start, end=end, slots=None, bias=None)
        device = layout.seq_lens.device
        positions = torch.arange(seq_len - num_tokens, seq_len, device=device)
        hidden = torch.arange(seq_len, device=device) > positions.unsqueeze(1)
        return _Prefill(
            start=start,
            end=end,
            slots=_slots(layout.block_table[index : index + 1], seq_len, layout.block_size).flatten(),
            bias=torch.zeros(hidden.shape, dtype=self._dtype, device=device).masked_fill_(hidden, float("-inf")),
        )

    def _prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        prefill: _Prefill,
        scale: float,
    ) -> Tensor:
        if prefill.slots is not None:
            key, value = keys.index_select(0, prefill.slots), values.index_select(0, prefill.slots)
        result = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=prefill.bias,
            is_causal=prefill.bias is None,
            scale=scale,
            enable_gqa=self._group > 1,
        )
        return result.squeeze(0).transpose(0, 1)


def _write(cache: Tensor, new: Tensor, state: _State) -> None:
    rows = new if state.write_rows is None else new[state.write_rows]
    cache.index_copy_(0, state.write_slots, rows)


def _slots(block_table: Tensor, num_positions: int, block_size: int) -> Tensor:
    """block_table [requests, max_num_blocks] -> the cache slot of each position, [requests, num_positions] int64."""
    positions = torch.arange(num_positions, device=block_table.device)
    return block_table[:, positions // block_size].long() * block_size + positions % block_size


def _decode_groups(layout: BatchLayout) -> Iterator[Tensor]:
    """Indices of decode requests, grouped by length, longest first."""
    lengths = layout.host_seq_lens[: layout.num_decode_requests]
    order = (-lengths).argsort(kind="stable")
    begin = 0
    for index in range(1, len(order) + 1):
        if index == len(order) or lengths[order[index]] < _GROUP_MIN_SHARE * lengths[order[begin]]:
            yield torch.from_numpy(np.sort(order[begin:index]))
            begin = index
