# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""SiLU or GELU of the gate, times the other half."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from octavo.errors import ShapeError
from octavo.interfaces import Activation

# Elements of a program's piece of a row, and how many of them a thread holds: 16 bytes of bfloat16.
_MAX_BLOCK = 1024
_ELEMENTS_PER_THREAD = 8

_TWICE_SQRT_2_OVER_PI = tl.constexpr(2 * math.sqrt(2 / math.pi))


@triton.jit
def gated_activation_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    size,
    stride_gate_token,
    stride_up_token,
    IS_SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t, i] = gate[t, i] * sigmoid(x) * up[t, i].

    For SiLU x = gate. For GELU by tanh, 0.5 * gate * (1 + tanh(y)) with y = sqrt(2 / pi) * (gate + 0.044715 gate^3),
    x = 2 y, because (1 + tanh(y)) / 2 = sigmoid(2 y). One program owns BLOCK columns of one token; columns past size
    are masked. `out` is contiguous.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_ptr + token * stride_gate_token + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + token * stride_up_token + columns, mask, other=0.0).to(tl.float32)
    x = gate if IS_SILU else _TWICE_SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)
    # exp(-|x|) <= 1: neither side overflows.
    power = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x >= 0, 1.0, power) / (1.0 + power)
    out = gate * sigmoid * up
    tl.store(out_ptr + token * size + columns, out.to(out_ptr.dtype.element_ty), mask)


def gated_activation(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """Launch it: [num_tokens, size], contiguous, of the inputs' dtype.

    Args:
        gate, up: [num_tokens, size], one dtype; read where they lie as long as rows are contiguous, else copied first.

    Raises:
        ShapeError: the shapes differ or have not two dimensions.
    """
    if gate.shape != up.shape or gate.dim() != 2:
        raise ShapeError(
            f"A gated activation wants gate and up of one shape [num_tokens, size]; found {list(gate.shape)} and "
            f"{list(up.shape)}."
        )
    num_tokens, size = gate.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    block = min(triton.next_power_of_2(size), _MAX_BLOCK)
    gated_activation_kernel[(num_tokens, triton.cdiv(size, block))](
        gate,
        up,
        out,
        size,
        gate.stride(0),
        up.stride(0),
        IS_SILU=activation == "silu",
        BLOCK=block,
        num_warps=max(block // (32 * _ELEMENTS_PER_THREAD), 1),
    )
    return out


def gated_activation_reference(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """In float64."""
    exact = gate.double()
    activated = functional.silu(exact) if activation == "silu" else functional.gelu(exact, approximate="tanh")
    return activated * up.double()
