"""Two small quantization methods that are right, one of floats and one of packed integers, and cases of the second."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.interfaces import (
    AffineWeight,
    LinearShape,
    ParameterSpec,
    QuantizationMethod,
    StoredLinear,
    WeightFacts,
)
from octavo.packing import pack_columns, pack_rows, unpack_columns, unpack_rows, words_for
from octavo.testing import QuantizationCase, StoredWeight


class PlainMethod(QuantizationMethod):
    """Dense float weights, which it multiplies with itself."""

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        return (
            ParameterSpec(name="weight", shape=(shape.out_features, shape.in_features), output_axis=0, input_axis=1),
        )

    def prepare(self, parts: Sequence[StoredLinear]) -> object:
        return torch.cat([part.tensors["weight"] for part in parts])

    def apply(self, prepared: object, x: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared, Tensor)
        y = x @ prepared.T
        return y if bias is None else y + bias

    def dequantize(self, stored: StoredLinear) -> Tensor:
        return stored.tensors["weight"].float()


# Codes are packed along the inputs, zeros along the outputs and one too small; groups of 16 inputs, or of 64, the last
# of which may be shorter; with "act_order" the group of each input is stored.
def _config(bits: int = 4, group_size: int = 16, **more: bool) -> dict[str, object]:
    return {"quant_method": "small", "bits": bits, "group_size": group_size, **more}


def _case(name: str, config: dict[str, object], shape: LinearShape, *, bias: bool = False) -> QuantizationCase:
    def store(shape: LinearShape, generator: torch.Generator) -> StoredWeight:
        bits, group_size = int(str(config["bits"])), int(str(config["group_size"]))
        rows, columns = shape.out_features, shape.in_features
        num_groups = -(-columns // group_size)
        groups = torch.arange(columns) // group_size
        if config.get("act_order"):
            groups = groups[torch.randperm(columns, generator=generator)]
        codes = torch.randint(0, 2**bits, (columns, rows), generator=generator)
        zeros = torch.randint(1, 2**bits, (num_groups, rows), generator=generator)
        scales = (torch.rand(num_groups, rows, generator=generator) + 0.1).half()
        tensors = {"qweight": pack_rows(codes, bits), "scales": scales}
        if config.get("symmetric"):
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        else:
            tensors["qzeros"] = pack_columns(zeros - 1, bits)
        if config.get("act_order"):
            tensors["g_idx"] = groups.int()
        if bias:
            tensors["bias"] = torch.randn(rows, generator=generator).half()
        return StoredWeight(tensors=tensors, weight=((codes - zeros[groups]) * scales.float()[groups]).T.contiguous())

    return QuantizationCase(name=name, store=store, config=config, shape=shape)


CASES = [
    _case("4 bits", _config(), LinearShape(in_features=128, out_features=64)),
    _case("4 bits, act-order", _config(act_order=True), LinearShape(in_features=64, out_features=32)),
    _case("3 bits, biases", _config(bits=3), LinearShape(in_features=64, out_features=128), bias=True),
    _case("short group", _config(group_size=64, symmetric=True), LinearShape(in_features=160, out_features=32)),
]


class SmallMethod(QuantizationMethod):
    """weight[k, n] = (q[k, n] - zeros[g(k), n]) * scales[g(k), n]; a linear kernel multiplies."""

    @property
    def bits(self) -> int:
        return int(str(self.quantization_config["bits"]))

    @property
    def group_size(self) -> int:
        return int(str(self.quantization_config["group_size"]))

    @property
    def act_order(self) -> bool:
        return bool(self.quantization_config.get("act_order"))

    @property
    def symmetric(self) -> bool:
        return bool(self.quantization_config.get("symmetric"))

    def quantizes(self, prefix: str) -> bool:
        return not self.headers or f"{prefix}.qweight" in self.headers

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        rows, columns, bits = shape.out_features, shape.in_features, self.bits
        num_groups = -(-columns // self.group_size)
        packed = {"pack_factor": 32 // bits if 32 % bits == 0 else 32, "pack_elements": 1 if 32 % bits == 0 else bits}
        cut = None if self.act_order or columns % self.group_size else 0
        specs = [
            ParameterSpec(
                name="qweight",
                shape=(words_for(columns, bits), rows),
                dtype=torch.int32,
                output_axis=1,
                input_axis=0,
                **packed,
            ),
            ParameterSpec(name="scales", shape=(num_groups, rows), dtype=torch.float16, output_axis=1, input_axis=cut),
        ]
        if not self.symmetric:
            words = words_for(rows, bits)
            specs.append(
                ParameterSpec(
                    name="qzeros",
                    shape=(num_groups, words),
                    dtype=torch.int32,
                    output_axis=1,
                    input_axis=cut,
                    **packed,
                )
            )
        if self.act_order:
            specs.append(ParameterSpec(name="g_idx", shape=(columns,), dtype=torch.int32, input_axis=0))
        if f"{prefix}.bias" in self.headers:
            specs.append(ParameterSpec(name="bias", shape=(rows,), output_axis=0))
        return tuple(specs)

    def facts(self, prefix: str, shape: LinearShape) -> WeightFacts | None:
        return WeightFacts(
            form="affine",
            bits=self.bits,
            in_features=shape.in_features,
            out_features=shape.out_features,
            group_size=min(self.group_size, shape.in_features),
            act_order=self.act_order,
            symmetric=self.symmetric,
        )

    def weight(self, stored: StoredLinear) -> AffineWeight:
        return AffineWeight(
            bits=self.bits,
            codes=self.codes(stored).T.contiguous(),
            scales=stored.tensors["scales"],
            zeros=self.zeros(stored),
            group_size=self.group_size,
            group_index=self.groups(stored),
        )

    def codes(self, stored: StoredLinear) -> Tensor:
        """[in_features, out_features]."""
        return unpack_rows(stored.tensors["qweight"], self.bits, stored.shape.in_features)

    def zeros(self, stored: StoredLinear) -> Tensor | None:
        if self.symmetric:
            return None
        return unpack_columns(stored.tensors["qzeros"], self.bits, stored.shape.out_features) + 1

    def groups(self, stored: StoredLinear) -> Tensor | None:
        if self.act_order:
            return stored.tensors["g_idx"]
        needed = -(-stored.shape.in_features // self.group_size)
        return self.groups_of_a_share(stored) if len(stored.tensors["scales"]) > needed else None

    def groups_of_a_share(self, stored: StoredLinear) -> Tensor:
        inputs = stored.input_start + torch.arange(stored.shape.in_features)
        return (inputs // self.group_size).int()
