"""Random linears as SqueezeLLM stores them, packed and decoded here bit by bit with numpy, apart from the plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.builtin.torch_linear import TorchPacked
from octavo.interfaces import LinearKernels, LinearShape, StoredLinear, TensorHeader
from octavo.testing import StoredWeight
from octavo.testing.stored_weight import PREFIX
from octavo_quant_squeezellm.method import SqueezeLLMMethod

Array = npt.NDArray[np.generic]


def pack(codes: Array, bits: int) -> Array:
    """[in_features, out_features] -> [in_features * bits / 32, out_features] int32, one stream of bits an output."""
    in_features, out_features = codes.shape
    stream = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    octets = np.packbits(stream.reshape(in_features * bits, out_features).astype(np.uint8), axis=0, bitorder="little")
    return octets.T.copy().view("<i4").T.copy()


def unpack(words: Array, bits: int) -> Array:
    """The inverse of `pack`."""
    octets = words.T.copy().view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(octets), -1, bits)
    return (stream * (1 << np.arange(bits))).sum(-1).T


def decode(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """[out_features, in_features] float32, by the format's definition, worked out in float64."""
    codes = unpack(tensors["qweight"].numpy(), bits).T
    weight = np.take_along_axis(tensors["lookup_table"].double().numpy(), codes, axis=1)
    if "rows" in tensors:
        rows, cols, vals = (tensors[name].double().tolist() for name in ("rows", "cols", "vals"))
        for output in range(len(weight)):
            for entry in range(int(rows[output]), int(rows[output + 1])):
                weight[output, int(cols[entry])] += vals[entry]
    if "full_rows" in tensors:
        for column, output in enumerate(tensors["full_row_indices"].tolist()):
            weight[output] += tensors["full_rows"][:, column].double().numpy()
    return torch.from_numpy(weight.astype(np.float32))


def random_tensors(
    shape: LinearShape,
    bits: int,
    generator: torch.Generator,
    *,
    density: float | None = None,
    num_full: int = 0,
    dtype: torch.dtype = torch.float32,
    balanced: bool = False,
    bias: bool = False,
) -> dict[str, Tensor]:
    """By the suffix of their names.

    Args:
        density: share of outliers; None: dense. num_full: outputs that are whole among the outliers.
        dtype: of codebooks and outliers. balanced: with startrows.
    """
    codes = torch.randint(0, 2**bits, (shape.in_features, shape.out_features), generator=generator)
    tensors = {
        "qweight": torch.from_numpy(pack(codes.numpy(), bits)),
        "lookup_table": torch.randn(shape.out_features, 2**bits, generator=generator).to(dtype),
    }
    if density is not None:
        there = torch.rand(shape.out_features, shape.in_features, generator=generator) < density
        outputs, cols = there.nonzero().T
        tensors["rows"] = torch.nn.functional.pad(
            outputs.bincount(minlength=shape.out_features).cumsum(0), (1, 0)
        ).int()
        tensors["cols"] = cols.int()
        tensors["vals"] = (3 * torch.randn(len(cols), generator=generator)).to(dtype)
    if balanced:
        tensors["startrows"] = torch.arange(8, dtype=torch.int32)
    if num_full:
        outputs = torch.randperm(shape.out_features, generator=generator)[:num_full]
        tensors["full_rows"] = torch.randn(shape.in_features, len(outputs), generator=generator).to(dtype)
        tensors["full_row_indices"] = outputs.int()
    if bias:
        tensors["bias"] = torch.randn(shape.out_features, generator=generator)
    return tensors


def store(
    bits: int,
    *,
    density: float | None = None,
    num_full: int = 0,
    dtype: torch.dtype = torch.float32,
    balanced: bool = False,
    bias: bool = False,
) -> Callable[[LinearShape, torch.Generator], StoredWeight]:
    """What QuantizationSuite makes its linears with."""

    def make(shape: LinearShape, generator: torch.Generator) -> StoredWeight:
        tensors = random_tensors(
            shape, bits, generator, density=density, num_full=num_full, dtype=dtype, balanced=balanced, bias=bias
        )
        return StoredWeight(tensors=tensors, weight=decode(tensors, bits))

    return make


def method_of(
    headers: Mapping[str, TensorHeader], config: Mapping[str, object] | None = None, dtype: torch.dtype = torch.float32
) -> SqueezeLLMMethod:
    """The method of a checkpoint with these headers, and the reference kernel."""
    kernels = LinearKernels({"torch-packed": TorchPacked(dtype, "cpu")})
    return SqueezeLLMMethod(config or {"quant_method": "squeezellm"}, dtype, "cpu", headers, kernels)


def stored_linear(tensors: Mapping[str, Tensor], shape: LinearShape, prefix: str = PREFIX) -> StoredLinear:
    """A whole linear as the loader hands it over."""
    named = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    return StoredLinear(prefix=prefix, shape=shape, tensors=named)


def share_of(
    whole: StoredLinear, method: SqueezeLLMMethod, axis_name: str, index: int, num_shards: int
) -> StoredLinear:
    """A device's share: tensors cut along their declared axis, the others whole."""
    tensors = dict(whole.tensors)
    for spec in method.parameters(whole.prefix, whole.shape):
        if (axis := getattr(spec, axis_name)) is not None:
            assert spec.shape[axis] % (num_shards * spec.pack_elements) == 0
            tensors[spec.name] = tensors[spec.name].chunk(num_shards, dim=axis)[index].contiguous()
    if axis_name == "output_axis":
        size = whole.shape.out_features // num_shards
        return replace(whole, tensors=tensors, shape=replace(whole.shape, out_features=size), output_start=index * size)
    size = whole.shape.in_features // num_shards
    return replace(whole, tensors=tensors, shape=replace(whole.shape, in_features=size), input_start=index * size)
