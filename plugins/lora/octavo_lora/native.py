"""rows_by_adapter.cpp: compiled for this processor when it is first wanted, where there is a compiler."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_lora.placement import Slot

_SOURCE = Path(__file__).with_name("rows_by_adapter.cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

_TILE_ROWS = 8
"""ROWS in the source."""

_logger = logging.getLogger(__name__)


class _NativeSlot(ctypes.Structure):
    """As the source has it: addresses, then sizes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "scale", "shift", "table")),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features", "num_ranks", "max_rank", "num_parts")),
    )


class NativeLora:
    """Its calls, for slots on the CPU in bfloat16 whose tensors stay where they are."""

    def __init__(self, function: Callable[..., None], slots: Mapping[int, _NativeSlot]) -> None:
        self._function = function
        self._slots = slots
        self._addresses = {key: ctypes.addressof(slot) for key, slot in slots.items()}
        self._most_ranks = max((slot.num_ranks for slot in slots.values()), default=0)
        self.plan(np.empty(0, np.int64), [])

    @classmethod
    def of(cls, slots: Iterable[Slot]) -> NativeLora | None:
        """None where it cannot be compiled."""
        function = add_rows_by_adapter()
        return None if function is None else cls(function, {id(slot): _native_slot(slot) for slot in slots})

    def plan(self, order: NDArray[np.int64], groups: Sequence[tuple[int, int, int]]) -> None:
        """Of RowGroups: whose rows the next calls are to change."""
        tiles = [
            (position, first, min(first + _TILE_ROWS, end))
            for position, start, end in groups
            for first in range(start, end, _TILE_ROWS)
        ]
        self._num_tiles = len(tiles)
        # Kept, because the calls have their addresses.
        self._arrays = (
            np.array(tiles, np.int32),
            order.astype(np.int32),
            np.empty((len(order), self._most_ranks), np.float32),
        )
        tiles_at, order_at, shrunk_at = (array.ctypes.data for array in self._arrays)
        self._arguments = tiles_at, self._num_tiles, order_at, shrunk_at

    def apply(self, slot: Slot, x: Tensor, output: Tensor) -> None:
        """As LoraBackend.apply, in place."""
        if self._num_tiles == 0:
            return
        assert x.dtype is output.dtype is torch.bfloat16
        assert x.stride(1) == output.stride(1) == 1
        rows = x.data_ptr(), x.stride(0), output.data_ptr(), output.stride(0)
        self._function(self._addresses[id(slot)], *rows, *self._arguments)


def _native_slot(slot: Slot) -> _NativeSlot:
    tensors = (slot.a, slot.b, slot.scale, slot.shift, slot.table)
    sizes = slot.in_features, slot.out_features, slot.a.shape[1], slot.b.shape[1], len(slot.parts)
    return _NativeSlot(*(tensor.data_ptr() for tensor in tensors), *sizes)


@cache
def add_rows_by_adapter() -> Callable[..., None] | None:
    """The function of that name; None where it cannot be compiled, which is logged with the reason."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        _say_why("no C++ compiler (g++ or clang++) is installed")
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "lora"
    library = folder / f"{_key(compiler)}.so"
    try:
        if not library.exists():
            _compile(compiler, library)
        function = ctypes.CDLL(str(library)).add_rows_by_adapter
    except (OSError, subprocess.CalledProcessError) as error:
        _say_why(f"{compiler} could not make {library}: {getattr(error, 'stderr', None) or error}")
        return None
    function.restype = None
    integer, address = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [address, address, integer, address, integer, address, integer, address, address]
    return function


def _say_why(reason: str) -> None:
    _logger.warning("LoRA on this CPU is computed by torch alone, which is slower in small batches: %s.", reason)


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        subprocess.run([compiler, *_FLAGS, "-o", made, _SOURCE], check=True, capture_output=True, text=True)
        made.replace(library)  # at once, so that no other process loads half of it


def _key(compiler: str) -> str:
    """Of all that the library depends on: a folder of caches may be shared by machines."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().split("\n\n")[0].splitlines() if cpu.exists() else []
    processor = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    parts = (_SOURCE.read_text(), compiler, *_FLAGS, platform.machine(), *processor)
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
