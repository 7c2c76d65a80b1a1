"""FlashAttention-4 in plain torch: the function of flash-attn-4 4.0.0b36 that is used, with its arguments."""

from __future__ import annotations

from collections.abc import Callable

from paged_reference import attend, check_lengths, check_page_table, rows_of
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., object] | None = None,
    score_mod_bwd: Callable[..., object] | None = None,
    mask_mod: Callable[..., object] | None = None,
    block_sparse_tensors: object = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple[object, ...] | None = None,
    return_lse: bool = False,
    scheduler_metadata: object = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    assert page_table is not None
    assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
    assert seqused_k is not None
    assert cu_seqlens_q is not None
    assert max_seqlen_q is not None
    assert q.shape[2] % 16 == 0, "Paged KV does not support irregular head dim"
    check_lengths(cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k)
    check_page_table(page_table, len(seqused_k))
    left, right = (-1 if bound is None else bound for bound in window_size)
    output = attend(
        q,
        k,
        v,
        query_start_loc=cu_seqlens_q.tolist(),
        key_lens=seqused_k.tolist(),
        pages=rows_of(page_table, seqused_k.tolist(), k.shape[1]),
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        window=(left, right),
        softcap=softcap,
    )
    return output, None
