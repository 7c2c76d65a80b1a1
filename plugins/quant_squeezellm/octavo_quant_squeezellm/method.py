"""SqueezeLLM: what the tensors of its checkpoints mean. Linear kernels multiply with them.

W[n, k] = lookup_table[n, code[n, k]] + S[n, k]. The tool has taken from S what the code of an outlier stands for, so
both are added.

Source: Kim et al. 2023, SqueezeLLM: Dense-and-Sparse Quantization, arXiv:2306.07629.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from octavo.errors import CheckpointError
from octavo.interfaces import (
    SAFETENSORS_DTYPES,
    LinearShape,
    LookupWeight,
    ParameterSpec,
    QuantizationMethod,
    StoredLinear,
    TensorHeader,
    WeightFacts,
)
from octavo.packing import unpack_rows, whole_words
from octavo_quant_squeezellm.headers import (
    CODES_PER_BLOCK,
    bits_of,
    check,
    configured_bits,
    headers_of,
    whole_shape,
)
from octavo_quant_squeezellm.outliers import outliers_of

_CUT = ("qweight", "lookup_table")
"""Where devices share a linear, these are cut; all others are whole, and each device takes its share of them."""


class SqueezeLLMMethod(QuantizationMethod):
    """Codebooks of 8 or 16 values for each output, dense, with sparse outliers, or with whole outputs beside them.

    Whether a linear is quantized, its bits and its outliers are what the tensors say.
    """

    def quantizes(self, prefix: str) -> bool:
        if self.headers:
            return bool(headers_of(prefix, self.headers))
        return any(part.isdigit() for part in prefix.split("."))  # the tool quantizes what lies in layers

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        found = self._headers(prefix, shape)
        check(prefix, shape.in_features, found, configured_bits(self.quantization_config))
        bits = bits_of(prefix, found)
        pack_factor, pack_elements = whole_words(bits)
        specs = [
            ParameterSpec(
                name="qweight",
                shape=(shape.in_features // CODES_PER_BLOCK * bits, shape.out_features),
                dtype=torch.int32,
                output_axis=1,
                input_axis=0,
                pack_factor=pack_factor,
                pack_elements=pack_elements,
            ),
            ParameterSpec(
                name="lookup_table",
                shape=(shape.out_features, 2**bits),
                dtype=_torch_dtype(found["lookup_table"]),
                output_axis=0,
            ),
        ]
        specs += [
            ParameterSpec(name=name, shape=header.shape, dtype=_torch_dtype(header))
            for name, header in found.items()
            if name not in _CUT
        ]
        if f"{prefix}.bias" in self.headers:
            specs.append(ParameterSpec(name="bias", shape=(shape.out_features,), output_axis=0))
        return tuple(specs)

    def facts(self, prefix: str, shape: LinearShape) -> WeightFacts:
        found = self._headers(prefix, shape)
        return WeightFacts(
            form="lookup",
            bits=bits_of(prefix, found),
            in_features=shape.in_features,
            out_features=shape.out_features,
            group_size=shape.in_features,
            outliers=sum(prod(found[name].shape) for name in ("vals", "full_rows") if name in found),
        )

    def weight(self, stored: StoredLinear) -> LookupWeight:
        found = headers_of(stored.prefix, self.headers)
        bits = bits_of(stored.prefix, found)
        return LookupWeight(
            bits=bits,
            codes=unpack_rows(stored.tensors["qweight"], bits, stored.shape.in_features).T,
            table=stored.tensors["lookup_table"].float(),
            outliers=outliers_of(stored, whole_shape(stored.prefix, found)),
        )

    def _headers(self, prefix: str, shape: LinearShape) -> Mapping[str, TensorHeader]:
        """Of one linear; where no weights are there yet, what a dense one's would be."""
        if self.headers:
            return headers_of(prefix, self.headers)
        said_bits = configured_bits(self.quantization_config)
        if said_bits is None:
            raise CheckpointError(
                "The quantization configuration does not say how many bits SqueezeLLM's codes have, and no weights are "
                'here to tell it. Write {"wbits": 4} into quant_config.json, or fetch the weights.'
            )
        shapes = {
            "qweight": (shape.in_features // CODES_PER_BLOCK * said_bits, shape.out_features),
            "lookup_table": (shape.out_features, 2**said_bits),
        }
        return {name: _header_of_4_byte_numbers(name, each) for name, each in shapes.items()}


def _header_of_4_byte_numbers(name: str, shape: tuple[int, int]) -> TensorHeader:
    return TensorHeader(shape=shape, dtype="I32" if name == "qweight" else "F32", num_bytes=4 * shape[0] * shape[1])


def _torch_dtype(header: TensorHeader) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, SAFETENSORS_DTYPES[header.dtype])
    return dtype
