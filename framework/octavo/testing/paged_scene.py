"""PagedScene: requests in shuffled blocks of one KV cache, stepped by hand, and what attention must make of them.

The part of the runner in the attention suite: it hands backends batches as the engine would.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.interfaces.attention import (
    PAD_SLOT,
    AttentionBackend,
    AttentionParameters,
    BatchLayout,
    BatchLimits,
    KVCache,
    rotate,
)
from octavo.plugins.specs import AttentionNeed

NUM_TOKENS, NUM_REQUESTS = 2048, 40  # that a scene's cache has room for
FP8_LOSS = 0.4  # largest error of an output for what fp8 loses of normally distributed keys and values
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

    def with_padding_requests(self, num_requests: int, host_seq_len: int) -> Batch:
        """The same step with requests that are nobody's behind its decodes; `rows` are still the others alone.

        Args:
            host_seq_len: what the host believes of their lengths, which are 0.
        """
        layout, border, count = self.layout, self.layout.num_decode_requests, num_requests

        def spread(x: Tensor, filling: Tensor) -> Tensor:
            return torch.cat((x[:border], filling.expand(count, *x.shape[1:]).to(x), x[border:]))

        one, none = torch.ones(()), torch.zeros(())
        lengths = spread(layout.query_start_loc.diff(), one)
        query_start_loc = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        host_seq_lens = np.insert(layout.host_seq_lens, border, [host_seq_len] * count).astype(np.int32)
        return replace(
            self,
            query=spread(self.query, one),
            key=spread(self.key, one),
            value=spread(self.value, one),
            layout=replace(
                layout,
                num_requests=layout.num_requests + count,
                num_tokens=layout.num_tokens + count,
                num_decode_requests=border + count,
                num_decode_tokens=border + count,
                max_seq_len=max(layout.max_seq_len, host_seq_len),
                query_start_loc=query_start_loc,
                seq_lens=spread(layout.seq_lens, none),
                block_table=spread(layout.block_table, none),
                slot_mapping=spread(layout.slot_mapping, none + PAD_SLOT),
                host_query_start_loc=query_start_loc.cpu().numpy(),
                host_seq_lens=host_seq_lens,
                has_padding=True,
            ),
        )

    def for_a_graph(self, num_requests: int, max_seq_len: int) -> Batch:
        """A step of decodes padded to so many requests, its host sizes those of any step of that size."""
        padded = self.with_padding_requests(num_requests - len(self.rows), max_seq_len)
        missing = max_seq_len // self.layout.block_size - self.layout.block_table.shape[1]
        layout = replace(
            padded.layout,
            max_seq_len=max_seq_len,
            block_table=torch.nn.functional.pad(padded.layout.block_table, (0, missing)),
            host_seq_lens=np.full(num_requests, max_seq_len, np.int32),
        )
        return replace(padded, layout=layout)

    def in_one_tensor(self) -> Batch:
        """The same step, its tensors slices of a wider one, as one linear for all three makes them."""
        counts = [tensor.shape[1] for tensor in (self.query, self.key, self.value)]
        wide = torch.cat([self.query, self.key, self.value], dim=1)
        query, key, value = torch.split(wide, counts, dim=1)
        return replace(self, query=query, key=key, value=value)

    def rotated(self, rotary: tuple[Tensor, Tensor]) -> Batch:
        """The same step with its queries and keys turned, in float64, and rounded once; contexts stay as they are.

        Args:
            rotary: as `rotate` reads it.
        """
        angles = rotary[0].double(), rotary[1].double()
        query, key = (rotate(x.double(), angles).to(x.dtype) for x in (self.query, self.key))

        def turned(row: Row) -> Row:
            request, span = row.request, self.tokens_of(row)
            request = replace(request, query=request.query.clone(), key=request.key.clone())
            request.query[row.start : row.end], request.key[row.start : row.end] = query[span], key[span]
            return replace(row, request=request)

        return replace(self, rows=tuple(map(turned, self.rows)), query=query, key=key)


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
        backend.plan(batch.layout, self.state(backend))

    def forward(
        self,
        batch: Batch,
        backend: AttentionBackend | None = None,
        *,
        cache: KVCache | None = None,
        state: object | None = None,
        parameters: AttentionParameters | None = None,
    ) -> Tensor:
        """One layer of the step that was planned; by default with the usual scale, no window and no cap."""
        backend = backend or self.backend
        cache = self.cache if cache is None else cache
        state = self.state(backend) if state is None else state
        parameters = parameters or usual_parameters(self.need)
        return backend.forward(batch.query, batch.key, batch.value, cache, state, parameters)

    def rotate_and_forward(self, batch: Batch, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """One layer of the step that was planned, its queries and keys yet to be turned."""
        inputs = batch.query, batch.key, batch.value, rotary
        return self.backend.rotate_and_forward(
            *inputs, self.cache, self.state(self.backend), usual_parameters(self.need)
        )

    def rotary(self, batch: Batch, rotary_dim: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of each token's position, as the engine makes them: [num_tokens, 1, rotary_dim] each."""
        positions = torch.cat([torch.arange(row.start, row.end) for row in batch.rows])
        angles = torch.outer(positions.double(), 100.0 ** -torch.linspace(0, 1, rotary_dim // 2, dtype=torch.float64))
        cos, sin = angles.cos(), angles.sin()
        both = torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)
        return tuple(x.unsqueeze(1).to(self.device, torch_dtype(self.need)) for x in both)  # type: ignore[return-value]

    def as_stored(self, batch: Batch) -> Batch:
        """The same step, the keys and values of its requests being what an fp8 cache of layout "torch-nhd" holds."""
        size = self.need.block_size
        buffers = {
            buffer.name: found.cpu().flatten(0, 1).float()
            for buffer, found in zip(self.backend.kv_layout().buffers, self.cache, strict=True)
        }

        def stored(row: Row) -> Row:
            slots = [row.request.blocks[p // size] * size + p % size for p in range(row.end)]
            key, value = (
                buffers[name][slots].double() * buffers[f"{name}_scale"][slots].double().unsqueeze(2)
                for name in ("key", "value")
            )
            return replace(row, request=replace(row.request, key=key, value=value))

        return replace(batch, rows=tuple(map(stored, batch.rows)))

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

    def state(self, backend: AttentionBackend) -> object:
        """What `plan` writes into; one for each backend."""
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


def check_fp8(found: Tensor, wanted: Tensor, what: str) -> None:
    """Whether heads are as near to these as an fp8 cache holds them: [tokens, heads, head_dim] each, float64.

    Raises:
        AssertionError: they were rounded otherwise than to the nearest of e4m3 with the head's own scale.
    """
    scale = wanted.abs().amax(dim=-1, keepdim=True) / 448
    step = torch.exp2((wanted / scale).abs().clamp(min=2.0**-6).log2().floor() - 3) * scale
    errors = (found - wanted).abs() / step
    assert errors.isfinite().all(), f"not finite: {what} were not written, or their scales were not"
    assert errors.max() <= 1.01, f"{what} are wrong by {errors.max():.2g} steps of e4m3"
    # Arithmetic in the last bit may tip the balance of what lies in the middle of two.
    share = (errors > 0.51).double().mean()
    assert share < 0.05, f"{share:.0%} of the {what} are not rounded to the nearest: half a step away, at most"


def unwritten_cache(backend: AttentionBackend, num_blocks: int, device: str) -> KVCache:
    """One layer's buffers, full of what nobody may read."""
    cache = backend.kv_layout().allocate(num_blocks, device)
    for buffer in cache:
        if buffer.dtype.is_floating_point:
            buffer.copy_(torch.full((), math.nan))
        elif buffer.dtype is not torch.bool:
            buffer.fill_(torch.iinfo(buffer.dtype).max)
    return cache


def with_the_same_tensors(state: object) -> object:
    """A copy of what a state holds on the host, its tensors being the same ones: what a captured CUDA graph knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__deepcopy__", lambda tensor, _memo: tensor)
        return copy.deepcopy(state)


def blocks_that_differ(one: KVCache, other: KVCache) -> set[int]:
    """Blocks in which two caches hold other bits, in any buffer."""
    differing: set[int] = set()
    for left, right in zip(one, other, strict=True):
        bits = (tensor.contiguous().flatten(1).view(torch.uint8) for tensor in (left, right))
        differing |= set(torch.ne(*bits).any(dim=1).nonzero().flatten().tolist())
    return differing
