"""These tests need the demo model and download nothing: without it they fail and name the command that fetches it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from octavo.demo_model import demo_model_path

# Without the plugin that reads adapters all others stay green.
collect_ignore = [] if importlib.util.find_spec("octavo_lora") else ["test_trained_adapters.py"]


@pytest.fixture(scope="session", autouse=True)
def demo_model() -> Path:
    """The demo model's file."""
    return demo_model_path(fetch=False)
