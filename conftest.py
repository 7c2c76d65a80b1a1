"""How tests run: on one thread, and Triton kernels interpreted or compiled, as TRITON_INTERPRET says."""

from __future__ import annotations

import os

# Before torch is imported, here and in the processes that tests start: on small tensors, and beside other programs,
# threads wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = ["plugins/*/tests/compiler/*" if _INTERPRETED else "plugins/*/tests/interpreter/*"]
