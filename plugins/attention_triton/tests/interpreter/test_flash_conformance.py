"""triton-flash as the conformance suite sees any attention backend."""

from __future__ import annotations

from octavo.testing import AttentionSuite


class TestTritonFlash(AttentionSuite):
    component = "attention-triton/triton-flash"
    small = True
    # Where a GPU rounds to bfloat16 the interpreter cuts off, which is twice as wrong.
    tolerances = AttentionSuite.tolerances | {"bfloat16": 4e-2}
