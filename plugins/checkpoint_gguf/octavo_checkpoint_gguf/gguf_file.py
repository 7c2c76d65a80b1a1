"""GGUFFile: the header of a GGUF file (metadata and where each tensor lies), and the tensors on demand.

`gguf.GGUFReader` makes numpy views of every single string and number, which takes seconds for a vocabulary; this
reader takes a tenth of a second for the same header. Block sizes and dequantisation are the `gguf` library's.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from octavo.errors import CheckpointError

Value = bool | int | float | str | list[str] | list[float] | list[int] | list[bool]

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: outermost dimension first, as in torch (the file has it reversed).
        start, num_bytes: in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


class GGUFFile:
    """An opened file.

    Attributes:
        metadata: its key-value pairs.
        tensors: in the file's order.

    Raises:
        CheckpointError: not a GGUF file, a version or byte order that is not read, or cut short.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._bytes = _map(path)
        try:
            self.metadata, self.tensors = _Header(self._bytes).read()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error.__cause__

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor, dequantised.

        Raises:
            CheckpointError: its number format has no dequantisation here.
        """
        info = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, info.num_bytes, info.start)
        block_size, block_bytes = GGML_QUANT_SIZES[info.type]
        rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block_size * block_bytes)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(info.type)
        try:
            values = dequantize(rows if plain is None else rows.view(plain), info.type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {info.type.name}, which the installed `gguf` library cannot "
                "dequantise. Upgrade it (`pip install -U gguf`) or convert the file to a common type such as Q8_0."
            ) from error
        return values if values.flags.writeable else values.copy()  # float32 in the file is a read-only view of it


def _map(path: str) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointError(f"{path} cannot be opened: {error}") from error


class _Header:
    """A cursor over the header's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def read(self) -> tuple[dict[str, Value], dict[str, TensorInfo]]:
        try:
            return self._read()
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise CheckpointError(
                f"the header is cut short or damaged near byte {self.position} of {len(self.data)}; fetch it again."
            ) from error

    def _read(self) -> tuple[dict[str, Value], dict[str, TensorInfo]]:
        if (magic := self.data[:4]) != b"GGUF":
            raise CheckpointError(f"not a GGUF file: it starts with {magic!r}, not b'GGUF'.")
        self.position = 4
        version = self.number("I")
        if version not in _VERSIONS:
            order = " (or it is big-endian)" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"GGUF version {version}{order}; versions 2 and 3, little-endian, are read.")
        num_tensors, num_pairs = self.number("Q"), self.number("Q")
        metadata: dict[str, Value] = {}
        for _ in range(num_pairs):
            key = self.string()
            metadata[key] = self.value(self.number("I"))
        infos = [self.tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"general.alignment is {alignment!r}, not a positive number of bytes.")
        first = math.ceil(self.position / alignment) * alignment
        return metadata, {info.name: info for info in (self.placed(*fields, first) for fields in infos)}

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value  # type: ignore[no-any-return]

    def string(self) -> str:
        start = self.position + 8
        (length,) = struct.unpack_from("<Q", self.data, self.position)
        self.position = start + length
        if self.position > len(self.data):
            raise struct.error("a string runs past the end")
        return str(self.data[start : self.position], "utf-8")

    def strings(self, length: int) -> list[str]:
        """`length` times `string()`, written out because a vocabulary and its merges are 400,000 of them."""
        data, position, size_of = self.data, self.position, struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(length):
            start = position + 8
            position = start + size_of(data, position)[0]
            strings.append(data[start:position].decode())
        self.position = position
        if position > len(data):
            raise struct.error("a string runs past the end")
        return strings

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"metadata of unknown type {kind} near byte {self.position}; the file is damaged.")
        kind, length = self.number("I"), self.number("Q")
        if kind == _STRING:
            return self.strings(length)
        if kind not in _SCALARS:
            raise CheckpointError(f"a metadata array of unknown type {kind} near byte {self.position}.")
        dtype = np.dtype("<" + _SCALARS[kind])
        if self.position + length * dtype.itemsize > len(self.data):
            raise struct.error("an array runs past the end")
        values = np.frombuffer(self.data, dtype, length, self.position)
        self.position += values.nbytes
        return values.tolist()  # type: ignore[no-any-return]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        num_dimensions = self.number("I")
        if num_dimensions > 8:
            raise CheckpointError(f"tensor {name!r} has {num_dimensions} dimensions; the file is damaged.")
        dimensions = tuple(self.number("Q") for _ in range(num_dimensions))
        return name, dimensions[::-1], self.number("I"), self.number("Q")

    def placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int, first: int) -> TensorInfo:
        try:
            ggml_type = GGMLQuantizationType(kind)
        except ValueError:
            raise CheckpointError(
                f"tensor {name} has number format {kind}, unknown to the installed `gguf` library; upgrade it."
            ) from None
        block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if not shape or 0 in shape or shape[-1] % block_size:
            raise CheckpointError(f"tensor {name} of shape {shape} does not fill blocks of {block_size} numbers.")
        num_bytes = math.prod(shape) // block_size * block_bytes
        if first + offset + num_bytes > len(self.data):
            raise CheckpointError(
                f"cut short: tensor {name} ends at byte {first + offset + num_bytes}, the file has {len(self.data)}; "
                "fetch it again."
            )
        return TensorInfo(name=name, shape=shape, type=ggml_type, start=first + offset, num_bytes=num_bytes)
