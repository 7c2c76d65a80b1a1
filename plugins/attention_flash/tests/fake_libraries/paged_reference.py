"""Attention over paged keys and values by the formula, one query at a time: what the fake libraries compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    query_start_loc: Sequence[int],
    key_lens: Sequence[int],
    pages: Sequence[Tensor],
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:
    """[total queries, heads, head size]; query i of a request sees keys as the libraries document it:

    from i + keys - queries - window[0] to i + keys - queries + window[1], both included, -1 being without a bound;
    `causal` bounds the second by 0. One that sees nothing gets zeros.
    """
    assert query.dtype in (torch.float16, torch.bfloat16), "the libraries take float16 and bfloat16"
    assert keys.dtype == values.dtype == query.dtype
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert len(query) == query_start_loc[-1]
    output = torch.zeros(query.shape, dtype=torch.float32)
    group = query.shape[1] // keys.shape[2]
    for index, (num_keys, its_pages) in enumerate(zip(key_lens, pages, strict=True)):
        start, end = query_start_loc[index], query_start_loc[index + 1]
        key, value = (buffer[its_pages].flatten(0, 1)[:num_keys].float() for buffer in (keys, values))
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        for token in range(start, end):
            last = token - start + num_keys - (end - start)
            right = 0 if causal else window[1]
            first_seen = max(last - window[0], 0) if window[0] >= 0 else 0
            end_seen = min(last + right + 1, num_keys) if right >= 0 else num_keys
            if first_seen >= end_seen:
                continue
            scores = torch.einsum("hd,khd->hk", query[token].float(), key[first_seen:end_seen]) * scale
            if softcap > 0.0:
                scores = softcap * torch.tanh(scores / softcap)
            output[token] = torch.einsum("hk,khd->hd", scores.softmax(dim=-1), value[first_seen:end_seen])
    return output.to(query.dtype)


def check_lengths(query_start_loc: Tensor, max_seqlen_q: int, key_lens: Tensor, max_seqlen_k: int | None) -> None:
    """int32 and contiguous, as the libraries demand, and the host's maxima are bounds."""
    assert query_start_loc.dtype == key_lens.dtype == torch.int32
    assert query_start_loc.is_contiguous()
    assert key_lens.is_contiguous()
    assert int(query_start_loc.diff().max()) <= max_seqlen_q
    assert max_seqlen_k is None or int(key_lens.max()) <= max_seqlen_k


def check_page_table(page_table: Tensor, num_requests: int) -> None:
    assert page_table.dtype == torch.int32
    assert page_table.stride(-1) == 1
    assert len(page_table) == num_requests


def rows_of(page_table: Tensor, key_lens: Sequence[int], page_size: int) -> list[Tensor]:
    """Each request's own pages."""
    return [row[: -(-num_keys // page_size)].long() for row, num_keys in zip(page_table, key_lens, strict=True)]
