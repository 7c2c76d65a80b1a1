"""FlashAttention-3 in plain torch: the function of flash_attn_interface 3.0.0b1 that is used, with its arguments."""

from __future__ import annotations

from paged_reference import attend, check_lengths, check_page_table, rows_of
from torch import Tensor


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    assert page_table is not None
    assert cache_seqlens is not None
    assert cu_seqlens_q is not None
    assert max_seqlen_q is not None, "max_seqlen_q must be provided if cu_seqlens_q is provided"
    assert q.shape[2] % 8 == 0
    assert q.shape[2] <= 256
    check_lengths(cu_seqlens_q, max_seqlen_q, cache_seqlens, None)
    check_page_table(page_table, len(cache_seqlens))
    return attend(
        q,
        k_cache,
        v_cache,
        query_start_loc=cu_seqlens_q.tolist(),
        key_lens=cache_seqlens.tolist(),
        pages=rows_of(page_table, cache_seqlens.tolist(), k_cache.shape[1]),
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
    )
