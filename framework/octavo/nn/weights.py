"""WeightLoader: takes the checkpoint's tensors one by one to the layers that expect them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from octavo.errors import CheckpointError

_MOST_NAMED = 8


class WeightLoader:
    """Layers say what they expect while the model is built; `load` then streams the checkpoint through once.

    Attributes:
        num_bytes: of the tensors taken so far, in the dtype they are kept in.
    """

    Receiver = Callable[[Tensor], None]

    def __init__(self) -> None:
        self._expected: dict[str, list[tuple[tuple[int, ...], torch.dtype, WeightLoader.Receiver]]] = {}
        self.num_bytes = 0

    def expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, receive: Receiver) -> None:
        """Ask for the tensor `name`; `receive` is called once with it, cast to `dtype`. Several may ask for one."""
        self._expected.setdefault(name, []).append((shape, dtype, receive))

    def load(self, tensors: Iterable[tuple[str, Tensor]], ignored: Sequence[str] = ()) -> None:
        """Deliver every tensor but those whose name matches a pattern of `ignored`, and let go of who received it.

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape; all are named together.
        """
        unexpected: list[str] = []
        misshapen: list[str] = []
        for name, tensor in tensors:
            receivers = self._expected.pop(name, None)
            if receivers is None:
                if not any(fnmatchcase(name, pattern) for pattern in ignored):
                    unexpected.append(name)
                continue
            for shape, dtype, receive in receivers:
                if tuple(tensor.shape) != shape:
                    misshapen.append(f"{name} is {list(tensor.shape)}, the configuration makes it {list(shape)}")
                    continue
                kept = tensor.to(dtype)
                self.num_bytes += kept.nbytes
                receive(kept)
        missing = list(self._expected)
        if missing or unexpected or misshapen:
            faults = [
                f"{len(names)} {what}: {', '.join(names[:_MOST_NAMED])}{' ...' if len(names) > _MOST_NAMED else ''}"
                for what, names in (
                    ("tensors are missing", missing),
                    ("tensors have no place in this model", unexpected),
                    ("tensors have the wrong shape", misshapen),
                )
                if names
            ]
            raise CheckpointError("The checkpoint does not fit the model. " + "; ".join(faults) + ".")
