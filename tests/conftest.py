"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A shell starts what it runs in the background with Ctrl-C ignored, and there are tests of Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Test files import what they share, such as margin_rule, from here.
sys.path.insert(0, str(ROOT / "tests"))

# Without any package under plugins/ all other tests stay green, and the demo model is a GGUF file.
collect_ignore = [] if importlib.util.find_spec("octavo_checkpoint_gguf") else ["demo_model"]


@dataclass(frozen=True)
class SitePackages:
    """A folder on sys.path where a test installs plugins, as pip would leave them: a module and its dist-info."""

    path: Path

    def install(
        self,
        plugin: str,
        source: str,
        *,
        distribution: str | None = None,
        module: str | None = None,
        version: str = "1.2",
    ) -> Path:
        """Install a distribution whose entry point `plugin` names a module with this source, at the file returned."""
        distribution = distribution or f"dummy-{plugin}"
        module = module or distribution.replace("-", "_")
        file = self.path / module / "__init__.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(dedent(source))
        dist_info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        dist_info.mkdir()
        (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (dist_info / "entry_points.txt").write_text(f"[octavo]\n{plugin} = {module}\n")
        importlib.invalidate_caches()
        return file


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SitePackages]:
    """Plugins installed here are gone after the test, and so are the modules imported from them."""
    path = tmp_path / "site-packages"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    before = set(sys.modules)
    yield SitePackages(path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(path)):
            del sys.modules[name]
