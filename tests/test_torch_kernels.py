"""The norm and the activations in plain torch: how the reference of every kernel set rounds."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.builtin.torch_kernels import TorchKernels
from octavo.plugins.specs import Need

kernels = TorchKernels(Need(device="cpu", dtype="float32"))

EPS = 1e-6


def test_norm_divides_by_the_root_of_the_mean_square_and_multiplies_by_the_weight() -> None:
    out, _ = kernels.add_rms_norm(torch.tensor([[3.0, 4.0]]), None, torch.tensor([1.0, 2.0]), 0.5)
    root = math.sqrt((9 + 16) / 2 + 0.5)
    torch.testing.assert_close(out, torch.tensor([[3 / root, 8 / root]]))


def test_norm_is_over_the_last_axis_alone() -> None:
    heads = torch.randn(2, 3, 8)
    out, _ = kernels.add_rms_norm(heads, None, torch.ones(8), EPS)
    one_head, _ = kernels.add_rms_norm(heads[1:, 2], None, torch.ones(8), EPS)
    torch.testing.assert_close(out[1:, 2], one_head)


def test_without_a_residual_the_total_is_hidden_itself() -> None:
    hidden = torch.randn(2, 8)
    assert kernels.add_rms_norm(hidden, None, torch.ones(8), EPS)[1] is hidden


def test_sum_is_rounded_to_the_model_s_dtype_before_it_is_normalised() -> None:
    hidden, residual = torch.tensor([[256.0, 2.0]]).bfloat16(), torch.tensor([[1.0, 0.0]]).bfloat16()
    out, total = kernels.add_rms_norm(hidden, residual, torch.ones(2).bfloat16(), EPS)
    assert total.tolist() == [[256.0, 2.0]]  # bfloat16 has no 257
    assert out.equal(kernels.add_rms_norm(hidden, None, torch.ones(2).bfloat16(), EPS)[0])


def test_float32_weights_keep_what_the_model_s_dtype_would_lose() -> None:
    hidden = torch.randn(64, 512).bfloat16()
    weight = torch.full((512,), 1 + 2**-9 + 2**-11)  # the nearest bfloat16 is 1 + 2^-7
    out, _ = kernels.add_rms_norm(hidden, None, weight, EPS)
    exact = hidden.double() / (hidden.double().square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight
    assert out.dtype == torch.bfloat16
    assert ((out - exact) / exact).mean().abs() < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_in_half_precision_is_the_float32_norm_rounded_once(dtype: torch.dtype) -> None:
    hidden, weight = (100 * torch.randn(3, 512)).to(dtype), torch.randn(512).to(dtype)
    out, _ = kernels.add_rms_norm(hidden, None, weight, EPS)
    wanted, _ = kernels.add_rms_norm(hidden.float(), None, weight.float(), EPS)
    assert out.equal(wanted.to(dtype))


def test_silu_is_the_gate_times_its_sigmoid_times_the_other_half() -> None:
    out = kernels.gated_activation("silu", torch.tensor([[2.0, -1.0]]), torch.tensor([[3.0, 5.0]]))
    torch.testing.assert_close(out, torch.tensor([[6 / (1 + math.exp(-2)), -5 / (1 + math.exp(1))]]))


def test_gelu_is_the_approximation_by_tanh() -> None:
    out = kernels.gated_activation("gelu_tanh", torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    inner = math.sqrt(2 / math.pi) * (2 + 0.044715 * 8)
    torch.testing.assert_close(out, torch.tensor([[3 * 0.5 * 2 * (1 + math.tanh(inner))]]))
