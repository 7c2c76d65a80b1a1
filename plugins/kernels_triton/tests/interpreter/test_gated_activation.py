"""The activation's kernel against its float64 reference, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import Activation
from octavo_kernels_triton.kernels.gated_activation import gated_activation, gated_activation_reference

TOLERANCES = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}  # as a share of each number
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def check(activation: Activation, gate: Tensor, up: Tensor) -> None:
    out = gated_activation(activation, gate, up)
    assert out.dtype == gate.dtype
    assert out.is_contiguous()
    wanted = gated_activation_reference(activation, gate, up)
    torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCES[gate.dtype], atol=1e-6)


@DTYPES
@ACTIVATIONS
@pytest.mark.parametrize("size", [1, 7, 96, 1024, 2500])
def test_rows_of_any_size_equal_the_reference(activation: Activation, size: int, dtype: torch.dtype) -> None:
    check(activation, normal(3, size, dtype=dtype), normal(3, size, dtype=dtype).flip(0))


@DTYPES
@ACTIVATIONS
def test_halves_of_a_stacked_output_are_read_where_they_lie(activation: Activation, dtype: torch.dtype) -> None:
    stacked = normal(4, 3 * 200, dtype=dtype)
    check(activation, stacked[:, :200], stacked[:, 200:400])


@ACTIVATIONS
def test_columns_that_are_not_contiguous_are_read_too(activation: Activation) -> None:
    check(activation, normal(200, 4).T, normal(4, 400)[:, ::2])


@ACTIVATIONS
def test_a_gate_far_from_zero_neither_overflows_nor_loses_its_sign(activation: Activation) -> None:
    gate = torch.tensor([[-1e4, -100.0, 100.0, 1e4]])
    out = gated_activation(activation, gate, torch.ones_like(gate))
    assert out[0, :2].abs().max() < 1e-30
    assert out[0, 2:].equal(gate[0, 2:])


@ACTIVATIONS
def test_what_is_small_is_right_to_its_last_digits(activation: Activation) -> None:
    """Where 1 + tanh(x) would have none left."""
    gate = torch.tensor([[-4.5, -4.0, -1e-3, 1e-3]])
    out = gated_activation(activation, gate, torch.ones_like(gate))
    wanted = gated_activation_reference(activation, gate, torch.ones_like(gate))
    torch.testing.assert_close(out.double(), wanted, rtol=2e-6, atol=0.0)


def test_no_tokens_are_no_launch() -> None:
    assert gated_activation("silu", torch.empty(0, 64), torch.empty(0, 64)).shape == (0, 64)


@pytest.mark.parametrize("up", [(3, 65), (2, 64), (64,)])
def test_shapes_that_differ_are_refused(up: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"A gated activation wants .* found \[3, 64\]"):
        gated_activation("silu", normal(3, 64), normal(*up))
