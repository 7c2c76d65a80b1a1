"""TritonFlash: attention as FlashAttention computes it, over pages; made for prefill, able to decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
from octavo_attention_triton.kernels.flash_prefill import flash_prefill
from octavo_attention_triton.tuned import FlashConfig, flash_config


@dataclass(slots=True)
class _State:
    """What a step's layers are launched with; the batch's own tensors are read where they lie."""

    max_num_requests: int
    capability: int
    layout: BatchLayout | None = None
    config: FlashConfig | None = None


class TritonFlash(AttentionBackend):
    """Two launches a layer: one rotates and writes the cache, one attends, whatever the mixture of requests.

    What is launched follows from counts on the host, so that nothing waits for the device and a step of decodes can be
    captured. Layout "torch-nhd".

    Source: Dao 2023, FlashAttention-2, arXiv:2307.08691.
    """

    graph_mode: Literal["none", "decode"] = "decode"

    def __init__(self, need: AttentionNeed) -> None:
        super().__init__(need)
        self._dtype: torch.dtype = getattr(torch, need.dtype or "float32")
        self._group = need.num_heads // need.num_kv_heads

    def kv_layout(self) -> KVLayout:
        return nhd_layout(self.need)

    def make_state(self, limits: BatchLimits) -> _State:
        return _State(max_num_requests=limits.max_num_requests, capability=target_capability())

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, _State)
        state.layout = layout
        state.config = flash_config(
            state.capability,
            self._dtype,
            self.need.head_dim,
            layout.max_query_len * self._group,  # the query heads of a KV head share its tiles
            self.need.kv_cache_dtype == "fp8",
        )

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
        assert state.layout is not None
        write_kv(key, value, kv_cache, state.layout.slot_mapping)
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
        assert state.layout is not None
        rotated = rotate_and_write_kv(query, key, value, rotary, kv_cache, state.layout.slot_mapping)
        return _attend(rotated, kv_cache, state, parameters)


def _attend(query: Tensor, kv_cache: KVCache, state: _State, parameters: AttentionParameters) -> Tensor:
    assert state.layout is not None
    assert state.config is not None
    out = flash_prefill(
        query,
        kv_cache,
        state.layout,
        parameters=parameters,
        max_num_requests=state.max_num_requests,
        config=state.config,
    )
    return out.flatten(1)
