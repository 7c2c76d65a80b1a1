"""TorchAttention against dense attention in float64, over caches whose unwritten slots hold NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.builtin.torch_attention import TorchAttention
from octavo.interfaces import PAD_SLOT, AttentionParameters, BatchLayout, BatchLimits, KVCache
from octavo.plugins.specs import AttentionNeed

SCALE = 0.17  # not head_dim ** -0.5, which would be right also where it is forgotten
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# (tokens in the cache before this step, tokens in this step) of each request, decode requests first.
DECODES = [(3, 1), (200, 1), (1, 1), (44, 1), (41, 1), (190, 1), (15, 1), (16, 1)]
PREFILLS = [(0, 1), (0, 37), (0, 16), (0, 2)]
CHUNKS = [(5, 3), (32, 16), (31, 33), (100, 2)]
LENGTHS = {
    "decodes of very different lengths": DECODES,
    "prefills": PREFILLS,
    "chunks behind a context": CHUNKS,
    "everything in one step": DECODES + CHUNKS + PREFILLS,
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One step over a cache, and what must come of it."""

    backend: TorchAttention
    layout: BatchLayout
    query: Tensor
    key: Tensor
    value: Tensor
    cache: KVCache
    wanted_output: Tensor
    wanted_cache: KVCache

    def run(self, state: object | None = None, logit_softcap: float | None = None) -> Tensor:
        state = self.backend.make_state(limits(self.layout)) if state is None else state
        self.backend.plan(self.layout, state)
        parameters = AttentionParameters(scale=SCALE, logit_softcap=logit_softcap)
        return self.backend.forward(self.query, self.key, self.value, self.cache, state, parameters)

    def padded(self, *tokens: int) -> Scene:
        """The same step, these tokens being padding."""
        slot_mapping = self.layout.slot_mapping.clone()
        slot_mapping[list(tokens)] = PAD_SLOT
        return replace(self, layout=replace(self.layout, slot_mapping=slot_mapping, has_padding=True))


def limits(layout: BatchLayout) -> BatchLimits:
    return BatchLimits(
        max_num_requests=layout.num_requests,
        max_num_tokens=layout.num_tokens,
        max_model_len=layout.max_seq_len,
        block_size=layout.block_size,
        device="cpu",
    )


def scene(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Scene:
    """Requests of these lengths, their contexts already in shuffled blocks, every other slot NaN.

    Block 0, with which a block table is filled up, belongs to nobody.
    """
    generator = torch.Generator().manual_seed(len(lengths) * head_dim + heads[0])
    (num_heads, num_kv_heads), num_requests = heads, len(lengths)
    seq_lens = [context + new for context, new in lengths]
    num_blocks = [-(-seq_len // block_size) for seq_len in seq_lens]
    backend = TorchAttention(
        AttentionNeed(
            device="cpu",
            dtype=str(dtype).removeprefix("torch."),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
        )
    )
    cache = backend.kv_layout().allocate(sum(num_blocks) + 3, "cpu")
    for buffer in cache:
        buffer.fill_(float("nan"))
    owned = iter((torch.randperm(sum(num_blocks) + 2, generator=generator) + 1).tolist())
    block_table = torch.zeros(num_requests, max(num_blocks), dtype=torch.int32)
    for index, count in enumerate(num_blocks):
        block_table[index, :count] = torch.tensor([next(owned) for _ in range(count)])

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    queries, keys, values, slot_mapping, wanted = [], [], [], [], []
    for index, (context, new) in enumerate(lengths):
        query = random(new, num_heads, head_dim)
        key, value = random(seq_lens[index], num_kv_heads, head_dim), random(seq_lens[index], num_kv_heads, head_dim)
        slots = [int(block_table[index, p // block_size]) * block_size + p % block_size for p in range(seq_lens[index])]
        for buffer, tensor in zip(cache, (key, value), strict=True):
            buffer.flatten(0, 1)[slots[:context]] = tensor[:context]
        queries.append(query)
        keys.append(key[context:])
        values.append(value[context:])
        slot_mapping += slots[context:]
        wanted.append(dense_attention(query, key, value, SCALE))
    wanted_cache = tuple(buffer.clone() for buffer in cache)
    for buffer, tensors in zip(wanted_cache, (keys, values), strict=True):
        buffer.flatten(0, 1)[slot_mapping] = torch.cat(tensors)
    return Scene(
        backend=backend,
        layout=layout_of(lengths, block_table, slot_mapping, block_size),
        query=torch.cat(queries),
        key=torch.cat(keys),
        value=torch.cat(values),
        cache=cache,
        wanted_output=torch.cat(wanted),
        wanted_cache=wanted_cache,
    )


def layout_of(
    lengths: Sequence[tuple[int, int]], block_table: Tensor, slot_mapping: list[int], block_size: int
) -> BatchLayout:
    query_start_loc = np.cumsum([0, *(new for _, new in lengths)], dtype=np.int32)
    seq_lens = np.array([context + new for context, new in lengths], np.int32)
    num_decodes = sum(new == 1 and context > 0 for context, new in lengths)
    return BatchLayout(
        num_requests=len(lengths),
        num_tokens=len(slot_mapping),
        num_decode_requests=num_decodes,
        num_decode_tokens=num_decodes,
        max_query_len=max(new for _, new in lengths),
        max_seq_len=int(seq_lens.max()),
        block_size=block_size,
        query_start_loc=torch.from_numpy(query_start_loc),
        seq_lens=torch.from_numpy(seq_lens),
        block_table=block_table,
        slot_mapping=torch.tensor(slot_mapping),
        host_query_start_loc=query_start_loc,
        host_seq_lens=seq_lens,
    )


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The last tokens of one request over all of it, in float64: [num_tokens, num_heads * head_dim]."""
    num_tokens, num_heads, _ = query.shape
    seq_len, num_kv_heads, _ = key.shape
    key, value = (x.double().repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * scale
    future = torch.arange(seq_len) > torch.arange(seq_len - num_tokens, seq_len).unsqueeze(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def check(scene: Scene, output: Tensor) -> None:
    tolerance = TOLERANCE[scene.query.dtype]
    assert output.dtype == scene.query.dtype
    torch.testing.assert_close(output.double(), scene.wanted_output, rtol=0, atol=tolerance)
    for buffer, wanted in zip(scene.cache, scene.wanted_cache, strict=True):
        torch.testing.assert_close(buffer, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_dense_attention_and_writes_only_its_own_slots(
    lengths: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    step = scene(lengths, dtype=dtype)
    check(step, step.run())


@pytest.mark.parametrize("heads", [(9, 3), (4, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("block_size", [8, 16])
def test_equals_dense_attention_for_any_sizes(heads: tuple[int, int], head_dim: int, block_size: int) -> None:
    step = scene(LENGTHS["everything in one step"], heads=heads, head_dim=head_dim, block_size=block_size)
    check(step, step.run())


def test_padding_tokens_are_not_written_and_disturb_nobody() -> None:
    lengths = [(3, 1), (20, 1), (0, 5)]
    step = scene(lengths)
    for buffer in step.wanted_cache:
        buffer.flatten(0, 1)[step.layout.slot_mapping[[4, 6]]] = float("nan")
    padded = step.padded(4, 6)  # of the prefill, which attends to this step's tensors
    check(padded, padded.run())


def test_a_state_carries_nothing_from_one_step_to_the_next() -> None:
    before, after = scene(LENGTHS["everything in one step"]), scene([(7, 1), (0, 4)])
    state = before.backend.make_state(limits(before.layout))
    before.padded(-1).run(state)
    check(after, after.run(state))


class Reads(TorchDispatchMode):
    """Records the operators that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [None, 20])
def test_planning_does_not_wait_for_the_device(window: int | None) -> None:
    step = scene(LENGTHS["everything in one step"])
    features = frozenset({"prefill", "decode", *(() if window is None else ("sliding_window",))})
    backend = TorchAttention(replace(step.backend.need, features=features, sliding_window=window))
    with Reads() as reads:
        backend.plan(step.layout, backend.make_state(limits(step.layout)))
    assert reads.found == []
    with Reads() as reads:
        assert not (step.layout.slot_mapping < 0).any()
    assert reads.found == ["aten._local_scalar_dense.default"]


def test_a_window_is_all_that_is_gathered() -> None:
    step = scene(DECODES + CHUNKS)
    backend = TorchAttention(replace(step.backend.need, features=frozenset({"sliding_window"}), sliding_window=20))
    state = backend.make_state(limits(step.layout))
    backend.plan(step.layout, state)
    assert max(group.bias.shape[-1] for group in state.windowed.decodes) == 20
    assert [prefill.bias.shape for prefill in state.windowed.prefills] == [(3, 8), (16, 35), (33, 52), (2, 21)]
    assert max(group.bias.shape[-1] for group in state.whole.decodes) == 201


def test_a_step_within_the_window_is_planned_once() -> None:
    step = scene(DECODES)
    backend = TorchAttention(replace(step.backend.need, features=frozenset({"sliding_window"}), sliding_window=201))
    state = backend.make_state(limits(step.layout))
    backend.plan(step.layout, state)
    assert state.windowed is state.whole


def test_capped_queries_some_at_a_time_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step = scene(LENGTHS["everything in one step"], heads=(6, 2))
    at_once = step.run(logit_softcap=2.0)
    monkeypatch.setattr("octavo.builtin.torch_attention._CAPPED_QUERIES", 7)
    torch.testing.assert_close(step.run(logit_softcap=2.0), at_once, rtol=0, atol=1e-5)


def test_the_layout_counts_both_buffers() -> None:
    layout = scene([(3, 1)], heads=(6, 2), head_dim=32, block_size=8, dtype=torch.bfloat16).backend.kv_layout()
    assert layout.bytes_per_block == 2 * 8 * 2 * 32 * 2
    assert [tuple(buffer.shape) for buffer in layout.allocate(5, "cpu")] == [(5, 8, 2, 32)] * 2
