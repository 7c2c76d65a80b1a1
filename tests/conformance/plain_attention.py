"""A plain attention backend, right in every step; the mutants each get one of its steps wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.interfaces import (
    PAD_SLOT,
    AttentionBackend,
    AttentionParameters,
    BatchLayout,
    BatchLimits,
    KVBuffer,
    KVCache,
    KVLayout,
    nhd_layout,
    rotate,
)
from octavo.plugins.specs import AttentionNeed

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By size: torch does not write fp8 by index."""


class PlainAttention(AttentionBackend):
    """One request after the other: write, gather, scores, mask, softmax, sum. Layout "torch-nhd".

    It reads lengths where a graph would, in the layout's tensors, when it runs.
    """

    graph_mode = "decode"

    def __init__(self, need: AttentionNeed) -> None:
        super().__init__(need)
        self.dtype: torch.dtype = getattr(torch, str(need.dtype))
        self.group = need.num_heads // need.num_kv_heads

    def kv_layout(self) -> KVLayout:
        return nhd_layout(self.need)

    def make_state(self, limits: BatchLimits) -> dict[str, object]:
        return {}

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, dict)
        state["layout"] = layout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        assert isinstance(state, dict)
        layout: BatchLayout = state["layout"]
        self.write(kv_cache, key, value, layout)
        outputs = []
        for index in range(layout.num_requests):
            tokens = slice(int(layout.host_query_start_loc[index]), int(layout.host_query_start_loc[index + 1]))
            seq_len = self.seq_len(layout, index)
            slots = self.slots(layout.block_table[index].long(), seq_len)
            keys, values = self.read(kv_cache, slots)
            scores = self.scores(query[tokens], keys, self.scale(parameters.scale))
            if (cap := self.cap(parameters)) is not None:
                scores = cap * (scores / cap).tanh()
            hidden = self.hidden(tokens.stop - tokens.start, seq_len) | self.behind_window(scores, parameters)
            weights = self.softmax(scores.masked_fill(hidden, -torch.inf))
            outputs.append(torch.einsum("hqk,khd->qhd", weights, self.heads_of(values).float()))
        return self.result(torch.cat(outputs).flatten(1))

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
        query, key = self.rotated(query, rotary), self.rotated(key, rotary)
        return self.forward(query, key, value, kv_cache, state, parameters)

    # Each step that a mutant may get wrong.

    def rotated(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(x, rotary)

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, layout: BatchLayout) -> None:
        written = layout.slot_mapping != PAD_SLOT
        for buffer, new in zip(kv_cache, self.stored(key, value), strict=True):
            bits = buffer.flatten(0, 1).view(INTEGERS[buffer.dtype.itemsize])
            bits[layout.slot_mapping[written]] = new[written].view(bits.dtype)

    def stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """What is written to each buffer."""
        if self.need.kv_cache_dtype == "auto":
            return key, value
        scales = self.scale_of(key), self.scale_of(value)
        numbers = (self.fp8(x.float() / scale.unsqueeze(2)) for x, scale in zip((key, value), scales, strict=True))
        return (*numbers, *scales)

    def scale_of(self, x: Tensor) -> Tensor:
        return x.float().abs().amax(dim=2) / 448

    def fp8(self, x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn)

    def read(self, kv_cache: KVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        key, value, *scales = (buffer.flatten(0, 1)[slots].float() for buffer in kv_cache)
        return (key * scales[0].unsqueeze(2), value * scales[1].unsqueeze(2)) if scales else (key, value)

    def seq_len(self, layout: BatchLayout, index: int) -> int:
        return int(layout.seq_lens[index])

    def slots(self, block_ids: Tensor, seq_len: int) -> Tensor:
        positions, size = torch.arange(seq_len), self.need.block_size
        return block_ids[positions // size] * size + positions % size

    def scale(self, scale: float) -> float:
        return scale

    def heads_of(self, keys: Tensor) -> Tensor:
        return keys.repeat_interleave(self.group, dim=1)

    def scores(self, query: Tensor, keys: Tensor, scale: float) -> Tensor:
        return torch.einsum("qhd,khd->hqk", query.float(), self.heads_of(keys).float()) * scale

    def hidden(self, num_tokens: int, seq_len: int) -> Tensor:
        return torch.arange(seq_len) > torch.arange(seq_len - num_tokens, seq_len).unsqueeze(1)

    def cap(self, parameters: AttentionParameters) -> float | None:
        return parameters.logit_softcap

    def behind_window(self, scores: Tensor, parameters: AttentionParameters) -> Tensor:
        num_tokens, seq_len = scores.shape[1:]
        last_hidden = torch.arange(seq_len - num_tokens, seq_len) - (parameters.sliding_window or seq_len)
        return torch.arange(seq_len) <= last_hidden.unsqueeze(1)

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.softmax(dim=-1)

    def result(self, output: Tensor) -> Tensor:
        return output.to(self.dtype)


class OneBufferAttention(PlainAttention):
    """As right, over another layout: one buffer, heads before tokens."""

    def kv_layout(self) -> KVLayout:
        shape = (2, self.need.num_kv_heads, self.need.block_size, self.need.head_dim)
        return KVLayout(name="one-buffer", buffers=(KVBuffer(name="kv", block_shape=shape, dtype=self.dtype),))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        (buffer,) = kv_cache
        both = tuple(buffer[:, index].transpose(1, 2).contiguous() for index in (0, 1))
        output = super().forward(query, key, value, both, state, parameters)
        for index, tensor in enumerate(both):
            buffer[:, index] = tensor.transpose(1, 2)
        return output
