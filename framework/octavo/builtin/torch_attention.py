"""Attention in plain torch: the numerical reference for every kernel, and fast enough to serve on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from octavo.builtin.fp8_cache import Pages, pages_of
from octavo.interfaces.attention import (
    AttentionBackend,
    AttentionParameters,
    BatchLayout,
    BatchLimits,
    KVCache,
    KVLayout,
    nhd_layout,
)
from octavo.plugins.specs import AttentionNeed

# Decode requests are gathered together while the shortest is at least this share of the longest: padding costs
# memory traffic, a group costs a handful of operator calls a layer.
_GROUP_MIN_SHARE = 0.75

_CAPPED_QUERIES = 512  # whose scores are in memory at once, in layers that cap them


@dataclass(slots=True)
class _DecodeGroup:
    """Requests of similar length that decode together.

    Attributes:
        rows: [group_size] int64, their tokens in this step; a slice when all of them decode together.
        slots: [group_size * padded_len] int64 cache slots of the contexts they see; padding repeats the first slot,
            which is always written.
        bias: [group_size, 1, 1, padded_len], 0 or -inf at padding, the model's dtype.
        nobody: [group_size, 1, 1] bool, the requests that are padding; None in a step without any.
    """

    rows: Tensor | slice
    slots: Tensor
    bias: Tensor
    nobody: Tensor | None


@dataclass(slots=True)
class _Prefill:
    """One request with several tokens in this step.

    Attributes:
        start, end: its tokens in this step.
        slots: [num_keys] int64, None when there is no context and the step's own tensors are what the cache holds.
        bias: [tokens, num_keys] 0, or -inf at keys that a token does not see; None: each sees those up to its own.
    """

    start: int
    end: int
    slots: Tensor | None
    bias: Tensor | None


@dataclass(slots=True)
class _Reads:
    """What the layers of one window, or of none, read in a step."""

    decodes: list[_DecodeGroup] = field(default_factory=list)
    prefills: list[_Prefill] = field(default_factory=list)


@dataclass(slots=True)
class _State:
    """What `plan` prepared; `write_rows` is None when no token of the step is padding."""

    write_slots: Tensor = field(default_factory=lambda: torch.empty(0))
    write_rows: Tensor | None = None
    whole: _Reads = field(default_factory=_Reads)
    windowed: _Reads = field(default_factory=_Reads)


class TorchAttention(AttentionBackend):
    """Scaled dot-product attention over gathered pages.

    Decoding requests are one batched gather per group of similar lengths, the query heads of a KV head folded
    into the query length; a prefill is one call for each request. Layers with a window gather no more than it reaches;
    layers with a cap compute their scores one by one, which torch's own operator cannot cap. Layout "torch-nhd": keys
    and values apart, each [num_blocks, block_size, num_kv_heads, head_dim]. Of an fp8 cache every key and value is read
    as it was rounded, those of this step too, so that it does not matter how a prompt is cut into chunks.

    Source: Kwon et al. 2023, PagedAttention, arXiv:2309.06180, section 4; grouped queries: arXiv:2305.13245.
    """

    def __init__(self, need: AttentionNeed) -> None:
        super().__init__(need)
        self._dtype: torch.dtype = getattr(torch, need.dtype or "float32")
        self._group = need.num_heads // need.num_kv_heads
        self._window = need.sliding_window if "sliding_window" in need.features else None

    def kv_layout(self) -> KVLayout:
        return nhd_layout(self.need)

    def make_state(self, limits: BatchLimits) -> _State:
        return _State()

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, _State)
        state.write_slots, state.write_rows = layout.slot_mapping, None
        if layout.has_padding:
            state.write_rows = (layout.slot_mapping >= 0).nonzero().squeeze(1)
            state.write_slots = layout.slot_mapping[state.write_rows]
        state.whole = state.windowed = self._plan_reads(layout, layout.max_seq_len)
        if self._window is not None and self._window < layout.max_seq_len:
            state.windowed = self._plan_reads(layout, self._window)

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
        keys, values = pages_of(kv_cache)
        _write(keys, key, state)
        _write(values, value, state)
        output = torch.empty_like(query)
        reads = state.whole if parameters.sliding_window is None else state.windowed
        for group in reads.decodes:
            output[group.rows] = self._decode(query[group.rows], keys, values, group, parameters)
        for prefill in reads.prefills:
            span = slice(prefill.start, prefill.end)
            new = key[span], value[span]
            if prefill.slots is not None:
                new = keys.read(prefill.slots, query.dtype), values.read(prefill.slots, query.dtype)
            output[span] = self._prefill(query[span], *new, prefill.bias, parameters)
        return output.flatten(1)

    def _plan_reads(self, layout: BatchLayout, window: int) -> _Reads:
        prefills = range(layout.num_decode_requests, layout.num_requests)
        return _Reads(
            decodes=[self._plan_decode(layout, members, window) for members in _decode_groups(layout, window)],
            prefills=[self._plan_prefill(layout, index, window) for index in prefills],
        )

    def _bias(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))

    # ------------------------------------------------------------------------------------------------ decode

    def _plan_decode(self, layout: BatchLayout, members: Tensor, window: int) -> _DecodeGroup:
        padded_len = min(int(layout.host_seq_lens[members.numpy()].max()), window)
        device = layout.seq_lens.device
        members = members.to(device)
        seq_lens = layout.seq_lens[members].unsqueeze(1)
        positions = torch.arange(padded_len, device=device)
        if window < layout.max_seq_len:  # then each request's window begins elsewhere
            positions = positions + (seq_lens - window).clamp(min=0)
        written = positions < seq_lens
        slots = _slots(layout.block_table[members], positions, layout.block_size)
        return _DecodeGroup(
            # A decode request has one token, and decodes come first: its token is its index.
            rows=members if len(members) < layout.num_decode_requests else slice(layout.num_decode_requests),
            slots=torch.where(written, slots, slots[:, :1]).flatten(),
            bias=self._bias(~written)[:, None, None, :],
            nobody=(seq_lens == 0).unsqueeze(2) if layout.has_padding else None,
        )

    def _decode(
        self, query: Tensor, keys: Pages, values: Pages, group: _DecodeGroup, parameters: AttentionParameters
    ) -> Tensor:
        num_requests, padded_len = group.bias.shape[0], group.bias.shape[-1]
        shape = (num_requests, padded_len, self.need.num_kv_heads, self.need.head_dim)
        queries = query.view(num_requests, self.need.num_kv_heads, self._group, -1)
        key = keys.read(group.slots, query.dtype).view(shape).transpose(1, 2)
        value = values.read(group.slots, query.dtype).view(shape).transpose(1, 2)
        if parameters.logit_softcap is not None:
            result = _capped_attention(queries, key, value, group.bias, parameters)
        else:
            result = functional.scaled_dot_product_attention(
                queries,
                key,
                value,
                attn_mask=group.bias.expand(-1, self.need.num_kv_heads, self._group, -1),
                scale=parameters.scale,
            )
        result = result.reshape(query.shape)
        return result if group.nobody is None else result.masked_fill(group.nobody, 0.0)

    # ----------------------------------------------------------------------------------------------- prefill

    def _plan_prefill(self, layout: BatchLayout, index: int, window: int) -> _Prefill:
        start, end = int(layout.host_query_start_loc[index]), int(layout.host_query_start_loc[index + 1])
        seq_len, num_tokens = int(layout.host_seq_lens[index]), end - start
        device = layout.seq_lens.device
        seen = torch.arange(max(seq_len - num_tokens - window + 1, 0), seq_len, device=device)
        slots = bias = None
        if seq_len > num_tokens or self.need.kv_cache_dtype != "auto":
            slots = _slots(layout.block_table[index : index + 1], seen, layout.block_size).flatten()
        if seq_len > min(num_tokens, window):
            positions = torch.arange(seq_len - num_tokens, seq_len, device=device).unsqueeze(1)
            bias = self._bias((seen > positions) | (seen <= positions - window))
        return _Prefill(start=start, end=end, slots=slots, bias=bias)

    def _prefill(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, parameters: AttentionParameters
    ) -> Tensor:
        if parameters.logit_softcap is not None:
            return self._capped_prefill(query, key, value, bias, parameters)
        result = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=bias,
            is_causal=bias is None,
            scale=parameters.scale,
            enable_gqa=self._group > 1,
        )
        return result.squeeze(0).transpose(0, 1)

    def _capped_prefill(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, parameters: AttentionParameters
    ) -> Tensor:
        """Some queries at a time: the scores of all at once would not fit in memory."""
        num_tokens, num_keys = len(query), len(key)
        if bias is None:
            bias = self._bias(torch.ones(num_tokens, num_keys, dtype=torch.bool, device=query.device).triu(1))
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        results = []
        for some, its_bias in zip(torch.split(query, _CAPPED_QUERIES), torch.split(bias, _CAPPED_QUERIES), strict=True):
            queries = some.view(len(some), self.need.num_kv_heads, self._group, -1).permute(1, 2, 0, 3)
            folded = queries.flatten(1, 2)  # [num_kv_heads, group * tokens, head_dim]
            result = _capped_attention(folded, keys, values, its_bias.repeat(self._group, 1), parameters)
            results.append(result.view(queries.shape).permute(2, 0, 1, 3).reshape(some.shape))
        return torch.cat(results)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, parameters: AttentionParameters
) -> Tensor:
    """softmax(cap * tanh(scale * Q K^T / cap) + bias) V in float32; [..., num_kv_heads, rows or num_keys, head_dim].

    Source: Gemma 2, arXiv:2408.00118, section 2.
    """
    cap = parameters.logit_softcap
    assert cap is not None
    scores = (query.float() @ key.float().transpose(-1, -2)).mul_(parameters.scale / cap).tanh_().mul_(cap)
    return (scores.add_(bias).softmax(dim=-1) @ value.float()).to(query.dtype)


def _write(pages: Pages, new: Tensor, state: _State) -> None:
    pages.write(state.write_slots, new if state.write_rows is None else new[state.write_rows])


def _slots(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """block_table [requests, max_num_blocks] -> cache slots [requests, num_positions] int64.

    positions: [num_positions], those of every request, or [requests, num_positions].
    """
    columns = positions // block_size
    blocks = block_table[:, columns] if columns.ndim == 1 else block_table.gather(1, columns)
    return blocks.long() * block_size + positions % block_size


def _decode_groups(layout: BatchLayout, window: int) -> Iterator[Tensor]:
    """Indices of decode requests, grouped by how much of their contexts they see, longest first."""
    lengths = layout.host_seq_lens[: layout.num_decode_requests].clip(max=window)
    order = (-lengths).argsort(kind="stable")
    begin = 0
    for index in range(1, len(order) + 1):
        if index == len(order) or lengths[order[index]] < _GROUP_MIN_SHARE * lengths[order[begin]]:
            yield torch.from_numpy(np.sort(order[begin:index]))
            begin = index
