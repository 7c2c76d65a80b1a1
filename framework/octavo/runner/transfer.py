"""Between host and device: a step's arrays go over in one copy, its results come back without anyone waiting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

_ALIGNMENT = 16  # bytes; every field of the transfer starts at a multiple of it


class StepTransfer:
    """Packs a step's arrays into one buffer, copies it once, and hands out views.

    Args:
        fixed_bytes: size of the buffer that `send(..., fixed=True)` fills; 0: there is none.
    """

    def __init__(self, device: str, fixed_bytes: int = 0) -> None:
        self._device = device
        self._pinned = device != "cpu"  # page-locked memory is copied while the host goes on
        self._fixed = torch.zeros(fixed_bytes, dtype=torch.uint8, device=device) if fixed_bytes else None

    def send(self, arrays: Mapping[str, Array], fixed: bool = False) -> dict[str, Tensor]:
        """The arrays as tensors on the device.

        Args:
            fixed: into the same memory each time, where a captured step reads them. An array lies where it lay the last
                time as long as those before it keep their sizes.
        """
        offsets, size = {}, 0
        for name, array in arrays.items():
            offsets[name] = size
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        packed = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        host = packed.numpy()
        for name, array in arrays.items():
            view = host[offsets[name] : offsets[name] + array.nbytes]
            view.view(array.dtype).reshape(array.shape)[...] = array
        if fixed:
            assert self._fixed is not None
            device = self._fixed[:size].copy_(packed, non_blocking=True)
        else:
            device = packed.to(self._device, non_blocking=True)
        return {
            name: device[offsets[name] : offsets[name] + array.nbytes]
            .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
            .view(array.shape)
            for name, array in arrays.items()
        }


def to_device(array: Array, device: torch.device | str) -> Tensor:
    """The array as a tensor on the device, on its way there without anyone waiting; a CPU's shares its memory."""
    host = torch.from_numpy(array)
    if torch.device(device).type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host that is complete once the device has done what was asked of it so far; a CPU's is itself."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Moment:
    """A point in the device's work, to wait for; on a CPU it has always passed."""

    def __init__(self, device: str) -> None:
        self._event: torch.cuda.Event | None = None
        if device == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Until the device has come to it. Work submitted later is not waited for."""
        if self._event is not None:
            self._event.synchronize()
