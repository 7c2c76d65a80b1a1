"""FlashInferAttention: prefill by the FlashInfer library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from typing import Any, Protocol

import numpy as np
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
from octavo_attention_flash.kv_writes import KVWrites, plan_writes, write_kv

_WORKSPACE_BYTES = 128 << 20  # what the library recommends, for partial results of split contexts


class _Wrapper(Protocol):
    """What is used of `flashinfer.BatchPrefillWithPagedKVCacheWrapper`."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        q_data_type: torch.dtype,
    ) -> None: ...

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor: ...


@dataclass(slots=True)
class _Planner:
    """One wrapper. Its plan goes to the device from pinned memory of its own, which must not be written too early.

    Attributes:
        copied: recorded behind that copy; None where there is no GPU.
    """

    wrapper: _Wrapper
    copied: torch.cuda.Event | None

    def is_free(self) -> bool:
        return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pages:
    """Where a step's queries and pages are, as the library takes it.

    Attributes:
        query_start_loc: [num_requests + 1] int32, on the host.
        page_start_loc: [num_requests + 1] int32, on the host; request i has pages page_start_loc[i] .. [i + 1].
        last_page_lens: [num_requests] int32, on the host; tokens in each request's last page, 1 .. block_size.
        blocks: [number of pages] int32, on the device; the pages of all requests in a row.
    """

    query_start_loc: Tensor
    page_start_loc: Tensor
    last_page_lens: Tensor
    blocks: Tensor


@dataclass(slots=True)
class _State:
    """What `plan` prepared, and the wrappers, by the parameters that the library wants to know when it plans."""

    workspace: Tensor
    planners: dict[AttentionParameters, list[_Planner]] = field(default_factory=dict)
    planned: dict[AttentionParameters, _Wrapper] = field(default_factory=dict)
    pages: _Pages | None = None
    writes: KVWrites | None = None


class FlashInferAttention(AttentionBackend):
    """`BatchPrefillWithPagedKVCacheWrapper` over pages in NHD order, planned once a step for equal layers.

    What it relies on, as flashinfer-python 0.7.2.post1 has it:

    - `plan` and `run`; pages of any size; keys and values as a tuple of two tensors; bfloat16 and float16; `backend=
      "auto"` is FlashAttention-3 on compute capability 9.0 with head sizes 64, 128 and 256, else FlashAttention-2.
    - `causal` is aligned to the last query and the last key; `window_left` counts the tokens to the left *without* the
      query itself, -1 is all of them; `logits_soft_cap` 0.0 is none. Scale, window and cap are fixed by `plan`, so
      layers that differ in them have wrappers of their own, planned when the first of them runs.
    - `plan` divides the work on the host, by the lengths it is given there, and its Hopper kernels mask by them too.
      A prefill's are exact; a decode's are upper bounds (a captured step has max_model_len for all), and waiting for
      the device to know better would stop the pipeline. Hence prefill alone.
    - `plan` copies to the device from pinned memory of the wrapper: one that may still be read is left alone, and
      another is made, at most one more than there are steps in flight.
    - fp8: `k_scale` and `v_scale` are one for a whole cache, not for each token as our layout has them.
    - Kernels are built by nvcc, or found built, when a dtype, head size, window or cap is first planned with. That
      happens in `make_state`, not while requests wait.

    Source: Ye et al. 2025, arXiv:2501.01005.
    """

    def kv_layout(self) -> KVLayout:
        return nhd_layout(self.need)

    def make_state(self, limits: BatchLimits) -> _State:
        state = _State(workspace=torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=limits.device))
        one, starts = torch.ones(1, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
        block = torch.zeros(1, dtype=torch.int32, device=limits.device)
        state.pages = _Pages(query_start_loc=starts, page_start_loc=starts, last_page_lens=one, blocks=block)
        for parameters in self._usual_parameters():
            self._planned(parameters, state)
        return state

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, _State)
        state.writes = plan_writes(layout)
        state.pages = _find_pages(layout)
        state.planned = {}

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
        assert state.writes is not None
        write_kv(key, value, kv_cache, state.writes)
        keys, values = kv_cache
        return self._planned(parameters, state).run(query, (keys, values)).flatten(1)

    def _usual_parameters(self) -> Iterator[AttentionParameters]:
        """Those that need a kernel of their own."""
        need = self.need
        windows = {None, need.sliding_window if "sliding_window" in need.features else None}
        caps = {None, need.logit_softcap if "logit_softcap" in need.features else None}
        for window, cap in product(windows, caps):
            yield AttentionParameters(scale=need.head_dim**-0.5, sliding_window=window, logit_softcap=cap)

    def _planned(self, parameters: AttentionParameters, state: _State) -> _Wrapper:
        """The wrapper of layers with these parameters, planned for this step."""
        if (wrapper := state.planned.get(parameters)) is not None:
            return wrapper
        planners = state.planners.setdefault(parameters, [])
        planner = next((one for one in planners if one.is_free()), None)
        if planner is None:
            planners.append(planner := _make_planner(state.workspace))
        pages, window, dtype = state.pages, parameters.sliding_window, getattr(torch, self.need.dtype or "bfloat16")
        assert pages is not None
        planner.wrapper.plan(
            pages.query_start_loc,
            pages.page_start_loc,
            pages.blocks,
            pages.last_page_lens,
            self.need.num_heads,
            self.need.num_kv_heads,
            self.need.head_dim,
            self.need.block_size,
            causal=True,
            sm_scale=parameters.scale,
            window_left=-1 if window is None else window - 1,
            logits_soft_cap=parameters.logit_softcap or 0.0,
            q_data_type=dtype,
        )
        if planner.copied is not None:
            planner.copied.record()
        state.planned[parameters] = planner.wrapper
        return planner.wrapper


def _make_planner(workspace: Tensor) -> _Planner:
    library: Any = import_module("flashinfer")
    wrapper: _Wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    copied = torch.cuda.Event() if workspace.is_cuda else None  # type: ignore[no-untyped-call]
    return _Planner(wrapper, copied)


def _find_pages(layout: BatchLayout) -> _Pages:
    """From lengths on the host, exact for prefills, and the block table, which stays on the device."""
    seq_lens, size = layout.host_seq_lens, layout.block_size
    num_pages = -(-seq_lens // size)
    page_start_loc = np.zeros(layout.num_requests + 1, np.int32)
    np.cumsum(num_pages, out=page_start_loc[1:])
    device, total = layout.block_table.device, int(page_start_loc[-1])
    width = layout.block_table.shape[1]
    # A page's place in the table is its number and what the rows before its own leave unused.
    unused = torch.from_numpy(np.repeat(np.arange(layout.num_requests) * width - page_start_loc[:-1], num_pages))
    places = torch.arange(total, device=device) + unused.to(device, non_blocking=True)
    return _Pages(
        query_start_loc=torch.from_numpy(layout.host_query_start_loc),
        page_start_loc=torch.from_numpy(page_start_loc),
        last_page_lens=torch.from_numpy((seq_lens - 1) % size + 1),
        blocks=layout.block_table.flatten()[places],
    )
