"""Where an adapter's two files lie, and what is in them. The first thing that happens to an adapter's path."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.errors import AdapterError
from octavo_lora.hub import CONFIG_FILE, WEIGHTS_FILE, adapter_folder

_PICKLE_FILE = "adapter_model.bin"

MAX_CONFIG_BYTES = 16 * 2**20
"""More than any list of module names takes: reading a configuration never takes long."""

_LFS_MARK = b"version https://git-lfs"
_WANTED = f"An adapter is a folder as peft's save_pretrained writes it, with {CONFIG_FILE} and {WEIGHTS_FILE}"


def find_folder(path: str) -> Path:
    """The folder of an adapter, as `adapter_folder` finds it, whatever text the path is.

    Raises:
        AdapterError: there is no such folder, or it cannot be fetched.
    """
    try:
        return Path(adapter_folder(path))
    except (OSError, RuntimeError) as error:  # too long a name, no permission; no such user's home
        raise AdapterError(f"{_WANTED}; {path[:200]!r} cannot be looked up: {error}. Give such a folder.") from error


def read_config(folder: Path) -> Mapping[str, object]:
    """The keys of a folder's adapter_config.json.

    Raises:
        AdapterError: no such file, or none that holds a JSON object.
    """
    file = _regular(folder, CONFIG_FILE)
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise AdapterError(
                f"{file} has more than {MAX_CONFIG_BYTES} bytes; a configuration is a few kilobytes of JSON. "
                "Save the adapter again with peft."
            )
        _refuse_pointer(file, data)
        config = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8; AdapterError is one, too
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{file} is no JSON that can be read: {error}. Save the adapter again with peft.") from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{file} holds a JSON {type(config).__name__}, not an object. Save the adapter again with peft."
        )
    return config


class AdapterTensors:
    """The tensors of an open adapter_model.safetensors: shapes first, from its header, then one tensor at a time."""

    def __init__(self, file: Path, opened: safe_open) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = {
            key: tuple(opened.get_slice(key).get_shape())  # type: ignore[no-untyped-call]
            for key in sorted(opened.keys())  # type: ignore[no-untyped-call]
        }
        self._file = file
        self._opened = opened

    def read(self, key: str) -> Tensor:
        """A tensor in the dtype that it has in the file, on the CPU; a copy, which the file no longer touches."""
        try:
            tensor: Tensor = self._opened.get_tensor(key)  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            raise AdapterError(f"{key} of {self._file} cannot be read: {error}. Copy the adapter again.") from error
        if not tensor.is_floating_point():
            raise AdapterError(
                f"{key} of {self._file} is of {tensor.dtype}; weights are floating-point numbers. "
                "Save the adapter unquantized."
            )
        return tensor.clone()


@contextmanager
def open_tensors(folder: Path) -> Iterator[AdapterTensors]:
    """A folder's adapter_model.safetensors.

    Raises:
        AdapterError: no such file, none that is whole, or only weights in a pickle.
    """
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / _PICKLE_FILE).exists():
        raise AdapterError(
            f"{folder} has its weights in {_PICKLE_FILE}, a pickle, which could run any code when it is read. "
            f"Convert it to {WEIGHTS_FILE}: load it with peft and call save_pretrained."
        )
    file = _regular(folder, WEIGHTS_FILE)
    try:
        with file.open("rb") as start:
            _refuse_pointer(file, start.read(len(_LFS_MARK)))
        opened = safe_open(file, framework="pt")
        tensors = AdapterTensors(file, opened)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{file} is no whole safetensors file: {error}. Copy or download the adapter again."
        ) from error
    with opened:
        yield tensors


def _regular(folder: Path, name: str) -> Path:
    """A file to read from: neither a device nor a pipe, whose reading might never end."""
    file = folder / name
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise AdapterError(
            f"{_WANTED}; {folder} has no {name} that can be read ({error.strerror}). Give such a folder."
        ) from error
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{_WANTED}; {file} is no regular file. Save the adapter again with peft.")
    return file


def _refuse_pointer(file: Path, start: bytes) -> None:
    if start.startswith(_LFS_MARK):
        raise AdapterError(
            f"{file} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its repository, or download it."
        )
