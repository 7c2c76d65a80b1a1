"""What the core's tests share (margin_rule, tiny_model) is imported from tests/, what these share from here."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "tests")]
