"""These tests need the demo model and download nothing: without it they fail and name the command that fetches it."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.demo_model import demo_model_path


@pytest.fixture(scope="session", autouse=True)
def demo_model() -> Path:
    """The demo model's file."""
    return demo_model_path(fetch=False)
