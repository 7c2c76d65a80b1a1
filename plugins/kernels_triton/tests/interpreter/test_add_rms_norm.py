"""The norm's kernel against its float64 reference, in Triton's interpreter, which rounds bfloat16 towards zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.errors import ShapeError
from octavo_kernels_triton.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference

EPS = 1e-6
TOLERANCES = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}  # as a share of each number
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(hidden: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    dtype = hidden.dtype
    out, total = add_rms_norm(hidden, residual, weight, EPS)
    _, wanted_total = add_rms_norm_reference(hidden, residual, weight, EPS)
    wanted, _ = add_rms_norm_reference(total, None, weight, EPS)
    assert out.dtype == total.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCES[dtype], atol=1e-7)
    rounding = TOLERANCES[dtype] if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(total, wanted_total, rtol=rounding, atol=0.0)


@DTYPES
@pytest.mark.parametrize("size", [1, 2, 7, 64, 96, 576, 1030, 4096])
def test_rows_of_any_size_equal_the_reference(size: int, dtype: torch.dtype) -> None:
    hidden, residual = normal(3, size, dtype=dtype), normal(1, size, dtype=dtype).expand(3, -1)
    check(hidden, residual.contiguous(), normal(size, dtype=dtype))
    check(hidden, None, normal(size, dtype=dtype))


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 33])
def test_programs_that_own_several_short_rows_leave_none_out(num_tokens: int) -> None:
    check(normal(num_tokens, 64), normal(num_tokens, 64), normal(64))


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_heads_inside_a_stacked_output_are_read_where_they_lie(head_dim: int, dtype: torch.dtype) -> None:
    num_heads, num_kv_heads = 3, 2
    stacked = normal(5, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    query = stacked[:, : num_heads * head_dim].view(5, num_heads, head_dim)
    key = stacked[:, num_heads * head_dim : (num_heads + num_kv_heads) * head_dim].view(5, num_kv_heads, head_dim)
    for heads in (query, key):
        check(heads, None, normal(head_dim, dtype=dtype))
        check(heads, heads.contiguous(), normal(head_dim, dtype=dtype))


def test_transposed_rows_and_four_dimensions_are_read_too() -> None:
    check(normal(96, 4).T, None, normal(96))
    check(normal(2, 3, 5, 64).transpose(0, 1), None, normal(64))
    check(normal(64), None, normal(64))


@DTYPES
def test_float32_weights_serve_every_dtype(dtype: torch.dtype) -> None:
    check(normal(3, 512, dtype=dtype), normal(3, 512, dtype=dtype), normal(512))


def test_float32_weights_are_not_rounded_first() -> None:
    hidden = normal(8, 512, dtype=torch.float16)
    weight = torch.full((512,), 1 + 1.25 * 2**-12)  # the nearest float16 is 1
    out, _ = add_rms_norm(hidden, None, weight, EPS)
    wanted, _ = add_rms_norm_reference(hidden, None, weight, EPS)
    assert ((out.double() - wanted) / wanted).mean().abs() < 5e-5


def test_without_a_residual_the_total_is_hidden_itself() -> None:
    hidden = normal(2, 64)
    assert add_rms_norm(hidden, None, normal(64), EPS)[1] is hidden


def test_inputs_are_left_as_they_are() -> None:
    hidden, residual = normal(3, 64), normal(3, 64)
    before = hidden.clone(), residual.clone()
    add_rms_norm(hidden, residual, normal(64), EPS)
    assert hidden.equal(before[0])
    assert residual.equal(before[1])


def test_no_tokens_are_no_launch() -> None:
    out, total = add_rms_norm(torch.empty(0, 4, 64), torch.empty(0, 4, 64), normal(64), EPS)
    assert out.shape == total.shape == (0, 4, 64)


@pytest.mark.parametrize(("residual", "weight"), [((3, 65), (64,)), ((2, 64), (64,)), (None, (65,)), (None, (1, 64))])
def test_shapes_that_do_not_fit_are_refused(residual: tuple[int, ...] | None, weight: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"A norm wants .* found hidden \[3, 64\]"):
        add_rms_norm(normal(3, 64), None if residual is None else normal(*residual), normal(*weight), EPS)
