"""Linear layers: a quantization method's product, then the bias; one linear or several that read one input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.interfaces.linear_kernel import WeightFacts
from octavo.interfaces.lora import LoraBackend, LoraPart
from octavo.interfaces.quantization import LinearShape, ParameterSpec, QuantizationMethod, StoredLinear
from octavo.nn.weights import Part, Receiver, Shard, WeightLoader

_BIAS = "bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Where a linear lies when the checkpoint holds several of one input as one, their outputs behind each other.

    Attributes:
        prefix: the whole's checkpoint name without the parameter's suffix.
        offset: outputs of the whole before this linear's own.
        out_features: of the whole.
    """

    prefix: str
    offset: int
    out_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPart:
    """One linear of the checkpoint, and how devices share it.

    Attributes:
        prefix: its checkpoint name without the parameter's suffix.
        in_features, out_features: of the whole.
        parallel: "column": each device has some of the outputs; "row": some of the inputs, and the products are summed.
        num_shards: into how many it is cut; fewer than there are devices when several hold the same.
        padded: whether the last shard may be padded; else the features must divide.
        stack: the larger linear of the checkpoint that it is a part of; None: it is one of its own.

    Source: Shoeybi et al. 2019, Megatron-LM, arXiv:1909.08053, section 3.
    """

    prefix: str
    in_features: int
    out_features: int
    parallel: Literal["column", "row"] = "column"
    num_shards: int = 1
    padded: bool = False
    stack: Stack | None = None

    @property
    def stored_prefix(self) -> str:
        """Of the checkpoint's tensors: the larger linear's, when it is a part of one."""
        return self.prefix if self.stack is None else self.stack.prefix

    @property
    def lora(self) -> LoraPart:
        """What one device computes of the module that adapters know: of the larger linear, when it is a part of one."""
        shape = self.shape_of_one
        return LoraPart(
            module=self.stored_prefix,
            in_features=shape.in_features,
            out_features=shape.out_features,
            output_start=0 if self.stack is None else self.stack.offset,
        )

    @property
    def shape(self) -> LinearShape:
        return LinearShape(in_features=self.in_features, out_features=self.out_features)

    @property
    def shape_of_one(self) -> LinearShape:
        """Of the linear that one device computes."""
        in_features, out_features = self.in_features, self.out_features
        if self.parallel == "column":
            out_features = -(-out_features // self.num_shards)
        else:
            in_features = -(-in_features // self.num_shards)
        return LinearShape(in_features=in_features, out_features=out_features)

    def expect(self, loader: WeightLoader, spec: ParameterSpec, dtype: torch.dtype, receive: Receiver) -> None:
        """Ask `loader` for one of its tensors.

        Raises:
            ConfigError: as `shard`.
        """
        shard = self.shard(spec)
        if self.stack is None:
            loader.expect(f"{self.prefix}.{spec.name}", spec.shape, dtype, receive, shard)
            return
        whole, part = list(spec.shape), None
        if (axis := spec.output_axis) is not None:
            size = whole[axis]  # elements of the tensor: several outputs are packed in each, or one is
            whole[axis] = size * self.stack.out_features // self.out_features
            part = Part(axis=axis, start=size * self.stack.offset // self.out_features, size=size)
        loader.expect(f"{self.stack.prefix}.{spec.name}", tuple(whole), dtype, receive, shard, part)

    def num_bytes(self, spec: ParameterSpec, dtype: torch.dtype) -> int:
        """That one device holds of one of its tensors, kept in `dtype` where the method accepts any."""
        shard = self.shard(spec)
        return prod(shard.shape(spec.shape) if shard else spec.shape) * (spec.dtype or dtype).itemsize

    def shard(self, spec: ParameterSpec) -> Shard | None:
        """How devices share one of its tensors; None: each holds the whole.

        Raises:
            ConfigError: the tensor cannot be cut into parts of one size.
        """
        axis = spec.output_axis if self.parallel == "column" else spec.input_axis
        if axis is None or self.num_shards == 1:
            return None
        features, side = (self.out_features, "outputs") if self.parallel == "column" else (self.in_features, "inputs")
        parted = features % (self.num_shards * spec.values_of_a_block(axis, features))
        if (parted or spec.shape[axis] % self.num_shards) and not self.padded:
            each = "each" if spec.pack_elements == 1 else f"every {spec.pack_elements}"
            packed = f", {spec.pack_factor} values in {each}" if spec.pack_factor > 1 else ""
            raise ConfigError(
                f"{self.prefix}.{spec.name} cannot be cut into {self.num_shards} equal parts: its {features} {side} "
                f"are stored as {spec.shape[axis]} elements{packed}."
            )
        return Shard(axis=axis, num_shards=self.num_shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPart:
    """Linears of one input whose product a linear kernel computes at once, as one device holds them.

    Attributes:
        prefixes: their checkpoint names.
        facts: of their weights, joined.
        stored_bytes: of their tensors in the checkpoint, without the bias.
    """

    prefixes: tuple[str, ...]
    facts: WeightFacts
    stored_bytes: int

    def join(self, other: PackedPart) -> PackedPart | None:
        """Both; None: their weights cannot be one."""
        if (facts := self.facts.join(other.facts)) is None:
            return None
        stored_bytes = self.stored_bytes + other.stored_bytes
        return PackedPart(prefixes=self.prefixes + other.prefixes, facts=facts, stored_bytes=stored_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """A linear's or an embedding's slot for LoRA adapters, and who fills it."""

    backend: LoraBackend
    slot: object


class Linear:
    """y = x @ W.T + b, W being one or more parts of one input, stacked along out_features.

    x [num_tokens, in_features] -> [num_tokens, sum(out_features)]. The tensors arrive through the loader in any
    order; with the last one the method prepares them for the device and the checkpoint's copies are let go.
    Each row's LoRA adapter is added to the product, before the bias.

    Attributes:
        packed: of its parts, those that linear kernels compute.
    """

    def __init__(
        self,
        method: QuantizationMethod,
        loader: WeightLoader,
        parts: Sequence[LinearPart],
        *,
        bias: bool,
        adapters: Adapters | None = None,
    ) -> None:
        self._method = method
        self._adapters = adapters
        self._parts: list[tuple[LinearPart, dict[str, Tensor]]] = [(part, {}) for part in parts]
        self.packed: list[PackedPart] = []
        self._num_awaited = 0
        self._prepared: object = None
        self._bias: Tensor | None = None
        for part, tensors in self._parts:
            specs = method.parameters(part.stored_prefix, part.shape)
            if (facts := method.facts(part.stored_prefix, part.shape_of_one)) is not None:
                stored_bytes = sum(part.num_bytes(spec, method.dtype) for spec in specs if spec.name != _BIAS)
                self._pack(PackedPart(prefixes=(part.prefix,), facts=facts, stored_bytes=stored_bytes))
            if bias and all(spec.name != _BIAS for spec in specs):
                specs = (*specs, ParameterSpec(name=_BIAS, shape=(part.out_features,), output_axis=0))
            for spec in specs:
                self._num_awaited += 1
                part.expect(loader, spec, spec.dtype or method.dtype, self._receiver(tensors, spec.name))

    def __call__(self, x: Tensor) -> Tensor:
        adapters = self._adapters
        if adapters is None or not adapters.backend.active:
            return self._method.apply(self._prepared, x, self._bias)
        output = adapters.backend.apply(adapters.slot, x, self._method.apply(self._prepared, x, None))
        return output if self._bias is None else output + self._bias

    def _pack(self, part: PackedPart) -> None:
        joined = self.packed[-1].join(part) if self.packed else None
        self.packed[-1:] = [*self.packed[-1:], part] if joined is None else [joined]

    def _receiver(self, tensors: dict[str, Tensor], name: str) -> Receiver:
        def receive(tensor: Tensor) -> None:
            tensors[name] = tensor
            self._num_awaited -= 1
            if self._num_awaited == 0:
                self._prepare()

        return receive

    def _prepare(self) -> None:
        biases = [tensors.pop(_BIAS, None) for _, tensors in self._parts]
        if any(bias is not None for bias in biases):
            self._bias = torch.cat(
                [
                    torch.zeros(part.out_features) if bias is None else bias
                    for bias, (part, _) in zip(biases, self._parts, strict=True)
                ]
            ).to(self._method.device, self._method.dtype)
        self._prepared = self._method.prepare(
            [
                StoredLinear(
                    prefix=part.stored_prefix,
                    shape=part.shape_of_one,
                    tensors=tensors,
                    output_start=0 if part.stack is None else part.stack.offset,
                )
                for part, tensors in self._parts
            ]
        )
        self._parts = []


class StackedLinear:
    """Projections of one input as one product, or one by one when the method cannot stack them."""

    def __init__(self, linears: Sequence[Linear], sizes: Sequence[int]) -> None:
        self._linears = linears
        self._sizes = list(sizes)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if len(self._linears) == 1:
            return torch.split(self._linears[0](x), self._sizes, dim=-1)
        return tuple(linear(x) for linear in self._linears)
