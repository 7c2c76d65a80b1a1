"""What these tests share (gptq_layers) is imported from here, what the core's share (quantized_goldens) from tests/."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[2] / "tests"))
