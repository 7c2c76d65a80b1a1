"""Where an adapter's two files lie, and what is in them. The first thing that happens to an adapter's path."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from octavo.errors import AdapterError
from octavo_lora.hub import CONFIG_FILE, WEIGHTS_FILE, adapter_folder

_PICKLE_FILE = "adapter_model.bin"

MAX_CONFIG_BYTES = 16 * 2**20
"""More than any list of module names takes: reading a configuration never takes long."""

MAX_HEADER_BYTES = 100 * 2**20
"""As the safetensors library has it."""

_LENGTH_BYTES = 8
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
        with _opened(file) as opened:
            data = opened.read(MAX_CONFIG_BYTES + 1)
        _refuse_pointer(file, data)
        if len(data) > MAX_CONFIG_BYTES:
            raise AdapterError(
                f"{file} has more than {MAX_CONFIG_BYTES} bytes; a configuration is a few kilobytes of JSON. "
                "Save the adapter again with peft."
            )
        config = json.loads(data)
        json.dumps(config, ensure_ascii=False).encode()  # half a surrogate pair is a text that no answer can hold
    except AdapterError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise AdapterError(f"{file} is no JSON that can be read: {error}. Save the adapter again with peft.") from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{file} holds a JSON {type(config).__name__}, not an object. Save the adapter again with peft."
        )
    return config


class AdapterTensors:
    """The tensors of an open adapter_model.safetensors: shapes first, from its header, then all of them.

    Read, not mapped: a file that somebody shortens meanwhile is an error then, not the end of the process.

    Attributes:
        shapes: by name, sorted.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        try:
            self._header = self._read_header()
            header = json.loads(self._header[_LENGTH_BYTES:])
            "".join(header).encode()
            self.shapes: Mapping[str, tuple[int, ...]] = {
                key: tuple(map(int, header[key]["shape"])) for key in sorted(header) if key != "__metadata__"
            }
        except AdapterError:
            raise
        except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:  # no JSON, or not of that form
            raise self._damaged(f"its header cannot be read ({error})") from error

    def read(self) -> Mapping[str, Tensor]:
        """All tensors, by name, sorted, in the dtypes that they have in the file; once.

        Raises:
            AdapterError: the file is not whole, or has tensors of integers.
        """
        try:
            tensors = load(self._header + self._file.read())
        except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that torch has not
            raise self._damaged(str(error)) from error
        if integers := sorted(key for key, tensor in tensors.items() if not tensor.is_floating_point()):
            raise AdapterError(
                f"{integers[0]} of {self._path} is of {tensors[integers[0]].dtype}; weights are floating-point "
                "numbers. Save the adapter unquantized."
            )
        return dict(sorted(tensors.items()))

    def _read_header(self) -> bytes:
        start = self._file.read(len(_LFS_MARK))
        _refuse_pointer(self._path, start)
        size = int.from_bytes(start[:_LENGTH_BYTES], "little")
        if size > MAX_HEADER_BYTES:
            raise self._damaged(f"its header would have {size} bytes")
        self._file.seek(0)
        return self._file.read(_LENGTH_BYTES + size)

    def _damaged(self, why: str) -> AdapterError:
        return AdapterError(f"{self._path} is no whole safetensors file: {why}. Copy or download the adapter again.")


@contextmanager
def open_tensors(folder: Path) -> Iterator[AdapterTensors]:
    """A folder's adapter_model.safetensors.

    Raises:
        AdapterError: no such file, none that is whole, or only weights in a pickle.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / _PICKLE_FILE).exists():
        raise AdapterError(
            f"{folder} has its weights in {_PICKLE_FILE}, a pickle, which could run any code when it is read. "
            f"Convert it to {WEIGHTS_FILE}: load it with peft and call save_pretrained."
        )
    with _opened(_regular(folder, WEIGHTS_FILE)) as file:
        yield AdapterTensors(path, file)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}. Correct its permissions.") from error


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
