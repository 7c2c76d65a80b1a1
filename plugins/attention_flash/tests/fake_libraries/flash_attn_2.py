"""FlashAttention-2 in plain torch: the function of flash-attn 2.8.3.post2 that is used, with its arguments."""

from __future__ import annotations

from paged_reference import attend, check_lengths, check_page_table, rows_of
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert block_table is not None
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert q.shape[2] % 8 == 0
    assert q.shape[2] <= 256
    key_lens = cu_seqlens_k.diff()
    check_lengths(cu_seqlens_q, max_seqlen_q, key_lens, max_seqlen_k)
    assert cu_seqlens_k.is_contiguous()
    check_page_table(block_table, len(key_lens))
    return attend(
        q,
        k,
        v,
        query_start_loc=cu_seqlens_q.tolist(),
        key_lens=key_lens.tolist(),
        pages=rows_of(block_table, key_lens.tolist(), k.shape[1]),
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
    )
