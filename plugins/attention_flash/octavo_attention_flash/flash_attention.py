"""FlashAttention: the flash-attn library, in whichever generation this GPU and this cache can use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UnavailableComponentError
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
from octavo_attention_flash.kv_writes import KVWrites, plan_writes, write_kv
from octavo_attention_flash.libraries import find_library, why_not_flash_attention

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _State:
    """The library's function, and what `plan` prepared for it.

    Attributes:
        context_start_loc: [max_num_requests + 1] int32; request i sees keys context_start_loc[i] .. [i + 1], were all
            contexts in one row.
        batch: the library's arguments that say where requests and pages are, by their names there.
    """

    attend: Callable[..., Any]
    context_start_loc: Tensor
    writes: KVWrites
    batch: Mapping[str, object]


class FlashAttention(AttentionBackend):
    """One call of the library for all requests of a step, prefills and decodes alike, over pages in NHD order.

    What it relies on, as flash-attn 2.8.3.post2, its folder hopper (3.0.0b1) and flash-attn-4 4.0.0b36 have it:

    - FlashAttention-2, `flash_attn_varlen_func(block_table=)`: compute capability 8.0 and later; pages of a multiple
      of 256 tokens; lengths of keys as offsets, `cu_seqlens_k`.
    - FlashAttention-3, `flash_attn_with_kvcache(page_table=, cu_seqlens_q=)`: made for capability 9.0; pages of any
      size; lengths as `cache_seqlens`, which count this step's tokens when no `k` and `v` are given.
    - FlashAttention-4, `flash_attn_varlen_func(page_table=)` of `flash_attn.cute`: pages of any size on capabilities
      9, 10 and 11; lengths as `seqused_k`; returns (output, log-sum-exp). Where a page is as large as a tile of keys
      (128), it reads all of a request's last page: what is unwritten there must be finite. Our caches start zeroed.
    - All: bfloat16 and float16; query heads in groups over the KV heads, in order; the causal mask is aligned to the
      last query and the last key; `window_size` counts the tokens to the left *without* the query itself, -1 is all
      of them; `softcap` 0.0 is none; lengths are read on the device, host maxima are upper bounds. A query that sees
      nothing gets zeros, say the first two.
    - fp8: scales of keys and values are one for each request and KV head (FlashAttention-3 and -4), not for each
      token as our layout has them, so it is not offered.

    `graph_mode` is "none" until a capture has been tried on a GPU.

    Source: Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608.
    """

    def __init__(self, need: AttentionNeed) -> None:
        super().__init__(need)
        library = find_library(need)
        if library is None:
            raise UnavailableComponentError(f"flash-attn cannot serve this: {'; '.join(why_not_flash_attention(need))}")
        self._library = library
        self._batch_arguments = _BATCH_ARGUMENTS[library.title]

    def kv_layout(self) -> KVLayout:
        return nhd_layout(self.need)

    def make_state(self, limits: BatchLimits) -> _State:
        # Imported here: who only counts memory, perhaps for another machine, asks for the layout alone.
        library = self._library
        module, _, name = library.function.partition(":")
        attend = getattr(import_module(module), name)
        logger.info("attention by %s (%s %s)", library.title, library.distribution, library.version())
        none = torch.empty(0, dtype=torch.int64, device=limits.device)
        starts = torch.zeros(limits.max_num_requests + 1, dtype=torch.int32, device=limits.device)
        return _State(attend=attend, context_start_loc=starts, writes=KVWrites(slots=none), batch={})

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, _State)
        state.writes = plan_writes(layout)
        state.batch = self._batch_arguments(layout, state.context_start_loc)

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
        write_kv(key, value, kv_cache, state.writes)
        window = parameters.sliding_window
        result = state.attend(
            query,
            *kv_cache,
            **state.batch,
            softmax_scale=parameters.scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=parameters.logit_softcap or 0.0,
        )
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output.flatten(1)


def _arguments_2(layout: BatchLayout, context_start_loc: Tensor) -> dict[str, object]:
    starts = context_start_loc[: layout.num_requests + 1]
    torch.cumsum(layout.seq_lens, 0, dtype=torch.int32, out=starts[1:])
    return {
        "cu_seqlens_q": layout.query_start_loc,
        "cu_seqlens_k": starts,
        "max_seqlen_q": layout.max_query_len,
        "max_seqlen_k": layout.max_seq_len,
        "block_table": layout.block_table,
    }


def _arguments_3(layout: BatchLayout, context_start_loc: Tensor) -> dict[str, object]:
    return {
        "cu_seqlens_q": layout.query_start_loc,
        "cache_seqlens": layout.seq_lens,
        "max_seqlen_q": layout.max_query_len,
        "page_table": layout.block_table,
    }


def _arguments_4(layout: BatchLayout, context_start_loc: Tensor) -> dict[str, object]:
    return {
        "cu_seqlens_q": layout.query_start_loc,
        "seqused_k": layout.seq_lens,
        "max_seqlen_q": layout.max_query_len,
        "max_seqlen_k": layout.max_seq_len,
        "page_table": layout.block_table,
    }


_BATCH_ARGUMENTS: Mapping[str, Callable[[BatchLayout, Tensor], dict[str, object]]] = {
    "FlashAttention-2": _arguments_2,
    "FlashAttention-3": _arguments_3,
    "FlashAttention-4": _arguments_4,
}
