"""FlashInfer in plain torch: the wrapper of flashinfer-python 0.7.2.post1 that is used, with its arguments.

As its Hopper kernels do, it masks by the lengths that `plan` was given, whatever the device holds by then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from paged_reference import attend
from torch import Tensor


@dataclass
class _Plan:
    query_start_loc: list[int]
    key_lens: list[int]
    pages: list[Tensor]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    scale: float | None
    causal: bool
    window_left: int
    softcap: float
    dtype: torch.dtype


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[object] | None = None,
        jit_kwargs: dict[str, object] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        assert kv_layout == "NHD"
        assert float_workspace_buffer.data_ptr() % 16 == 0
        self._plan: _Plan | None = None

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
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
    ) -> None:
        for lengths in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert lengths.dtype == torch.int32
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert len(paged_kv_indices) == int(paged_kv_indptr[-1])
        assert paged_kv_last_page_len.min() >= 1
        assert paged_kv_last_page_len.max() <= page_size
        assert head_dim_qk in (64, 128, 256)
        num_pages = paged_kv_indptr.diff()
        self._plan = _Plan(
            query_start_loc=qo_indptr.tolist(),
            key_lens=((num_pages - 1) * page_size + paged_kv_last_page_len).tolist(),
            pages=list(torch.split(paged_kv_indices.long(), num_pages.tolist())),
            num_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            page_size=page_size,
            scale=sm_scale,
            causal=causal,
            window_left=window_left,
            softcap=logits_soft_cap or 0.0,
            dtype=getattr(torch, q_data_type) if isinstance(q_data_type, str) else q_data_type,
        )

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        *args: object,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: Tensor | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Tensor:
        plan = self._plan
        assert plan is not None, "plan info is not initialized"
        assert isinstance(paged_kv_cache, tuple)
        keys, values = paged_kv_cache
        assert q.dtype == keys.dtype == plan.dtype
        assert q.shape == (plan.query_start_loc[-1], plan.num_heads, plan.head_dim)
        assert keys.shape[1:] == values.shape[1:] == (plan.page_size, plan.num_kv_heads, plan.head_dim)
        return attend(
            q,
            keys,
            values,
            query_start_loc=plan.query_start_loc,
            key_lens=plan.key_lens,
            pages=plan.pages,
            scale=plan.head_dim**-0.5 if plan.scale is None else plan.scale,
            causal=plan.causal,
            window=(plan.window_left, -1),
            softcap=plan.softcap,
        )
