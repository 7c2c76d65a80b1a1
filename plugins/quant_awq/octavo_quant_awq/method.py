"""AWQ: what the tensors of its checkpoints mean. Linear kernels multiply with them.

The activation-aware scaling is folded into the layer before when a model is quantized: nothing of it is left to do.

Source: Lin et al. 2023, AWQ: Activation-aware Weight Quantization, arXiv:2306.00978.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.interfaces import (
    SAFETENSORS_DTYPES,
    AffineWeight,
    LinearKernels,
    LinearShape,
    ParameterSpec,
    QuantizationMethod,
    StoredLinear,
    TensorHeader,
    WeightFacts,
)
from octavo_quant_awq.config import AWQConfig
from octavo_quant_awq.headers import SUFFIXES, check_headers, check_whole_words_and_groups
from octavo_quant_awq.layouts import BITS, CODES_PER_WORD, tensor_shapes, unpack_gemm, unpack_gemv

logger = logging.getLogger(__name__)

_ROUTER, _HEAD = "gate", "lm_head"


class AWQMethod(QuantizationMethod):
    """Versions gemm and gemv of AutoAWQ's 4-bit checkpoints; layouts.py shows both."""

    def __init__(
        self,
        quantization_config: Mapping[str, object],
        dtype: torch.dtype,
        device: str,
        headers: Mapping[str, TensorHeader],
        kernels: LinearKernels,
    ) -> None:
        super().__init__(quantization_config, dtype, device, headers, kernels)
        self._config = AWQConfig.read(quantization_config)
        prefixes = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
        lacking = [prefix for prefix in prefixes if not self._has_zeros(prefix)]
        if lacking and not self._config.zero_point:
            logger.warning(
                "The checkpoint has no zeros for %d linears (%s, ...), and zero_point is false: each is taken as 8, "
                "the middle of 4 bits.",
                len(lacking),
                lacking[0],
            )

    def quantizes(self, prefix: str) -> bool:
        if self.headers:
            return any(f"{prefix}.{suffix}" in self.headers for suffix in SUFFIXES)
        if any(name in prefix for name in self._config.dense):
            return False
        *path, last = prefix.split(".")
        in_a_layer = any(part.isdigit() for part in path)
        return last != _ROUTER if in_a_layer else last == _HEAD and self._config.head

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        scales = self.headers.get(f"{prefix}.scales")
        if self.headers:
            check_headers(prefix, shape, self._config, self.headers)
        else:
            check_whole_words_and_groups(prefix, shape, self._config, {})
        group_size = self._config.group_size_of(shape.in_features)
        shapes = tensor_shapes(self._config.version, shape.in_features, shape.out_features, group_size)
        if not self._has_zeros(prefix):
            del shapes["qzeros"]
        specs = [self._parameter(suffix, each, scales) for suffix, each in shapes.items()]
        if f"{prefix}.bias" in self.headers:
            specs.append(ParameterSpec(name="bias", shape=(shape.out_features,), output_axis=0))
        return tuple(specs)

    def facts(self, prefix: str, shape: LinearShape) -> WeightFacts:
        return WeightFacts(
            form="affine",
            bits=BITS,
            in_features=shape.in_features,
            out_features=shape.out_features,
            group_size=min(self._config.group_size_of(shape.in_features), shape.in_features),
            symmetric=not self._has_zeros(prefix),
        )

    def weight(self, stored: StoredLinear) -> AffineWeight:
        tensors, in_features = stored.tensors, stored.shape.in_features
        group_size = self._config.group_size_of(in_features)
        qzeros = tensors.get("qzeros")
        if self._config.version == "gemm":
            return AffineWeight(
                bits=BITS,
                codes=unpack_gemm(tensors["qweight"]).T.contiguous(),
                scales=tensors["scales"],
                zeros=None if qzeros is None else unpack_gemm(qzeros),
                group_size=group_size,
            )
        groups, group_index = self._groups_of_share(stored)
        return AffineWeight(
            bits=BITS,
            codes=unpack_gemv(tensors["qweight"]),
            scales=tensors["scales"][:, groups].T.contiguous(),
            zeros=None if qzeros is None else unpack_gemv(qzeros)[:, groups].T.contiguous(),
            group_size=group_size,
            group_index=group_index,
        )

    def _has_zeros(self, prefix: str) -> bool:
        return f"{prefix}.qzeros" in self.headers if self.headers else self._config.zero_point

    def _parameter(self, suffix: str, shape: tuple[int, int], scales: TensorHeader | None) -> ParameterSpec:
        """One tensor of a linear.

        Groups are cut where devices share the inputs. One group is the same for all of them, and those of version
        gemv are padded and packed, so each device gets the whole and takes its own.
        """
        dtype = torch.int32
        if suffix == "scales":
            dtype = torch.float16 if scales is None else getattr(torch, SAFETENSORS_DTYPES[scales.dtype])
        pack_factor = CODES_PER_WORD if suffix != "scales" else 1
        if self._config.version == "gemm":
            input_axis = 0 if suffix == "qweight" or shape[0] > 1 else None
            return ParameterSpec(
                name=suffix, shape=shape, dtype=dtype, output_axis=1, input_axis=input_axis, pack_factor=pack_factor
            )
        if suffix == "qweight":
            return ParameterSpec(
                name=suffix, shape=shape, dtype=dtype, output_axis=0, input_axis=1, pack_factor=pack_factor
            )
        return ParameterSpec(name=suffix, shape=shape, dtype=dtype, output_axis=0)

    def _groups_of_share(self, stored: StoredLinear) -> tuple[slice, Tensor | None]:
        """Which groups of version gemv a share's inputs have; and the group of each, if the share begins inside one."""
        size = self._config.group_size
        if size == -1:
            return slice(0, 1), None
        start, end = stored.input_start, stored.input_start + stored.shape.in_features
        groups = slice(start // size, -(-end // size))
        if start % size == 0:
            return groups, None
        inputs = torch.arange(start, end, device=stored.tensors["qweight"].device, dtype=torch.int32)
        return groups, inputs // size - groups.start
