"""The torch backend keeps the contract of attention backends."""

from __future__ import annotations

from octavo.testing import AttentionSuite


class TestTorchAttention(AttentionSuite):
    component = "builtin/torch"
