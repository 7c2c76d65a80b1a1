"""Which tests this process can run: TRITON_INTERPRET says whether Triton kernels are interpreted or compiled."""

from __future__ import annotations

import os

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = ["plugins/*/tests/compiler/*" if _INTERPRETED else "plugins/*/tests/interpreter/*"]
