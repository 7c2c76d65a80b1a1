"""Whether torch's operators for int4 and int8 weights are there, right and worth calling on this CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from octavo.interfaces import AffineWeight
from octavo.plugins.specs import Need
from octavo_linear_cpu.int4 import CpuInt4
from octavo_linear_cpu.int8 import CpuInt8

_CAPABILITIES = ("AVX2", "AVX512")
"""For which torch has vectorised these operators; elsewhere they take ten times as long and more."""


def why_not_int4(need: Need) -> list[str]:
    """Reasons against the int4 operators: private ones of torch, so they are tried on a small product."""
    del need  # the spec's facts have looked at it
    return _why_not("_weight_int4pack_mm_for_cpu", 4, _int4_product)


def why_not_int8(need: Need) -> list[str]:
    """Reasons against the int8 operator: a private one of torch, so it is tried on a small product."""
    del need
    return _why_not("_weight_int8pack_mm", 8, _int8_product)


@cache
def _why_not(operator: str, bits: int, product: Callable[[AffineWeight, Tensor], Tensor]) -> list[str]:
    if (capability := torch.backends.cpu.get_cpu_capability()) not in _CAPABILITIES:
        return [f"needs a CPU with AVX2 or AVX-512, for which torch's {operator} is written; torch finds {capability}"]
    generator = torch.Generator().manual_seed(0)
    weight = AffineWeight(
        bits=bits,
        codes=torch.randint(2**bits, (80, 96), generator=generator, dtype=torch.uint8),
        scales=torch.rand(1, 80, generator=generator) + 0.5,
        zeros=None,
        group_size=96,
    )
    x = torch.randn(3, 96, generator=generator).bfloat16()
    try:
        y = product(weight, x)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return [f"torch {torch.__version__} cannot multiply with its operator {operator}: {str(error).splitlines()[0]}"]
    dense = weight.dequantize()
    if ((y.float() - x.float() @ dense.T).abs() / (x.float().abs() @ dense.abs().T)).max() > 1e-2:
        return [f"the operator {operator} of torch {torch.__version__} gives wrong products on this CPU"]
    return []


def _int4_product(weight: AffineWeight, x: Tensor) -> Tensor:
    kernel = CpuInt4(torch.bfloat16, "cpu")
    return kernel.apply(kernel.prepare(weight), x, None)


def _int8_product(weight: AffineWeight, x: Tensor) -> Tensor:
    kernel = CpuInt8(torch.bfloat16, "cpu")
    return kernel.apply(kernel.prepare(weight), x, None)
