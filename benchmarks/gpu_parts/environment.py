"""Octavo made importable where it is not installed: its own folders, its plugins' entry points, its wheels.

Plain Python without any package, for it runs before there is one.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WHEELS = ROOT / "build" / "gpu-wheels"
LIBRARIES = ("torch", "triton", "transformers", "numpy", "pydantic")


def python_path(folder: Path, wheels: Path = WHEELS) -> str:
    """The PYTHONPATH under which `import octavo` works and every plugin of this checkout is found.

    Args:
        folder: an empty one, for what has to be written: unpacked wheels, entry points.
        wheels: what `make gpu-wheels` fetched; used only where some of it is not installed, and then all of it.

    Raises:
        SystemExit: a wheel that is needed is for another Python or another machine.
    """
    site = folder / "site"
    site.mkdir(parents=True)
    unpack_missing(wheels, site)
    projects = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
    for project in projects:
        write_dist_info(project, site)
    inherited = os.environ.get("PYTHONPATH")
    # Before what is installed: this checkout is measured.
    return os.pathsep.join([str(site), str(ROOT / "framework"), *map(str, projects[1:]), *filter(None, [inherited])])


def unpack_missing(wheels: Path, site: Path) -> None:
    """Unpack the wheels into `site`, unless every one of their distributions is installed: compiled ones need files."""
    files = sorted(wheels.glob("*.whl"))
    if all(is_installed(file.name.partition("-")[0]) for file in files):
        return
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if strange := [file.name for file in files if not re.search(rf"-(py3|py2\.py3|{python})-", file.name)]:
        version = python.removeprefix("cp3")
        sys.exit(
            f"{wheels} holds wheels for another Python than this 3.{version}: {', '.join(strange)}. "
            f'Fetch them anew: make gpu-wheels ARGS="--python-version 3.{version}"'
        )
    for file in files:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(site)


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def write_dist_info(project: Path, site: Path) -> None:
    """What `importlib.metadata` must see of a package that is not installed: its name, version and entry points."""
    content = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    name, version = content["name"], content.get("version") or octavo_version()
    dist_info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines: list[str] = []
    for group, entries in content.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items())]
    (dist_info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def octavo_version() -> str:
    """Octavo's own, which its pyproject.toml takes from the package."""
    found = re.search(r'^__version__ = "(.+)"', (ROOT / "framework/octavo/__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU with a driver."""
    return Path("/dev/nvidiactl").exists() or bool(gpu_machine())


def gpu_machine() -> dict[str, str]:
    """The GPU as its driver names it; empty without one."""
    names = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(("gpu", "driver", "gpu_memory", "max_sm_clock", "power_limit"), values, strict=True))


def library_versions() -> dict[str, str]:
    """Of what computes, where it is installed."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES if is_installed(name)}
