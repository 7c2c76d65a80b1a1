"""QuantizationMethod socket: how a linear's weights lie in the checkpoint, and how they are multiplied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.interfaces.checkpoint import TensorHeader


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """y = x @ W.T: x [num_tokens, in_features], W [out_features, in_features]."""

    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterSpec:
    """One tensor of a linear in the checkpoint.

    Attributes:
        name: suffix of the checkpoint name: "weight", "qweight", "scales".
        shape: as stored.
        dtype: as stored; None accepts any floating dtype and casts to the model's.
        output_axis, input_axis: which axis runs over out_features or in_features (it may be cut there when
            the linear is sharded); None when it has no such axis.
        pack_factor: how many values one element holds along the packed axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    output_axis: int | None = None
    input_axis: int | None = None
    pack_factor: int = 1


class QuantizationMethod(ABC):
    """Declares parameters, prepares them for the device once, multiplies with them at every step.

    Constructed once with the checkpoint's quantization_config ({} for plain weights), the model's dtype and device, and
    what the checkpoint's headers say of its tensors.

    Attributes:
        can_stack: whether several linears that read one input may be prepared as one.
        headers: by name; {} when no weights are there yet.
    """

    can_stack: bool = False

    def __init__(
        self,
        quantization_config: Mapping[str, object],
        dtype: torch.dtype,
        device: str,
        headers: Mapping[str, TensorHeader],
    ) -> None:
        self.quantization_config = quantization_config
        self.dtype = dtype
        self.device = device
        self.headers = headers

    def quantizes(self, prefix: str) -> bool:
        """Whether the linear of this checkpoint name is the method's; else it is plain weights, which the core reads.

        The tensors decide, where there are headers: a configuration may say less than what was done.
        """
        return True

    @abstractmethod
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        """The tensors the checkpoint holds for the linear named `prefix`.

        Raises:
            CheckpointError: the configuration says otherwise than the headers; names the tensor and both facts.
        """

    @abstractmethod
    def prepare(self, shape: LinearShape, parts: Sequence[Mapping[str, Tensor]]) -> object:
        """Turn checkpoint tensors (one mapping for each stacked part) into what `apply` reads; called once.

        `shape.out_features` is the sum over the parts.
        """

    @abstractmethod
    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features], the model's dtype."""

    @abstractmethod
    def dequantize(self, shape: LinearShape, tensors: Mapping[str, Tensor]) -> Tensor:
        """The plain reference: [out_features, in_features] float32."""
