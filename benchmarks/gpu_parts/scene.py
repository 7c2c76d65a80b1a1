"""Steps for attention backends at real sizes: requests in shuffled blocks, on the device, and what must come out.

octavo.testing's PagedScene does the same for small ones, with pytest and float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

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
from octavo.plugins.registry import Registry, default_registry
from octavo.plugins.specs import AttentionNeed

Lengths = Sequence[tuple[int, int]]
"""(tokens already in the cache, tokens of this step) of each request."""

FP8_LARGEST = 448.0


@cache
def registry() -> Registry:
    """What is installed, read once."""
    return default_registry()


def make_backend(name: str, need: AttentionNeed) -> AttentionBackend:
    """An installed attention backend, as the engine makes it.

    Raises:
        OctavoError: it cannot serve the need; says why.
    """
    backend: AttentionBackend = registry().select("attention", need, name).build(need)
    return backend


def make_state(backend: AttentionBackend, layout: BatchLayout) -> object:
    """Of maximal sizes that fit this step."""
    return backend.make_state(
        BatchLimits(
            max_num_requests=layout.num_requests,
            max_num_tokens=layout.num_tokens,
            max_model_len=layout.block_table.shape[1] * layout.block_size,
            block_size=layout.block_size,
            device=layout.seq_lens.device.type,
        )
    )


def num_blocks_of(lengths: Lengths, block_size: int) -> int:
    """Of a cache that holds these requests; the first and the last block are nobody's."""
    return sum(-(-(context + new) // block_size) for context, new in lengths) + 2


def batch_layout(lengths: Lengths, block_size: int, device: str, *, num_padding: int = 0) -> BatchLayout:
    """A step of these requests, decodes first, then padding; blocks in random order, one seed for all.

    Raises:
        ValueError: a decode comes after a prefill.
    """
    decodes = [context > 0 and new == 1 for context, new in lengths]
    if decodes != sorted(decodes, reverse=True):
        raise ValueError(f"decodes come first; found {list(lengths)}.")
    num_decodes = sum(decodes)
    padded = [*lengths[:num_decodes], *[(-1, 1)] * num_padding, *lengths[num_decodes:]]
    query_start_loc = np.cumsum([0, *(new for _, new in padded)], dtype=np.int32)
    seq_lens = np.array([context + new for context, new in padded], np.int32)
    free = np.random.default_rng(0).permutation(num_blocks_of(lengths, block_size) - 2) + 1
    block_table = np.zeros((len(padded), -(-int(seq_lens.max()) // block_size)), np.int32)
    slots = []
    for row, (context, new) in enumerate(padded):
        if context < 0:
            slots.append(np.full(new, PAD_SLOT))
            continue
        count = -(-(context + new) // block_size)
        block_table[row, :count], free = free[:count], free[count:]
        positions = np.arange(context, context + new)
        slots.append(block_table[row, positions // block_size].astype(np.int64) * block_size + positions % block_size)
    return BatchLayout(
        num_requests=len(padded),
        num_tokens=int(query_start_loc[-1]),
        num_decode_requests=num_decodes + num_padding,
        num_decode_tokens=num_decodes + num_padding,
        max_query_len=max(new for _, new in padded),
        max_seq_len=int(seq_lens.max()),
        block_size=block_size,
        query_start_loc=torch.from_numpy(query_start_loc).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        block_table=torch.from_numpy(block_table).to(device),
        slot_mapping=torch.from_numpy(np.concatenate(slots).astype(np.int64)).to(device),
        host_query_start_loc=query_start_loc,
        host_seq_lens=seq_lens,
        has_padding=num_padding > 0,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scene:
    """One step, and the cache behind it, filled by the published layout "torch-nhd" and not by a backend.

    Attributes:
        keys, values: of each row, padding included: [tokens, num_kv_heads, head_dim], context and new ones.
        query, key, value: of the step, as a backend gets them.
        cache: what no step has written holds NaN.
    """

    layout: BatchLayout
    keys: list[Tensor]
    values: list[Tensor]
    query: Tensor
    key: Tensor
    value: Tensor
    cache: KVCache

    def wanted(self, parameters: AttentionParameters, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[num_tokens, num_heads * head_dim] float64, by the formula; NaN for padding, which may get anything finite.

        Args:
            rotary: (cos, sin) of the step's tokens, where query and key are yet to be rotated.
        """
        fp8 = len(self.cache) == 4
        rows = []
        for row, (first, end) in enumerate(
            zip(self.layout.host_query_start_loc, self.layout.host_query_start_loc[1:], strict=False)
        ):
            query, keys, values = self.query[first:end].double(), self.keys[row], self.values[row]
            if len(keys) == 0:
                rows.append(torch.full_like(query, torch.nan).flatten(1))
                continue
            if rotary is not None:
                cos_sin = rotary[0][first:end].double(), rotary[1][first:end].double()
                query = rotated(query, *cos_sin)
                new = rotated(keys[first - end :].double(), *cos_sin).to(keys.dtype)
                keys = torch.cat((keys[: first - end], new))
            if fp8:
                keys, values = (dequantised(*quantised(one)) for one in (keys, values))
            rows.append(dense_attention(query, keys.double(), values.double(), parameters))
        return torch.cat(rows)

    def fault_of_cache(self, before: KVCache, keys_rotated: bool) -> str:
        """What is wrong with the cache after the step; empty when nothing is."""
        slots = self.layout.slot_mapping[self.layout.slot_mapping != PAD_SLOT]
        real = self.layout.slot_mapping != PAD_SLOT
        for name, buffer, old, new in zip(("key", "value"), self.cache, before, (self.key, self.value), strict=False):
            flat, old_flat = buffer.flatten(0, 1), old.flatten(0, 1)
            if (
                len(self.cache) == 2
                and not (name == "key" and keys_rotated)
                and not torch.equal(flat[slots], new[real])
            ):
                return f"the {name} written is not the one given"
            if bool(flat[slots].float().isnan().any()):
                return f"a {name} was not written"
            others = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
            others[slots] = False
            if not torch.equal(flat[others].view(torch.uint8), old_flat[others].view(torch.uint8)):
                return f"a {name} was written where none belongs"
        return ""


def make_scene(backend: AttentionBackend, lengths: Lengths, device: str, *, num_padding: int = 0) -> Scene:
    """Tokens drawn from a normal distribution, one seed for all; contexts in the cache."""
    need = backend.need
    layout = batch_layout(lengths, need.block_size, device, num_padding=num_padding)
    cache = backend.kv_layout().allocate(num_blocks_of(lengths, need.block_size), device)
    for buffer in cache:
        buffer.copy_(torch.full((), torch.nan))
    dtype: torch.dtype = getattr(torch, need.dtype or "float32")
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(num_tokens: int, num_heads: int) -> Tensor:
        return torch.randn(num_tokens, num_heads, need.head_dim, generator=generator, device=device).to(dtype)

    keys = [draw(int(length), need.num_kv_heads) for length in layout.host_seq_lens]
    values = [draw(int(length), need.num_kv_heads) for length in layout.host_seq_lens]
    new = np.diff(layout.host_query_start_loc)
    for row, count in enumerate(new):
        if context := max(len(keys[row]) - int(count), 0):
            write_context(cache, keys[row][:context], values[row][:context], layout.block_table[row])

    def of_step(tensors: list[Tensor]) -> Tensor:
        """The last tokens of each row; a padding row's own token is noise that nobody sees."""
        pairs = zip(tensors, new, strict=True)
        return torch.cat([one[-count:] if len(one) else draw(int(count), need.num_kv_heads) for one, count in pairs])

    return Scene(
        layout=layout,
        keys=keys,
        values=values,
        query=draw(layout.num_tokens, need.num_heads),
        key=of_step(keys),
        value=of_step(values),
        cache=cache,
    )


def write_context(cache: KVCache, keys: Tensor, values: Tensor, blocks: Tensor) -> None:
    """Into a cache of layout "torch-nhd", plain or fp8, at positions 0 .. of one request."""
    block_size = cache[0].shape[1]
    positions = torch.arange(len(keys), device=keys.device)
    slots = blocks.long()[positions // block_size] * block_size + positions % block_size
    parts = (keys, values)
    if len(cache) == 4:
        (keys, key_scale), (values, value_scale) = quantised(keys), quantised(values)
        parts = (keys, values, key_scale, value_scale)
    for buffer, part in zip(cache, parts, strict=True):
        # As bytes: not every device indexes eight-bit floats.
        buffer.flatten(0, 1).view(torch.uint8)[slots] = part.contiguous().view(torch.uint8).view(*part.shape[:-1], -1)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """[tokens, heads, head_dim] as e4m3 and the scale of each token's head, [tokens, heads] float32."""
    scale = x.float().abs().amax(dim=-1).clamp(min=1e-12) / FP8_LARGEST
    return (x.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


def dequantised(stored: Tensor, scale: Tensor) -> Tensor:
    return stored.double() * scale.double().unsqueeze(-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim] with its halves paired, in x's precision. Source: arXiv:2104.09864."""
    size = cos.shape[-1]
    first, second = x[..., : size // 2], x[..., size // 2 : size]
    return torch.cat((x[..., :size] * cos + torch.cat((second, first), dim=-1) * sin, x[..., size:]), dim=-1)


def rotary_of(layout: BatchLayout, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of each token of a step, [num_tokens, 1, head_dim], as `octavo.interfaces.rotate` reads them."""
    pairs = zip(layout.host_seq_lens, np.diff(layout.host_query_start_loc), strict=True)
    positions = np.concatenate([np.arange(max(length - new, 0), max(length - new, 0) + new) for length, new in pairs])
    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = torch.from_numpy(np.outer(positions, frequencies)).to(layout.seq_lens.device)
    cos, sin = angles.cos(), angles.sin()
    pair = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return pair[0].to(dtype).unsqueeze(1), pair[1].to(dtype).unsqueeze(1)


def dense_attention(query: Tensor, keys: Tensor, values: Tensor, parameters: AttentionParameters) -> Tensor:
    """softmax(capped(scale * Q K^T) + mask) V of the last tokens of one request, in the precision given.

    Args:
        query: [new, num_heads, head_dim]; keys, values: [tokens, num_kv_heads, head_dim], whose last are the new ones.

    Returns:
        [new, num_heads * head_dim]

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped heads: arXiv:2305.13245.
    """
    group = query.shape[1] // keys.shape[1]
    start, end = len(keys) - len(query), len(keys)
    behind = torch.arange(start, end, device=keys.device).unsqueeze(1) - torch.arange(end, device=keys.device)
    hidden = behind < 0
    if parameters.sliding_window is not None:
        hidden |= behind >= parameters.sliding_window
    heads = []
    for head in range(query.shape[1]):  # one at a time: the scores of all would be gigabytes
        scores = query[:, head] @ keys[:, head // group].T * parameters.scale
        if (cap := parameters.logit_softcap) is not None:
            scores = cap * torch.tanh(scores / cap)
        heads.append(scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1) @ values[:, head // group])
    return torch.cat(heads, dim=-1)
