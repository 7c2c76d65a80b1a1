"""triton-paged as the conformance suite sees any attention backend."""

from __future__ import annotations

from dataclasses import replace

from octavo.testing import AttentionSuite
from octavo.testing.attention_needs import FEW, Shapes


class TestTritonPaged(AttentionSuite):
    component = "attention-triton/triton-paged"
    small = True
    # Where a GPU rounds to bfloat16 the interpreter cuts off, which is twice as wrong.
    tolerances = AttentionSuite.tolerances | {"bfloat16": 4e-2}

    @property
    def shapes(self) -> Shapes:
        return replace(FEW, heads=FEW.heads[::-1])  # first the one with few programs, for the tests of other things

    def head_sizes(self) -> tuple[int, ...]:
        return (64, 72, 256)  # of those that it lists the least, one that is no power of two, and the largest
