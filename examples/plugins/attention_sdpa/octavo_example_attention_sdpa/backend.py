"""The backend: write this step's keys and values into their slots, then attend request by request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from octavo.interfaces import (
    AttentionBackend,
    AttentionParameters,
    BatchLayout,
    BatchLimits,
    KVCache,
    KVLayout,
    nhd_layout,
)
from octavo.plugins.specs import AttentionNeed
from octavo_example_attention_sdpa.options import SDPAOptions


@dataclass(slots=True)
class _State:
    """What is written and what is read in this step."""

    rows: Tensor  # [num_written] int64, tokens of the step
    slots: Tensor  # [num_written] int64, where they are written
    slices: list[tuple[int, int, Tensor]]  # of queries: first token, end, cache slots up to the last token's position


class SDPAAttention(AttentionBackend):
    """Attention over gathered pages, in slices of at most `max_query_tokens` queries.

    Layout "torch-nhd": keys and values apart, each [num_blocks, block_size, num_kv_heads, head_dim].
    """

    def __init__(self, need: AttentionNeed, *, options: SDPAOptions) -> None:
        super().__init__(need)
        self._max_query_tokens = options.max_query_tokens

    def kv_layout(self) -> KVLayout:
        return nhd_layout(self.need)

    def make_state(self, limits: BatchLimits) -> _State:
        return _State(rows=torch.empty(0), slots=torch.empty(0), slices=[])

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, _State)
        state.rows = (layout.slot_mapping >= 0).nonzero().squeeze(1)
        state.slots = layout.slot_mapping[state.rows]
        state.slices = []
        for index, seq_len in enumerate(layout.seq_lens.tolist()):
            first, end = layout.host_query_start_loc[index : index + 2].tolist()
            positions = torch.arange(seq_len, device=layout.block_table.device)
            blocks = layout.block_table[index, positions // layout.block_size].long()
            slots = blocks * layout.block_size + positions % layout.block_size
            for start in range(first, end, self._max_query_tokens):
                stop = min(start + self._max_query_tokens, end)
                state.slices.append((start, stop, slots[: seq_len - (end - stop)]))

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
        keys, values = (buffer.flatten(0, 1) for buffer in kv_cache)
        keys[state.slots], values[state.slots] = key[state.rows], value[state.rows]
        output = torch.empty_like(query)
        for start, stop, slots in state.slices:
            visible = torch.ones(stop - start, len(slots), dtype=torch.bool, device=query.device)
            attended = functional.scaled_dot_product_attention(
                query[start:stop].transpose(0, 1).unsqueeze(0),
                keys[slots].transpose(0, 1).unsqueeze(0),
                values[slots].transpose(0, 1).unsqueeze(0),
                attn_mask=visible.tril(len(slots) - (stop - start)),
                scale=parameters.scale,
                enable_gqa=True,
            )
            output[start:stop] = attended.squeeze(0).transpose(0, 1)
        return output.flatten(1)
