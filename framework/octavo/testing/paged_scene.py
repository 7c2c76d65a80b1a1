"""PagedScene: requests in shuffled blocks of one KV cache, stepped by hand, and what attention must make of them.

The part of the runner in the attention suite: it hands backends batches as the engine would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from octavo.interfaces.attention import (
    PAD_SLOT,
    AttentionBackend,
    AttentionParameters,
    BatchLayout,
    BatchLimits,
    KVCache,
)
from octavo.plugins.specs import AttentionNeed

NUM_TOKENS, NUM_REQUESTS = 2048, 40  # that a scene's cache has room for
LIMITS = {"max_num_requests": 32, "max_num_tokens": 1024, "max_model_len": 512}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PagedRequest:
    """All tokens of one request, and the blocks that hold them.

    Attributes:
        query: [tokens, num_heads, head_dim]; key, value: [tokens, num_kv_heads, head_dim].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A request's tokens start .. end, computed in one step; what is before start is its context."""

    request: PagedRequest
    start: int
    end: int

    @property
    def is_decode(self) -> bool:
        return self.start > 0 and self.end - self.start == 1

    def next(self, num_tokens: int) -> Row:
        """The tokens that come after these."""
        return replace(self, start=self.end, end=self.end + num_tokens)

    def __str__(self) -> str:
        return f"{self.end - self.start} token(s) behind a context of {self.start}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step: its rows, decodes first, and the tensors a backend gets for them."""

    rows: tuple[Row, ...]
    layout: BatchLayout
    query: Tensor
    key: Tensor
    value: Tensor

    def wanted(self, parameters: AttentionParameters) -> Tensor:
        """[num_tokens, num_heads * head_dim] float64 on the CPU, by the formula."""
        return torch.cat([dense_attention(row, parameters) for row in self.rows])

    def row_of(self, token: int) -> Row:
        index = int(np.searchsorted(self.layout.host_query_start_loc, token, side="right"))
        return self.rows[index - 1]

    def tokens_of(self, row: Row) -> slice:
        start = int(self.layout.host_query_start_loc[self.rows.index(row)])
        return slice(start, start + row.end - row.start)

    def written_blocks(self) -> set[int]:
        slots = self.layout.slot_mapping[self.layout.slot_mapping != PAD_SLOT]
        return set((slots // self.layout.block_size).tolist())

    def without_writes_of(self, *padded: Row) -> Batch:
        """The same step, these rows being padding."""
        slot_mapping = self.layout.slot_mapping.clone()
        for row in padded:
            slot_mapping[self.tokens_of(row)] = PAD_SLOT
        return replace(self, layout=replace(self.layout, slot_mapping=slot_mapping, has_padding=True))


class PagedScene:
    """One cache and its requests. Every slot that no step has written holds NaN (the largest number, of integers).

    Blocks are handed out in random order. The first and the last belong to nobody: the first because block tables are
    filled up with it, both because that is where PAD_SLOT leads when it is taken for a slot.
    """

    def __init__(self, backend: AttentionBackend, need: AttentionNeed, *, device: str = "cpu") -> None:
        self.need = need
        self.backend = backend
        self.device = device
        self._generator = torch.Generator().manual_seed(0)
        self._states: dict[AttentionBackend, object] = {}
        num_blocks = -(-NUM_TOKENS // need.block_size) + NUM_REQUESTS
        self.cache = unwritten_cache(backend, num_blocks, device)
        self._free_blocks = (torch.randperm(num_blocks - 2, generator=self._generator) + 1).tolist()

    def request(self, num_tokens: int, *, after: Sequence[int] = (), amplify: float = 1.0) -> PagedRequest:
        """A request of this many tokens, drawn from a normal distribution, in blocks of its own.

        Args:
            after: blocks of another request that it begins with.
            amplify: factor of its queries.
        """
        need, dtype = self.need, torch_dtype(self.need)
        count = -(-num_tokens // need.block_size) - len(after)

        def draw(num_heads: int, factor: float = 1.0) -> Tensor:
            numbers = torch.randn(num_tokens, num_heads, need.head_dim, generator=self._generator) * factor
            return numbers.to(dtype).to(self.device)

        return PagedRequest(
            query=draw(need.num_heads, amplify),
            key=draw(need.num_kv_heads),
            value=draw(need.num_kv_heads),
            blocks=[*after, *(self._free_blocks.pop() for _ in range(count))],
        )

    def take_block(self) -> int:
        """A block that belongs to nobody yet."""
        return int(self._free_blocks.pop())

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The rows as one step, decodes first."""
        rows = sorted(rows, key=lambda row: not row.is_decode)
        query_start_loc = np.cumsum([0, *(row.end - row.start for row in rows)], dtype=np.int32)
        seq_lens = np.array([row.end for row in rows], np.int32)
        block_size, num_decodes = self.need.block_size, sum(row.is_decode for row in rows)
        block_table = torch.zeros(len(rows), -(-int(seq_lens.max()) // block_size), dtype=torch.int32)
        slots: list[int] = []
        for index, row in enumerate(rows):
            used = row.request.blocks[: -(-row.end // block_size)]
            block_table[index, : len(used)] = torch.tensor(used)
            slots += [used[p // block_size] * block_size + p % block_size for p in range(row.start, row.end)]

        def tokens(part: Callable[[PagedRequest], Tensor]) -> Tensor:
            return torch.cat([part(row.request)[row.start : row.end] for row in rows])

        return Batch(
            rows=tuple(rows),
            query=tokens(lambda request: request.query),
            key=tokens(lambda request: request.key),
            value=tokens(lambda request: request.value),
            layout=BatchLayout(
                num_requests=len(rows),
                num_tokens=len(slots),
                num_decode_requests=num_decodes,
                num_decode_tokens=num_decodes,
                max_query_len=int(np.diff(query_start_loc).max()),
                max_seq_len=int(seq_lens.max()),
                block_size=block_size,
                query_start_loc=torch.from_numpy(query_start_loc).to(self.device),
                seq_lens=torch.from_numpy(seq_lens).to(self.device),
                block_table=block_table.to(self.device),
                slot_mapping=torch.tensor(slots, dtype=torch.int64, device=self.device),
                host_query_start_loc=query_start_loc,
                host_seq_lens=seq_lens,
            ),
        )

    def plan(self, batch: Batch, backend: AttentionBackend | None = None) -> None:
        backend = backend or self.backend
        backend.plan(batch.layout, self._state(backend))

    def forward(
        self,
        batch: Batch,
        backend: AttentionBackend | None = None,
        *,
        cache: KVCache | None = None,
        parameters: AttentionParameters | None = None,
    ) -> Tensor:
        """One layer of the step that was planned; by default with the usual scale, no window and no cap."""
        backend = backend or self.backend
        cache = self.cache if cache is None else cache
        parameters = parameters or usual_parameters(self.need)
        return backend.forward(batch.query, batch.key, batch.value, cache, self._state(backend), parameters)

    def step(
        self,
        batch: Batch,
        backend: AttentionBackend | None = None,
        *,
        parameters: AttentionParameters | None = None,
    ) -> Tensor:
        """Plan and forward."""
        self.plan(batch, backend)
        return self.forward(batch, backend, parameters=parameters)

    def _state(self, backend: AttentionBackend) -> object:
        if backend not in self._states:
            limits = BatchLimits(**LIMITS, block_size=self.need.block_size, device=self.device)
            self._states[backend] = backend.make_state(limits)
        return self._states[backend]


def torch_dtype(need: AttentionNeed) -> torch.dtype:
    """What activations have."""
    dtype: torch.dtype = getattr(torch, need.dtype or "float32")
    return dtype


def usual_parameters(need: AttentionNeed) -> AttentionParameters:
    """Of a layer with neither window nor cap."""
    return AttentionParameters(scale=need.head_dim**-0.5)


def dense_attention(row: Row, parameters: AttentionParameters) -> Tensor:
    """softmax(capped(scale * Q K^T) + mask) V over the request's own tensors, in float64 on the CPU.

    The mask hides later tokens and those behind the window. Query head h reads key/value head h // group.
    Returns [tokens, num_heads * head_dim].
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped heads: arXiv:2305.13245.
    """
    query, key, value = (tensor.cpu().double() for tensor in (row.request.query, row.request.key, row.request.value))
    group = query.shape[1] // key.shape[1]
    key, value = (tensor[: row.end].repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query[row.start : row.end], key) * parameters.scale
    if (cap := parameters.logit_softcap) is not None:
        scores = cap * torch.tanh(scores / cap)
    behind = torch.arange(row.start, row.end).unsqueeze(1) - torch.arange(row.end)  # how far each key is
    hidden = behind < 0
    if parameters.sliding_window is not None:
        hidden |= behind >= parameters.sliding_window
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def unwritten_cache(backend: AttentionBackend, num_blocks: int, device: str) -> KVCache:
    """One layer's buffers, full of what nobody may read."""
    cache = backend.kv_layout().allocate(num_blocks, device)
    for buffer in cache:
        if buffer.dtype.is_floating_point:
            buffer.copy_(torch.full((), math.nan))
        elif buffer.dtype is not torch.bool:
            buffer.fill_(torch.iinfo(buffer.dtype).max)
    return cache


def blocks_that_differ(one: KVCache, other: KVCache) -> set[int]:
    """Blocks in which two caches hold other bits, in any buffer."""
    differing: set[int] = set()
    for left, right in zip(one, other, strict=True):
        bits = (tensor.contiguous().flatten(1).view(torch.uint8) for tensor in (left, right))
        differing |= set(torch.ne(*bits).any(dim=1).nonzero().flatten().tolist())
    return differing
