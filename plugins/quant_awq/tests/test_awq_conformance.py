"""AWQ under the conformance suite of quantization methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from awq_layers import store

from octavo.interfaces import LinearShape
from octavo.testing import QuantizationCase, QuantizationSuite

SHAPE = LinearShape(in_features=256, out_features=48)


class TestAWQ(QuantizationSuite):
    component = "quant-awq/awq"

    def cases(self) -> Sequence[QuantizationCase]:
        return [
            _case("gemm", 32),
            _case("gemm", 64, dtype=torch.bfloat16),
            _case("gemm", -1, dtype=torch.float32),
            _case("gemm", 128, zero_point=False),
            _case("gemm", 64, bias=True),
            _case("gemv", 32),
            _case("gemv", 64, bias=True),
            _case("gemv", 128, zero_point=False),
            _case("gemv", -1),
        ]


def _case(
    version: str, group_size: int, *, dtype: torch.dtype = torch.float16, zero_point: bool = True, bias: bool = False
) -> QuantizationCase:
    named = {"zeros": zero_point, "bias": bias}
    return QuantizationCase(
        name=f"{version}, groups of {group_size}, {dtype}, {', '.join(name for name, has in named.items() if has)}",
        config={
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "version": version,
            "zero_point": zero_point,
        },
        store=store(version, group_size, dtype=dtype, zero_point=zero_point, bias=bias),
        shape=SHAPE,
    )
