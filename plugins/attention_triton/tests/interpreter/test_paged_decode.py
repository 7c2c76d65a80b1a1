"""The paged decode kernel and its merge against attention in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import AttentionParameters, KVCache
from octavo_attention_triton.kernels.merge_splits import SplitStates
from octavo_attention_triton.kernels.paged_decode import paged_decode, paged_decode_reference
from octavo_attention_triton.tuned import PagedConfig

LENGTHS = (1, 15, 16, 17, 33, 50)
# Products in float32 and sums in another order; in 16 bits the outputs' rounding, which the interpreter cuts off.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Rows that decode, and the pages they read; a slot that nobody wrote holds NaN."""

    query: Tensor
    kv_cache: KVCache
    block_table: Tensor
    row_requests: Tensor
    row_lens: Tensor
    parameters: AttentionParameters

    def wanted(self) -> Tensor:
        return paged_decode_reference(
            self.query, self.kv_cache, self.block_table, self.row_requests, self.row_lens, self.parameters
        )

    def found(self, num_splits: int = 1, block_n: int = 32) -> Tensor:
        num_rows, num_heads, head_dim = self.query.shape
        states = SplitStates.allocate(num_rows * num_heads * num_splits, head_dim, num_splits, "cpu")
        for buffer in (states.acc, states.max, states.sum):
            buffer.fill_(math.nan)
        return paged_decode(
            self.query,
            self.kv_cache,
            self.block_table,
            self.row_requests,
            self.row_lens,
            parameters=self.parameters,
            states=states,
            num_splits=num_splits,
            config=PagedConfig(block_n=block_n, num_warps=4, num_stages=1),
        )

    def check(self, num_splits: int = 1, block_n: int = 32) -> None:
        found, wanted = self.found(num_splits, block_n), self.wanted()
        assert found.isfinite().all()
        error = (found.double() - wanted).abs().max().item()
        assert error <= TOLERANCES[self.query.dtype], f"wrong by {error:.2g}"


def step(
    lengths: Sequence[int] = LENGTHS,
    *,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    window: int | None = None,
    cap: float | None = None,
) -> Step:
    """One request a row, its blocks in random order."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 2
    order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    block_table = torch.zeros(len(lengths), max(*counts, 1), dtype=torch.int32)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    kv_cache = [torch.full(shape, math.nan) for _ in range(2)]
    scales = [torch.full(shape[:3], math.nan) for _ in range(2)] if fp8 else []
    for row, length in enumerate(lengths):
        for index in range(counts[row]):
            block_table[row, index] = block = order.pop()
            written = min(block_size, length - index * block_size)
            for buffer in kv_cache:
                buffer[block, :written] = torch.randn(written, *shape[2:], generator=generator)
            for scale in scales:
                scale[block, :written] = torch.rand(written, num_kv_heads, generator=generator) + 0.5
    return Step(
        query=torch.randn(len(lengths), num_heads, head_dim, generator=generator).to(dtype),
        kv_cache=(*(buffer.to(torch.float8_e4m3fn if fp8 else dtype) for buffer in kv_cache), *scales),
        block_table=block_table,
        row_requests=torch.arange(len(lengths), dtype=torch.int32),
        row_lens=torch.tensor(lengths, dtype=torch.int32),
        parameters=AttentionParameters(scale=head_dim**-0.5, sliding_window=window, logit_softcap=cap),
    )


@pytest.mark.parametrize("num_splits", [1, 2, 3, 4])
def test_contexts_around_the_borders_of_blocks_equal_the_formula(num_splits: int) -> None:
    step().check(num_splits, block_n=16)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_row_without_a_context_gives_zeros(num_splits: int) -> None:
    padded = step((0, 17, 0))
    assert (padded.found(num_splits)[::2] == 0).all()
    padded.check(num_splits)


def test_more_splits_than_tiles_equal_the_formula() -> None:
    step((1, 17, 33)).check(num_splits=8, block_n=16)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (6, 2), (3, 1), (20, 1)])
def test_query_heads_share_their_kv_head(num_heads: int, num_kv_heads: int) -> None:
    step((5, 33), num_heads=num_heads, num_kv_heads=num_kv_heads).check(num_splits=2)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_head_sizes_equal_the_formula(head_dim: int) -> None:
    step((5, 33), head_dim=head_dim).check(num_splits=2)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("block_n", [16, 64])
def test_tile_may_span_blocks_or_be_a_part_of_one(block_size: int, block_n: int) -> None:
    step((16, 33, 70), block_size=block_size).check(block_n=block_n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_dtypes_equal_the_formula(dtype: torch.dtype, num_splits: int) -> None:
    wanted = step((17, 50), num_heads=4, dtype=dtype)
    assert wanted.found(num_splits).dtype == dtype
    wanted.check(num_splits)


@pytest.mark.parametrize("window", [1, 16, 17, 40])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_window_shows_the_last_positions_and_no_other(window: int, num_splits: int) -> None:
    step((1, 16, 33, 50), window=window).check(num_splits, block_n=16)


def test_what_is_behind_the_window_is_not_read() -> None:
    windowed = step((50,), window=17)
    blocks = windowed.block_table[0]
    for buffer in windowed.kv_cache:
        buffer[blocks[:2].long()] = math.nan  # positions 0 .. 31; the window begins at 33
    assert windowed.found(num_splits=2, block_n=16).isfinite().all()


@pytest.mark.parametrize("cap", [1.5, 30.0])
def test_cap_bounds_the_scores(cap: float) -> None:
    capped = step((17, 50), cap=cap)
    capped.query.mul_(4.0)
    capped.check(num_splits=2)


def test_large_scores_do_not_overflow() -> None:
    large = step((17, 50), cap=5.0)
    large.query.mul_(1e4)
    large.check(num_splits=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_scales_of_an_fp8_cache_are_those_of_each_token_and_head(dtype: torch.dtype, num_splits: int) -> None:
    step((17, 50), num_heads=4, num_kv_heads=2, dtype=dtype, fp8=True).check(num_splits)


def test_fp8_cache_with_a_window_and_a_cap_equals_the_formula() -> None:
    step((17, 50), fp8=True, window=20, cap=2.0, head_dim=80).check(num_splits=2)


def test_rows_may_be_tokens_of_one_request() -> None:
    one = step((33, 20))
    rows = Step(
        query=one.query[[0, 0, 1]],
        kv_cache=one.kv_cache,
        block_table=one.block_table,
        row_requests=torch.tensor([0, 0, 1], dtype=torch.int32),
        row_lens=torch.tensor([31, 32, 20], dtype=torch.int32),
        parameters=one.parameters,
    )
    rows.check(num_splits=2)


def test_query_may_be_a_slice_of_something_wider() -> None:
    narrow = step((5, 33), num_heads=4)
    wide = torch.randn(2, 7, 64)
    wide[:, 1:5] = narrow.query
    sliced = Step(**{**vars(narrow), "query": wide[:, 1:5]})
    assert torch.equal(sliced.found(), narrow.found())


def test_same_step_gives_the_same_bits() -> None:
    one = step((17, 50))
    assert torch.equal(one.found(num_splits=3), one.found(num_splits=3))


def test_cache_of_other_heads_is_refused() -> None:
    one = step((5,))
    with pytest.raises(ShapeError, match="num_kv_heads"):
        Step(**{**vars(one), "query": torch.zeros(1, 2, 128)}).found()
