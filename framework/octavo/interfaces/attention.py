"""AttentionBackend socket, the KV cache's layout, and the layout of a batch.

Dimension legend, used everywhere:
    num_tokens      tokens in this step, all requests concatenated, decode requests first
    num_requests    requests in this step
    num_heads       query heads;  num_kv_heads  key/value heads;  group = num_heads / num_kv_heads
    head_dim        size of one head
    num_blocks      blocks of the KV cache;  block_size  tokens in one block
    max_num_blocks  columns of the block table in this step
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from octavo.plugins.specs import AttentionNeed

PAD_SLOT = -1
"""A slot_mapping entry that is not written."""

KVCache = tuple[Tensor, ...]
"""One layer's buffers, in the order of its KVLayout; dimension 0 of each is the block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVBuffer:
    """One tensor of a layer's cache: [num_blocks, *block_shape]."""

    name: str
    block_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        return prod(self.block_shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """How one layer's keys and values lie in memory: a published name and a list of buffers.

    The block is dimension 0 of every buffer, so copying block i is copying index i of each, whatever the layout.
    """

    name: str
    buffers: tuple[KVBuffer, ...]

    @property
    def bytes_per_block(self) -> int:
        return sum(buffer.bytes_per_block for buffer in self.buffers)

    def allocate(self, num_blocks: int, device: str) -> KVCache:
        """Zeroed buffers for one layer; on a CPU, memory is taken page by page as blocks are first written."""
        return tuple(_zeros((num_blocks, *buffer.block_shape), buffer.dtype, device) for buffer in self.buffers)


def nhd_layout(need: AttentionNeed) -> KVLayout:
    """The published layout "torch-nhd": [block_size, num_kv_heads, head_dim] of keys, and the same of values.

    With an fp8 cache they are float8_e4m3fn; key_scale and value_scale, [block_size, num_kv_heads] float32, say what
    each token's head is to be multiplied with: x = stored * scale, where scale is its largest magnitude over 448.
    """
    per_token = (need.block_size, need.num_kv_heads)
    shape = (*per_token, need.head_dim)
    if need.kv_cache_dtype == "auto":
        dtype: torch.dtype = getattr(torch, need.dtype or "float32")
        buffers = [KVBuffer(name=name, block_shape=shape, dtype=dtype) for name in ("key", "value")]
    else:
        buffers = [KVBuffer(name=name, block_shape=shape, dtype=torch.float8_e4m3fn) for name in ("key", "value")]
        scales = ("key_scale", "value_scale")
        buffers += [KVBuffer(name=name, block_shape=per_token, dtype=torch.float32) for name in scales]
    return KVLayout(name="torch-nhd", buffers=tuple(buffers))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages; torch would write every one of them now.
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """Maximal sizes of any step, known at start."""

    max_num_requests: int
    max_num_tokens: int
    max_model_len: int
    block_size: int
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLayout:
    """Where each request's tokens are in this step. Requests with one token and a context come first ("decode").

    A step may be padded with requests that are nobody's: one token each, among the decodes, their seq_lens 0 and their
    slots PAD_SLOT. They attend to nothing; what they get is not read, but it must be finite.

    Attributes:
        query_start_loc: [num_requests + 1] int32; request i owns tokens query_start_loc[i] .. [i + 1].
        seq_lens: [num_requests] int32; context and this step's tokens together.
        block_table: [num_requests, max_num_blocks] int32; block ids by position, 0 where unused.
        slot_mapping: [num_tokens] int64; block_id * block_size + offset, PAD_SLOT is skipped.
        host_query_start_loc: like query_start_loc, on the host, exact.
        host_seq_lens: like seq_lens, on the host; exact for prefills, upper bounds for decodes.
        max_query_len, max_seq_len: host maxima, upper bounds.
        has_padding: whether any slot may be PAD_SLOT; known on the host, so that nobody reads the device to find out.
    """

    num_requests: int
    num_tokens: int
    num_decode_requests: int
    num_decode_tokens: int
    max_query_len: int
    max_seq_len: int
    block_size: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    host_query_start_loc: np.ndarray[Any, np.dtype[np.int32]]
    host_seq_lens: np.ndarray[Any, np.dtype[np.int32]]
    has_padding: bool = False

    def decodes(self) -> BatchLayout:
        """The decode requests alone, their token indices unchanged."""
        requests, tokens = slice(0, self.num_decode_requests), slice(0, self.num_decode_tokens)
        return self._part(requests, tokens, self.num_decode_requests)

    def prefills(self) -> BatchLayout:
        """The other requests alone, token indices counted from their first."""
        requests = slice(self.num_decode_requests, self.num_requests)
        return self._part(requests, slice(self.num_decode_tokens, self.num_tokens), 0)

    def _part(self, requests: slice, tokens: slice, num_decode_requests: int) -> BatchLayout:
        bounds = slice(requests.start, requests.stop + 1)
        host_query_start_loc = self.host_query_start_loc[bounds] - tokens.start
        host_seq_lens = self.host_seq_lens[requests]
        query_start_loc = self.query_start_loc[bounds]  # a view, if it can be: a captured step reads it where it lies
        return BatchLayout(
            num_requests=requests.stop - requests.start,
            num_tokens=tokens.stop - tokens.start,
            num_decode_requests=num_decode_requests,
            num_decode_tokens=num_decode_requests and tokens.stop - tokens.start,
            max_query_len=int(np.diff(host_query_start_loc).max()),
            max_seq_len=int(host_seq_lens.max()),
            block_size=self.block_size,
            query_start_loc=query_start_loc - tokens.start if tokens.start else query_start_loc,
            seq_lens=self.seq_lens[requests],
            block_table=self.block_table[requests],
            slot_mapping=self.slot_mapping[tokens],
            host_query_start_loc=host_query_start_loc,
            host_seq_lens=host_seq_lens,
            has_padding=self.has_padding,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionParameters:
    """What may differ from layer to layer of one model.

    Attributes:
        scale: factor of the scores, usually head_dim ** -0.5.
        sliding_window: tokens a query sees, itself included; None: all before it.
        logit_softcap: scaled scores become cap * tanh(scores / cap); None: they stay as they are.

    Source: windows: Beltagy et al. 2020, arXiv:2004.05150; caps: Gemma 2, arXiv:2408.00118, section 2.
    """

    scale: float
    sliding_window: int | None = None
    logit_softcap: float | None = None


class AttentionBackend(ABC):
    """Writes this step's keys and values into the paged cache and attends over them.

    Constructed once with the need it was chosen for: its features say whether it will be given decode requests,
    prefills or both, and whether some layers have a window or a cap. One state object with maximal sizes is made at
    start.

    Attributes:
        graph_mode: what of it a CUDA graph can capture. "decode": a step of decodes alone: `forward` then launches the
            same work whatever the tensors of the planned layout hold, and takes host sizes for upper bounds only.
            `plan` is called before the capture and before each replay, outside of the graph, with the same tensors.
    """

    graph_mode: Literal["none", "decode"] = "none"

    def __init__(self, need: AttentionNeed) -> None:
        self.need = need

    @abstractmethod
    def kv_layout(self) -> KVLayout:
        """How it wants one layer's cache."""

    @abstractmethod
    def make_state(self, limits: BatchLimits) -> object:
        """Everything `plan` writes into."""

    @abstractmethod
    def plan(self, layout: BatchLayout, state: object) -> None:
        """Prepare one step for all layers. Never waits for the device."""

    @abstractmethod
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        """Causal attention of this step's tokens over their requests' whole contexts.

        Args:
            query: [num_tokens, num_heads, head_dim], rotated.
            key, value: [num_tokens, num_kv_heads, head_dim], key rotated; written to the cache here.
            kv_cache: this layer's buffers.
            state: as prepared by `plan`.
            parameters: this layer's; its window and its cap are those of the need, or None.

        Returns:
            [num_tokens, num_heads * head_dim], the query's dtype.
        """

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
        """`forward` of a layer whose query and key are yet to be rotated; a backend may do both in one pass.

        Args:
            rotary: (cos, sin) of each token, [num_tokens, 1, rotary_dim] each, as `rotate` reads them.
        """
        return self.forward(rotate(query, rotary), rotate(key, rotary), value, kv_cache, state, parameters)


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """x [num_tokens, heads, head_dim] turned by its tokens' angles, halves paired (the GPT-NeoX convention).

    Of a partial rotation the first rotary_dim elements are turned and the others kept.

    Args:
        cos_sin: [num_tokens, 1, rotary_dim] each: the cosines twice, the sines once negated, so that the rotation is
            x * cos + swap_halves(x) * sin.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    cos, sin = cos_sin
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos_sin), x[..., size:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)
