"""scripts/quantize_env, as far as it goes without fetching anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_folder_that_it_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("somebody else's environment")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "quantize_env", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"{tmp_path} was not made by this script" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pyvenv.cfg"]


def test_every_version_is_pinned_and_the_tool_comes_last() -> None:
    lines = (ROOT / "plugins" / "quantize" / "environment.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins)
    assert pins[-1][0] == "gptqmodel"
    assert "torch" not in [name for name, _ in pins], "which torch is said in constraints.txt"
