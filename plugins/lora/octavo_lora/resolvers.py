"""Where an adapter lies that a request names first: a folder below a root, or Hugging Face. Names are not trusted."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from octavo.errors import AdapterError, ConfigError
from octavo.interfaces import AdapterResolver
from octavo_lora.hub import CONFIG_FILE, WEIGHTS_FILE, download_adapter, is_hub_id
from octavo_lora.options import FilesystemOptions, HuggingFaceOptions

_MAX_CHARACTERS = 255
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_LEAVES = re.compile(r"\\|\0|^[A-Za-z]:|(^|/)\.{0,2}(/|\Z)")
"""Backslashes, NUL, drives, and components that are empty (so absolute paths), "." or ".."."""


class FilesystemResolver(AdapterResolver):
    """A name is a folder below the root: words of letters, digits, "_", "-" and ".", with "/" between them.

    What a name comes to once links are followed must lie below the root, and so must the files in it. Errors tell a
    request nothing of this machine's paths. Whoever can write below the root is trusted.
    """

    def __init__(self, options: FilesystemOptions) -> None:
        self._root = Path(options.root).expanduser().absolute()
        if not self._root.is_dir():
            raise ConfigError(f"{options.root!r}, where adapters are looked up by name, is no folder ({self._root}).")

    def resolve(self, base_model: str, name: str) -> str | None:
        if len(name) > _MAX_CHARACTERS:
            return None
        if _LEAVES.search(name):
            raise _leaves(name)
        if not _NAME.fullmatch(name):
            return None
        root = os.path.realpath(self._root)
        folder = _real_path(os.path.join(root, name), root, name)
        if folder is None:
            return None
        files = [_real_path(os.path.join(folder, file), root, name) for file in (CONFIG_FILE, WEIGHTS_FILE)]
        return folder if files[0] is not None and os.path.isfile(files[0]) else None


class HuggingFaceResolver(AdapterResolver):
    """A name is a Hugging Face id; only those that the operator allows are looked at."""

    def __init__(self, options: HuggingFaceOptions) -> None:
        self._allowed = options.allowed

    def resolve(self, base_model: str, name: str) -> str | None:
        if not is_hub_id(name) or not any(fnmatchcase(name, pattern) for pattern in self._allowed):
            return None
        return download_adapter(name)


def _real_path(path: str, root: str, name: str) -> str | None:
    """A path with its links followed; None: there is none.

    Raises:
        AdapterError: it is not below the root, or cannot be read.
    """
    try:
        real = os.path.realpath(path, strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise AdapterError(f"The adapter {name!r} cannot be read: {error.strerror}.") from error
    if not Path(real).is_relative_to(root):
        raise _leaves(name)
    return real


def _leaves(name: str) -> AdapterError:
    return AdapterError(
        f"{name!r} cannot be an adapter's name: it leads out of the folder of adapters. "
        'A name is words of letters, digits, "_", "-" and ".", with "/" between them.'
    )
