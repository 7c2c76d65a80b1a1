"""TritonPaged: every token attends as a decode does, alone over its request's pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
from octavo.plugins.tuned_data import target_capability
from octavo_attention_triton.cache import rotate_and_write_kv, write_kv
from octavo_attention_triton.kernels.merge_splits import SplitStates
from octavo_attention_triton.kernels.paged_decode import paged_decode
from octavo_attention_triton.options import MAX_SPLITS, PagedOptions
from octavo_attention_triton.tuned import PagedConfig, num_multiprocessors, paged_config

# Programs on a multiprocessor: with two of them one computes while the other waits for memory.
_PROGRAMS_EACH = 2


@dataclass(slots=True)
class _State:
    """`plan` sets what stands behind the blank line; a row is a token of the step.

    Attributes:
        rows: [max_num_tokens] int32, 0, 1, 2 ...
        row_requests, row_lens: [num_rows] int32, each row's request and the length of its context, itself included.
    """

    config: PagedConfig
    rows: Tensor
    num_programs: int
    splits: SplitStates

    num_splits: int
    row_requests: Tensor
    row_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor


class TritonPaged(AttentionBackend):
    """Paged decode in splits (flash-decoding), the query heads of a KV head packed into one tile.

    A prefill's tokens are rows of their own, each of its own length: right, and slow, as each reads the context anew.

    How many splits is chosen on the host, from the number of rows and an upper bound of the lengths; how long each is,
    on the GPU, from the lengths. So one captured launch serves all lengths.

    Source: Kwon et al. 2023, arXiv:2309.06180; Dao et al. 2023, flash-decoding; grouped queries: arXiv:2305.13245.
    """

    graph_mode = "decode"

    def __init__(self, need: AttentionNeed, *, options: PagedOptions) -> None:
        super().__init__(need)
        self._options = options
        self._dtype: torch.dtype = getattr(torch, need.dtype or "float32")

    def kv_layout(self) -> KVLayout:
        return nhd_layout(self.need)

    def make_state(self, limits: BatchLimits) -> _State:
        need, device = self.need, limits.device
        capability = target_capability()
        num_programs = _PROGRAMS_EACH * num_multiprocessors(capability, device)
        rows = torch.arange(max(limits.max_num_tokens, limits.max_num_requests), dtype=torch.int32, device=device)
        # Chosen by the number of rows, they stay under twice the programs wanted; asked for, they are for decodes.
        # A power of two, for a merge's tile is one.
        max_splits, capacity = min(_power_of_two(num_programs // need.num_kv_heads), MAX_SPLITS), 2 * num_programs
        if self._options.num_kv_splits is not None:
            max_splits = self._options.num_kv_splits
            capacity = limits.max_num_requests * need.num_kv_heads * max_splits
        capacity = 0 if max_splits == 1 else capacity * (need.num_heads // need.num_kv_heads)
        return _State(
            config=paged_config(
                capability,
                self._dtype,
                need.head_dim,
                need.num_heads // need.num_kv_heads,
                need.block_size,
                need.kv_cache_dtype == "fp8",
            ),
            rows=rows,
            num_programs=num_programs,
            splits=SplitStates.allocate(capacity, need.head_dim, max_splits, device),
            num_splits=1,
            row_requests=rows,
            row_lens=rows,
            block_table=rows.unsqueeze(0),
            slot_mapping=rows,
        )

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, _State)
        state.block_table, state.slot_mapping = layout.block_table, layout.slot_mapping
        state.num_splits = self._num_splits(layout, state)
        rows = state.rows[: layout.num_tokens]
        if layout.num_tokens == layout.num_requests:
            state.row_requests, state.row_lens = rows, layout.seq_lens
            return
        ends = layout.query_start_loc[1:]
        state.row_requests = torch.searchsorted(ends, rows, right=True, out_int32=True)
        # A request's last token sees all of it, the one before one less.
        state.row_lens = layout.seq_lens[state.row_requests] - (ends[state.row_requests] - 1 - rows)

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
        write_kv(key, value, kv_cache, state.slot_mapping)
        return _attend(query, kv_cache, state, parameters)

    def rotate_and_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        assert isinstance(state, _State)
        query = rotate_and_write_kv(query, key, value, rotary, kv_cache, state.slot_mapping)
        return _attend(query, kv_cache, state, parameters)

    def _num_splits(self, layout: BatchLayout, state: _State) -> int:
        """As many as fill the GPU, or as asked for; no more than there are tiles, or room for their states."""
        num_programs = layout.num_tokens * self.need.num_kv_heads  # without splits
        # The nearest: where they nearly fill it, splitting costs more than it fills.
        wanted = self._options.num_kv_splits or (state.num_programs + num_programs // 2) // num_programs
        num_tiles = -(-layout.max_seq_len // state.config.block_n)
        room = len(state.splits.max) // (layout.num_tokens * self.need.num_heads)
        return max(min(wanted, num_tiles, state.splits.max_splits, room), 1)


def _power_of_two(number: int) -> int:
    """The largest that is not greater; 1 of less than that."""
    return 1 << max(number.bit_length() - 1, 0)


def _attend(query: Tensor, kv_cache: KVCache, state: _State, parameters: AttentionParameters) -> Tensor:
    return paged_decode(
        query,
        kv_cache,
        state.block_table,
        state.row_requests,
        state.row_lens,
        parameters=parameters,
        states=state.splits,
        num_splits=state.num_splits,
        config=state.config,
    ).flatten(1)
