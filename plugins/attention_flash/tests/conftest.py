"""Fake libraries, installed for one test as the real ones are: modules on the path, with the metadata of a package."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FAKES = Path(__file__).parent / "fake_libraries"

Install = Callable[..., None]

# By name: the fake, where the real library has it, and what its package is called.
LIBRARIES = {
    "flash-attn-2": ("flash_attn_2.py", "flash_attn/__init__.py", "flash_attn", "2.8.3.post2"),
    "flash-attn-3": ("flash_attn_3.py", "flash_attn_interface.py", "flash_attn_3", "3.0.0b1"),
    "flash-attn-4": ("flash_attn_4.py", "flash_attn/cute/__init__.py", "flash_attn_4", "4.0.0b36"),
    "flashinfer": ("flashinfer_prefill.py", "flashinfer/__init__.py", "flashinfer_python", "0.7.2.post1"),
}
MODULES = ("flash_attn", "flash_attn_interface", "flashinfer", "paged_reference")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A function of names in LIBRARIES; `version=` is another one of the library."""
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(FAKES / "paged_reference.py", site)
    monkeypatch.syspath_prepend(site)

    def install(*names: str, version: str | None = None) -> None:
        for name in names:
            fake, module, package, its_version = LIBRARIES[name]
            (site / module).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(FAKES / fake, site / module)
            metadata = site / f"{package}-{version or its_version}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version or its_version}\n")
        monkeypatch.syspath_prepend(site)  # also forgets what was looked for and not found

    yield install
    for module in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[module]
