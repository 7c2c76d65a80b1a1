"""GPTQ under the conformance suite of quantization methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gptq_layers import Kind

from octavo.interfaces import LinearShape
from octavo.testing import QuantizationCase, QuantizationSuite

SHAPE = LinearShape(in_features=192, out_features=64)


class TestGPTQ(QuantizationSuite):
    component = "quant-gptq/gptq"

    def cases(self) -> Sequence[QuantizationCase]:
        kinds = [
            Kind(2, 32),
            Kind(3, 32, act_order=True),
            Kind(3, 64, format="gptq_v2"),
            Kind(4, 64, symmetric=True, dtype=torch.bfloat16),
            Kind(4, 32, act_order=True, bias=True),
            Kind(4, -1, format="gptq_v2", symmetric=True, dtype=torch.float32),
            Kind(4, 80, format="gptq_v2", bias=True),
            Kind(8, -1),
            Kind(8, 80, act_order=True),
            Kind(5, 64),
            Kind(3, 64, format="gptq_p"),
        ]
        return [QuantizationCase(name=str(kind), config=kind.config, store=kind.store, shape=SHAPE) for kind in kinds]
