"""Plain weights keep the contract of quantization methods, packed for oneDNN and not."""

from __future__ import annotations

import pytest

from octavo.builtin import unquantized
from octavo.testing import QuantizationSuite


class TestUnquantized(QuantizationSuite):
    component = "builtin/unquantized"


class TestUnquantizedWhereTorchCannotPack(QuantizationSuite):
    component = "builtin/unquantized"

    @pytest.fixture(autouse=True)
    def _no_packing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unquantized, "can_prepack", lambda dtype: False)
