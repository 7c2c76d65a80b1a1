"""GPTQ under the conformance suite of quantization methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gptq_layers import config_of, store

from octavo.interfaces import LinearShape
from octavo.testing import QuantizationCase, QuantizationSuite

SHAPE = LinearShape(in_features=192, out_features=64)


class TestGPTQ(QuantizationSuite):
    component = "quant-gptq/gptq"

    def cases(self) -> Sequence[QuantizationCase]:
        return [
            _case(2, 32),
            _case(3, 32, act_order=True),
            _case(3, 64, format="gptq_v2"),
            _case(4, 64, symmetric=True, dtype=torch.bfloat16),
            _case(4, 32, act_order=True, bias=True),
            _case(4, -1, format="gptq_v2", symmetric=True, dtype=torch.float32),
            _case(4, 80, format="gptq_v2", bias=True),
            _case(8, -1),
            _case(8, 80, act_order=True),
            _case(5, 64),
            _case(3, 64, format="gptq_p"),
        ]


def _case(
    bits: int,
    group_size: int,
    *,
    format: str = "gptq",
    symmetric: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    bias: bool = False,
) -> QuantizationCase:
    named = {"symmetric": symmetric, "act-order": act_order, "bias": bias}
    words = [f"{bits} bits, {format}, groups of {group_size}", *(name for name, has in named.items() if has)]
    layout = {"format": format, "symmetric": symmetric, "act_order": act_order}
    return QuantizationCase(
        name=", ".join(words),
        config=config_of(bits, group_size, **layout),
        store=store(bits, group_size, dtype=dtype, bias=bias, **layout),
        shape=SHAPE,
    )
