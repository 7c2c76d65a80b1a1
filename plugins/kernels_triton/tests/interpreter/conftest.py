"""What Triton's interpreter itself warns of."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Where a loop's bounds are tensors it makes integers of arrays of one element, as numpy would no longer have it.
    line = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
    config.addinivalue_line("filterwarnings", line)
    # A token whose slot is PAD_SLOT reads what nobody wrote, which in the suite is NaN.
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")
