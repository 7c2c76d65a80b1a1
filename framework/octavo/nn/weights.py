"""WeightLoader: what the layers expect of a checkpoint, and its tensors' way to them one by one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError
from octavo.progress import progress_bar

Receiver = Callable[[Tensor], None]

_MOST_NAMED = 8
_NUM_TRIMS = 64
"""How often free memory goes back while a model is loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """How devices share a tensor: cut along `axis` into `num_shards` of one size, of which each device holds one.

    The last is padded where the size does not divide. With more devices than shards, several hold the same one.
    """

    axis: int
    num_shards: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of one shard."""
        return (*whole[: self.axis], -(-whole[self.axis] // self.num_shards), *whole[self.axis + 1 :])


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some of a checkpoint's tensor: `size` elements from `start`, along `axis`."""

    axis: int
    start: int
    size: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part."""
        return (*whole[: self.axis], self.size, *whole[self.axis + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """A view."""
        return whole.narrow(self.axis, self.start, self.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedTensor:
    """A tensor that one layer asked for.

    Attributes:
        shape: the whole tensor's, as in the checkpoint.
        dtype: it is kept in.
        shard: how devices share what was asked for; None: each holds all of it.
        part: what of it was asked for; None: the whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: Shard | None
    part: Part | None

    @property
    def shape_asked(self) -> tuple[int, ...]:
        """Of what was asked for."""
        return self.part.shape(self.shape) if self.part else self.shape

    @property
    def num_bytes(self) -> int:
        """Of what was asked for, as it is kept."""
        return prod(self.shape_asked) * self.dtype.itemsize

    @property
    def num_bytes_on_device(self) -> int:
        """Of what one device holds of it."""
        return prod(self.shard.shape(self.shape_asked) if self.shard else self.shape_asked) * self.dtype.itemsize


class WeightLoader:
    """Layers say what they expect while the model is built; `load` then streams the checkpoint through once.

    Attributes:
        expected: by checkpoint name, one entry for each layer that asked: a tied head and the embedding both do, and
            each keeps a tensor of its own; linears that are stored stacked ask for a part of one each.
        num_bytes: of the tensors taken so far, in the dtype they are kept in.
    """

    def __init__(self) -> None:
        self.expected: dict[str, list[ExpectedTensor]] = {}
        self.num_bytes = 0
        self._receivers: dict[str, list[tuple[ExpectedTensor, Receiver]]] = {}

    def expect(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        receive: Receiver,
        shard: Shard | None = None,
        part: Part | None = None,
    ) -> None:
        """Ask for the tensor `name` of `shape`, or a part of it; `receive` is called once with it, cast to `dtype`.

        Several may ask for one.
        """
        expected = ExpectedTensor(shape=shape, dtype=dtype, shard=shard, part=part)
        self.expected.setdefault(name, []).append(expected)
        self._receivers.setdefault(name, []).append((expected, receive))

    @property
    def expected_bytes(self) -> int:
        """What one device will hold when everything expected has arrived: `num_bytes` after `load`."""
        return sum(one.num_bytes_on_device for several in self.expected.values() for one in several)

    def check(self, shapes: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
        """Compare what a checkpoint holds, by name, with what is expected.

        Args:
            ignored: patterns (fnmatch) of names that may be there without a place in the model.

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape; all are named together.
        """
        unexpected = [name for name in shapes if name not in self.expected and not _matches(name, ignored)]
        misshapen = [
            f"{name} is {list(shapes[name])}, the configuration makes it {list(wanted)}"
            for name, several in self.expected.items()
            for wanted in dict.fromkeys(one.shape for one in several)
            if name in shapes and shapes[name] != wanted
        ]
        faults = [
            f"{len(names)} {what}: {', '.join(names[:_MOST_NAMED])}{' ...' if len(names) > _MOST_NAMED else ''}"
            for what, names in (
                ("tensors are missing", [name for name in self.expected if name not in shapes]),
                ("tensors have no place in this model", unexpected),
                ("tensors have the wrong shape", misshapen),
            )
            if names
        ]
        if faults:
            raise CheckpointError("The checkpoint does not fit the model. " + "; ".join(faults) + ".")

    def load(self, tensors: Iterable[tuple[str, Tensor]], ignored: Sequence[str] = ()) -> None:
        """Deliver every tensor but those whose name matches a pattern of `ignored`, and let go of who received it.

        Raises:
            CheckpointError: as `check`.
            ConfigError: the layers are shared by several devices.
        """
        if sharded := [name for name, several in self.expected.items() if any(one.shard for one in several)]:
            raise ConfigError(
                f"The model's layers are shared by several devices ({sharded[0]} and {len(sharded) - 1} other tensors "
                "are cut), but only whole tensors are loaded. Set tensor_parallel_size to 1."
            )
        shapes: dict[str, tuple[int, ...]] = {}
        num_bytes_to_trim = 0
        with progress_bar("Loading weights", self.expected_bytes, "B") as bar:
            for name, tensor in tensors:
                shapes[name] = tuple(tensor.shape)
                for expected, receive in self._receivers.pop(name, ()):
                    if shapes[name] == expected.shape:
                        kept = (expected.part.of(tensor) if expected.part else tensor).to(expected.dtype)
                        self.num_bytes += kept.nbytes
                        bar.update(kept.nbytes)
                        receive(kept)
                if self.num_bytes >= num_bytes_to_trim:
                    _return_free_memory()
                    num_bytes_to_trim = self.num_bytes + self.expected_bytes // _NUM_TRIMS
        _return_free_memory()
        self.check(shapes, ignored)


def _return_free_memory() -> None:
    """Give the heap's free pages back to the system, where the C library can.

    What a linear needs only while it is prepared is freed between what is kept. glibc holds on to such holes and does
    not reuse one for an aligned block of the same size, so that they grow to a fifth of the weights.
    """
    if trim := getattr(ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim", None):
        trim(0)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
