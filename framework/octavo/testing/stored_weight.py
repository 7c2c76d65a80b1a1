"""What QuantizationSuite stores a random linear as, and how it hands it to a method: as the loader would."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from octavo.interfaces.checkpoint import SAFETENSORS_DTYPES, TensorHeader
from octavo.interfaces.quantization import LinearShape, ParameterSpec, QuantizationMethod, StoredLinear

PREFIX = "model.layers.0.mlp.up_proj"
PART_PREFIXES = tuple(f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v"))
"""Of a stack."""

_BIAS = "bias"
_NAMES_OF_DTYPES = {
    getattr(torch, theirs): name for name, theirs in SAFETENSORS_DTYPES.items() if hasattr(torch, theirs)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredWeight:
    """A linear as a checkpoint stores it, and the weight that this means.

    Attributes:
        tensors: by the suffix of their names: "weight", "qweight", "scales".
        weight: [out_features, in_features] float32, what they mean by the format's definition; worked out by the
            test, not by the method under test.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor

    @property
    def shape(self) -> LinearShape:
        return LinearShape(in_features=self.weight.shape[1], out_features=self.weight.shape[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationCase:
    """One kind of checkpoint that the method reads.

    Attributes:
        config: the checkpoint's quantization_config; {} for plain weights.
        store: makes a random linear of a shape. It is also asked for multiples and halves of `shape`.
        shape: in_features and out_features differ, and their halves can be stored too.
    """

    name: str
    store: Callable[[LinearShape, torch.Generator], StoredWeight]
    config: Mapping[str, object] = field(default_factory=dict)
    shape: LinearShape = LinearShape(in_features=128, out_features=96)  # noqa: RUF009

    @property
    def half_output(self) -> LinearShape:
        return replace(self.shape, out_features=self.shape.out_features // 2)

    @property
    def half_input(self) -> LinearShape:
        return replace(self.shape, in_features=self.shape.in_features // 2)

    def stored(self, shape: LinearShape | None = None, seed: int = 0) -> StoredWeight:
        """A linear, the same for each call with a shape and seed."""
        return self.store(shape or self.shape, torch.Generator().manual_seed(seed))

    def parts(self, seeds: Sequence[int]) -> list[StoredWeight]:
        """Of a stack: once, twice and three times as many outputs, so that no part can be taken for another."""
        shapes = [replace(self.shape, out_features=times * self.shape.out_features) for times in (1, 2, 3)]
        return [self.stored(shape, seed) for shape, seed in zip(shapes, seeds, strict=True)]


def store_plain(shape: LinearShape, generator: torch.Generator) -> StoredWeight:
    """Weights as floats, in format "none"."""
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator)
    return StoredWeight(tensors={"weight": weight}, weight=weight)


def headers_of(tensors: Mapping[str, Tensor], prefix: str = PREFIX) -> dict[str, TensorHeader]:
    """What a safetensors file says of a linear's tensors."""
    return {
        f"{prefix}.{name}": TensorHeader(
            shape=tuple(tensor.shape), dtype=_NAMES_OF_DTYPES[tensor.dtype], num_bytes=tensor.nbytes
        )
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedLinear:
    """A method made for one checkpoint, and a linear of it as the loader hands it over.

    Attributes:
        case: the checkpoint's. stored: what lies in it.
        tolerance: largest error of y = x @ W.T + b, as a share of |x| @ |W|.T + |b|.
    """

    case: QuantizationCase
    stored: StoredWeight
    method: QuantizationMethod
    tolerance: float
    prefix: str = PREFIX

    def __str__(self) -> str:
        return f"{self.case.name}, {self.method.dtype}"

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        return self.method.parameters(self.prefix, self.stored.shape)

    @property
    def rounding(self) -> float:
        """Of a dequantised weight: float32's, or the model's dtype's where a tensor is cast to it."""
        casts = any(spec.dtype is None and spec.name != _BIAS for spec in self.parameters)
        eps = torch.finfo(self.method.dtype if casts else torch.float32).eps
        return eps * self.stored.weight.abs().max().item()

    def linear(self) -> StoredLinear:
        """Copies of its tensors: those of any dtype in the model's, the others as they are stored; not the bias."""
        any_dtype = {spec.name for spec in self.parameters if spec.dtype is None}
        tensors = {
            name: tensor.to(self.method.dtype, copy=True) if name in any_dtype else tensor.clone()
            for name, tensor in self.stored.tensors.items()
            if name != _BIAS
        }
        return StoredLinear(prefix=self.prefix, shape=self.stored.shape, tensors=tensors)

    def share(self, axis_name: str, index: int) -> StoredLinear:
        """The first or the second half along "output_axis" or "input_axis", as a device gets it."""
        linear, shape = self.linear(), self.stored.shape
        tensors = dict(linear.tensors)
        num_features = shape.out_features if axis_name == "output_axis" else shape.in_features
        for spec in self.parameters:
            axis = getattr(spec, axis_name)
            if axis is not None and spec.name in tensors:
                block = spec.values_of_a_block(axis, num_features)
                whole = num_features % (2 * block) == 0 == spec.shape[axis] % 2
                assert whole, (
                    f"{self}: {spec.name} {spec.shape} cannot be halved along axis {axis}; give the case another shape"
                )
                tensors[spec.name] = tensors[spec.name].chunk(2, dim=axis)[index].contiguous()
        half = self.case.half_output if axis_name == "output_axis" else self.case.half_input
        return replace(
            linear,
            shape=half,
            tensors=tensors,
            output_start=index * half.out_features if axis_name == "output_axis" else 0,
            input_start=index * half.in_features if axis_name == "input_axis" else 0,
        )

    def x(self, num_rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(num_rows)
        return torch.randn(num_rows, self.stored.shape.in_features, generator=generator).to(
            self.method.device, self.method.dtype
        )

    def bias(self, out_features: int) -> Tensor:
        return torch.linspace(-2, 2, out_features).to(self.method.device, self.method.dtype)

    def apply(self, prepared: object, num_rows: int = 17) -> Tensor:
        return self.method.apply(prepared, self.x(num_rows), None)

    def check(self, prepared: object, weight: Tensor, num_rows: int, *, bias: bool) -> None:
        """Compare the product with this weight's, in float64."""
        out_features, in_features = weight.shape
        x, b = self.x(num_rows)[:, :in_features].contiguous(), self.bias(out_features) if bias else None
        y = self.method.apply(prepared, x, b)
        where = f"{self}, {num_rows} row(s)"
        assert y.dtype == self.method.dtype, f"{where}: the product is {y.dtype}"
        assert y.shape == (num_rows, out_features), f"{where}: [num_tokens, out_features] is wanted"
        check_product(y, x, weight, b, self.tolerance, where)


def check_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tolerance: float, where: str) -> None:
    """Compare y with x @ weight.T + bias in float64.

    Args:
        tolerance: largest error, as a share of |x| @ |weight|.T + |bias|.
    """
    y, x, weight = (tensor.cpu().double() for tensor in (y, x, weight))
    wanted, bound = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        wanted, bound = wanted + bias.cpu().double(), bound + bias.cpu().double().abs()
    share = ((y - wanted).abs() / bound.clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(nan=math.inf)
    largest = share.max().item() if share.numel() else 0.0
    assert largest <= tolerance, f"{where}: wrong by {largest:.2g} of |x| @ |W|.T, allowed is {tolerance:g}"
