"""The conformance of the backend that any device runs."""

from __future__ import annotations

from octavo.testing import LoraSuite


class TestTorch(LoraSuite):
    component = "lora/torch"
