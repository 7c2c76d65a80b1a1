"""The conformance of the backends over fakes of their libraries, on the CPU; nothing here has seen the real kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest

from octavo.plugins.registry import Candidate
from octavo.testing import AttentionSuite
from octavo.testing.attention_needs import Shapes


class OverFakes(AttentionSuite):
    """A backend whose library is a fake, which runs on a CPU."""

    library: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _library(self, install: Callable[..., None]) -> None:
        install(self.library)

    def candidate(self) -> Candidate:
        candidate = super().candidate()
        return replace(candidate, spec=replace(candidate.spec, devices=("cpu",)))


class TestFlashAttention3(OverFakes):
    component = "attention-flash/flash-attn"
    library = "flash-attn-3"


class TestFlashAttention4(OverFakes):
    component = "attention-flash/flash-attn"
    library = "flash-attn-4"


class TestFlashAttention2(OverFakes):
    component = "attention-flash/flash-attn"
    library = "flash-attn-2"

    @property
    def shapes(self) -> Shapes:
        """Its smallest pages, and contexts that fill more than one of them."""
        return replace(super().shapes, block_sizes=(256, 512), longest_context=520)


class TestFlashInfer(OverFakes):
    component = "attention-flash/flashinfer"
    library = "flashinfer"


del OverFakes, AttentionSuite
