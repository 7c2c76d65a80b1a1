"""QuantizationMethod socket: how a linear's weights lie in the checkpoint, and how they are multiplied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.interfaces.checkpoint import TensorHeader
from octavo.interfaces.linear_kernel import LinearKernels, PackedWeight, PreparedLinear, WeightFacts


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
        pack_factor: how many values `pack_elements` elements hold along the packed axis, which is never cut between
            these elements: 3-bit codes lie 32 in 3 words.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    output_axis: int | None = None
    input_axis: int | None = None
    pack_factor: int = 1
    pack_elements: int = 1

    def values_of_a_block(self, axis: int, num_features: int) -> int:
        """Of `axis`, which runs over so many features: those that a cut must not part; 1 where it is not packed."""
        packed = self.shape[axis] == -(-num_features * self.pack_elements // self.pack_factor)
        return self.pack_factor if packed else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLinear:
    """The tensors of one linear, as a checkpoint stores them; or one device's share of them.

    Attributes:
        prefix: its checkpoint name without the parameters' suffixes.
        shape: of the linear that these tensors are: a device's share of it.
        tensors: by the suffix of their names. Those that may be cut along the share's axis are the share's; the others,
            such as the scales of groups in an order of their own, are whole.
        output_start, input_start: where the share begins in the whole linear.
    """

    prefix: str
    shape: LinearShape
    tensors: Mapping[str, Tensor]
    output_start: int = 0
    input_start: int = 0

    def to(self, device: str) -> StoredLinear:
        """The same on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


class QuantizationMethod(ABC):
    """Declares a linear's parameters, and either says what they mean or multiplies with them itself.

    A method whose spec names a `weight_form` gives `facts` and `weight`; the linear kernels that were chosen for this
    form multiply. One that multiplies itself has `prepare`, `apply` and `dequantize` of its own.

    Constructed once with the checkpoint's quantization_config ({} for plain weights), the model's dtype and device,
    what the checkpoint's headers say of its tensors, and the kernels.

    Attributes:
        can_stack: whether several linears that read one input may be prepared as one.
        headers: by name; {} when no weights are there yet.
        kernels: of its weight form; none when it has no form.
    """

    can_stack: bool = True

    def __init__(
        self,
        quantization_config: Mapping[str, object],
        dtype: torch.dtype,
        device: str,
        headers: Mapping[str, TensorHeader],
        kernels: LinearKernels,
    ) -> None:
        self.quantization_config = quantization_config
        self.dtype = dtype
        self.device = device
        self.headers = headers
        self.kernels = kernels

    def quantizes(self, prefix: str) -> bool:
        """Whether the linear of this checkpoint name is the method's; else it is plain weights, which the core reads.

        The tensors decide, where there are headers: a configuration may say less than what was done.
        """
        return True

    @abstractmethod
    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        """The tensors the checkpoint holds for the linear named `prefix`.

        A "bias" among them is added to the product, also where the model has none.

        Raises:
            CheckpointError: the configuration says otherwise than the headers; names the tensor and both facts.
        """

    def facts(self, prefix: str, shape: LinearShape) -> WeightFacts | None:
        """What the linear's weight will be, from configuration and headers; None: the method multiplies itself."""
        return None

    def weight(self, stored: StoredLinear) -> PackedWeight:
        """What a linear's tensors mean.

        Raises:
            CheckpointError: they contradict each other; names the tensor and both facts.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither weight() nor a product of its own")

    def prepare(self, parts: Sequence[StoredLinear]) -> object:
        """Turn the tensors of a linear, or of several stacked ones, into what `apply` reads; called once."""
        return self.kernels.prepare([self.weight(part.to(self.device)) for part in parts])

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features], the model's dtype."""
        assert isinstance(prepared, PreparedLinear)
        return prepared(x, bias)

    def dequantize(self, stored: StoredLinear) -> Tensor:
        """The plain reference: [out_features, in_features] float32."""
        return self.weight(stored).dequantize()
