"""The merge of splits against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from octavo.errors import ShapeError
from octavo_attention_triton.kernels.merge_splits import SplitStates, merge_splits, merge_splits_reference

ROWS, HEADS, DIM = 3, 2, 80


def states(num_splits: int, max_splits: int = 8) -> SplitStates:
    """Random ones for ROWS rows; what is behind them is NaN."""
    torch.manual_seed(0)
    found = SplitStates.allocate(ROWS * HEADS * max_splits, DIM, max_splits, "cpu")
    count = ROWS * HEADS * num_splits
    for buffer in (found.acc, found.max, found.sum):
        buffer.fill_(math.nan)
    found.acc[:count] = torch.randn(count, DIM)
    found.max[:count] = torch.randn(count) * 20
    found.sum[:count] = torch.rand(count) + 1
    return found


def merged(of: SplitStates, num_splits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full((ROWS, HEADS, DIM), math.nan, dtype=dtype)
    merge_splits(of, num_splits, out)
    return out


def wanted(of: SplitStates, num_splits: int) -> Tensor:
    shape = (ROWS, HEADS, num_splits)
    count = ROWS * HEADS * num_splits
    return merge_splits_reference(
        of.acc[:count].view(*shape, DIM), of.max[:count].view(shape), of.sum[:count].view(shape)
    )


@pytest.mark.parametrize("num_splits", [1, 2, 3, 8])
def test_merge_equals_the_formula(num_splits: int) -> None:
    of = states(num_splits)
    torch.testing.assert_close(merged(of, num_splits).double(), wanted(of, num_splits), atol=1e-6, rtol=1e-6)


def test_empty_split_is_not_read() -> None:
    of = states(3)
    of.sum[1::3], of.max[1::3], of.acc[1::3] = 0.0, -1e30, math.nan
    found = merged(of, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), wanted(of, 3), atol=1e-6, rtol=1e-6)


def test_row_of_empty_splits_gives_zeros() -> None:
    of = states(3)
    of.sum[:6], of.max[:6], of.acc[:6] = 0.0, -1e30, math.nan
    assert (merged(of, 3)[0] == 0).all()
    assert (wanted(of, 3)[0] == 0).all()


def test_reference_of_a_context_cut_in_two_is_that_of_the_whole() -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(10, dtype=torch.float64), torch.randn(10, DIM, dtype=torch.float64)
    parts = [(scores[part], values[part]) for part in (slice(0, 7), slice(7, 10))]
    largest = torch.stack([part.max() for part, _ in parts])
    weights = [torch.exp2(part - part.max()) for part, _ in parts]
    acc = torch.stack([weight @ value for weight, (_, value) in zip(weights, parts, strict=True)])
    total = torch.stack([weight.sum() for weight in weights])
    whole = (scores * math.log(2)).softmax(dim=0) @ values
    torch.testing.assert_close(merge_splits_reference(acc, largest, total), whole)


def test_output_has_the_dtype_of_its_tensor() -> None:
    of = states(2)
    found = merged(of, 2, torch.float16)
    torch.testing.assert_close(found.double(), wanted(of, 2), atol=4e-3, rtol=4e-3)


def test_more_splits_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(ShapeError, match="at most 2 splits"):
        merged(states(2, max_splits=2), 3)
