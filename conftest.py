"""How tests run: on one thread, and Triton kernels interpreted or compiled, as TRITON_INTERPRET says."""

from __future__ import annotations

import os

import pytest

# Before torch is imported, here and in the processes that tests start: on small tensors, and beside other programs,
# threads wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = ["plugins/*/tests/compiler/*" if _INTERPRETED else "plugins/*/tests/interpreter/*"]


def pytest_configure(config: pytest.Config) -> None:
    """Let be what Triton's interpreter itself warns of."""
    if not _INTERPRETED:
        return
    # Where a loop's bounds are tensors it makes integers of arrays of one element, as numpy would no longer have it.
    line = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
    config.addinivalue_line("filterwarnings", line)
    # A token whose slot is PAD_SLOT reads what nobody wrote, which in the suite is NaN.
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")
