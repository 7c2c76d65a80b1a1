"""SqueezeLLM under the conformance suite of quantization methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from squeezellm_layers import store

from octavo.interfaces import LinearShape
from octavo.testing import QuantizationCase, QuantizationSuite

SHAPE = LinearShape(in_features=128, out_features=48)


class TestSqueezeLLM(QuantizationSuite):
    component = "quant-squeezellm/squeezellm"

    def cases(self) -> Sequence[QuantizationCase]:
        stores = {
            ("dense", 3): store(3),
            ("dense", 4): store(4),
            ("sparse, balanced", 3): store(3, density=0.02, balanced=True),
            ("sparse", 4): store(4, density=0.02),
            ("whole outputs", 3): store(3, density=0.02, num_full=2),
            ("bfloat16 with a bias", 4): store(4, density=0.02, dtype=torch.bfloat16, bias=True),
        }
        return [
            QuantizationCase(
                name=f"{name}, {bits} bits",
                config={"quant_method": "squeezellm", "wbits": bits},
                store=each,
                shape=SHAPE,
            )
            for (name, bits), each in stores.items()
        ]
