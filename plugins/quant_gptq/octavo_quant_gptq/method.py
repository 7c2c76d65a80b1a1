"""GPTQ: what the tensors of its checkpoints mean. Linear kernels multiply with them.

Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323; the layouts of AutoGPTQ 0.7 and GPTQModel 7.7.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.errors import CheckpointError
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
from octavo.packing import unpack_columns, whole_words, words_for
from octavo_quant_gptq.config import GPTQConfig, LinearConfig
from octavo_quant_gptq.headers import SUFFIXES, check_headers, check_part, headers_of

logger = logging.getLogger(__name__)

_ROUTER, _HEAD = "gate", "lm_head"
_ONE_IN_EVERY_FIELD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class GPTQMethod(QuantizationMethod):
    """Formats gptq, gptq_v2 and gptq_p; headers.py shows the tensors, octavo.packing how codes lie in them.

    Scales and zeros come whole to each of the devices that share the inputs: with an order of their own the inputs of
    one device may belong to any group, and without it a share may begin inside one.
    """

    def __init__(
        self,
        quantization_config: Mapping[str, object],
        dtype: torch.dtype,
        device: str,
        headers: Mapping[str, TensorHeader],
        kernels: LinearKernels,
    ) -> None:
        super().__init__(quantization_config, dtype, device, headers, kernels)
        self._config = GPTQConfig.read(quantization_config)
        self._warned_of_zeros = False

    def quantizes(self, prefix: str) -> bool:
        if self.headers:
            return any(f"{prefix}.{suffix}" in self.headers for suffix in SUFFIXES)
        if self._config.rule_of(prefix) is None:
            return False
        *path, last = prefix.split(".")
        if not any(part.isdigit() for part in path):
            return last == _HEAD and self._config.head
        return last != _ROUTER and (not self._config.endings or prefix.endswith(self._config.endings))

    def parameters(self, prefix: str, shape: LinearShape) -> tuple[ParameterSpec, ...]:
        config, found = self._linear_config(prefix), headers_of(prefix, self.headers)
        if self.headers:
            check_headers(prefix, shape.in_features, config, found)
            self._check_scales_of_all(prefix, found["scales"])
            check_part(prefix, shape, config, found)
        specs = _declared(config, shape, found["scales"].dtype if found else "F16")
        bias = ParameterSpec(name="bias", shape=(shape.out_features,), output_axis=0)
        has_bias = f"{prefix}.bias" in self.headers
        return (*(spec for spec in specs if spec.name in found or not found), *([bias] if has_bias else []))

    def facts(self, prefix: str, shape: LinearShape) -> WeightFacts:
        config = self._linear_config(prefix)
        indexed = not self.headers or f"{prefix}.g_idx" in self.headers
        return WeightFacts(
            form="affine",
            bits=config.bits,
            in_features=shape.in_features,
            out_features=shape.out_features,
            group_size=min(config.group_size_of(shape.in_features), shape.in_features),
            act_order=config.act_order and indexed and config.group_size != -1,
            symmetric=bool(config.symmetric) or (bool(self.headers) and f"{prefix}.qzeros" not in self.headers),
        )

    def weight(self, stored: StoredLinear) -> AffineWeight:
        config, tensors, shape = self._linear_config(stored.prefix), stored.tensors, stored.shape
        groups, group_index = _groups_of_share(config, stored)
        scales = tensors["scales"]
        zeros = self._zeros(config, stored)
        if groups != slice(0, len(scales)):  # copies, which do not keep the others in memory
            scales, zeros = scales[groups].clone(), None if zeros is None else zeros[groups].clone()
        return AffineWeight(
            bits=config.bits,
            codes=unpack_columns(tensors["qweight"].T, config.bits, shape.in_features, planar=config.planar),
            scales=scales,
            zeros=zeros,
            group_size=config.group_size_of(shape.in_features),
            group_index=group_index,
        )

    def _linear_config(self, prefix: str) -> LinearConfig:
        """The tensors decide what is quantized: those of a linear that a rule leaves out are as the others are."""
        return self._config.rule_of(prefix) or self._config.general

    def _zeros(self, config: LinearConfig, stored: StoredLinear) -> Tensor | None:
        """[groups, outputs] uint8; None: every one is the middle."""
        qzeros, num_outputs = stored.tensors.get("qzeros"), stored.shape.out_features
        if qzeros is None:
            return None
        if not config.symmetric:
            zeros = unpack_zeros(qzeros, num_outputs, config)
            return zeros if config.symmetric is False else self._zeros_of_unsaid(config, stored.prefix, zeros)
        # Checkpoints are about that say one of the two and store the other: so neither is believed.
        fields, middle = unpack_columns(qzeros, config.bits, num_outputs, planar=config.planar), 2 ** (config.bits - 1)
        if not (self._warned_of_zeros or (fields == middle).all() or (fields == middle - 1).all()):
            self._warned_of_zeros = True
            logger.warning(
                "quantization_config says the weights are symmetric, but %s.qzeros holds other zeros than %d or, less "
                'one, %d. Every zero is taken as %d. If the answers are nonsense, set "sym": false there.',
                *(stored.prefix, middle, middle - 1, middle),
            )
        return None

    def _zeros_of_unsaid(self, config: LinearConfig, prefix: str, zeros: Tensor) -> Tensor:
        """Where nothing says whether they are symmetric: the middle, if a format of the other kind made them all so."""
        middle = 2 ** (config.bits - 1)
        if (zeros == (middle + 1 if config.zeros_less_one else middle - 1)).all():
            return torch.full_like(zeros, middle)
        if not (self._config.says_format or self._warned_of_zeros or (zeros == middle).all()):
            self._warned_of_zeros = True
            logger.warning(
                "quantization_config does not say of which format the zeros in %s.qzeros are; they are read as "
                'those of "gptq", less one. If the answers are nonsense, set "checkpoint_format": "gptq_v2" there.',
                prefix,
            )
        return zeros

    def _check_scales_of_all(self, prefix: str, scales: TensorHeader) -> None:
        first = next(name for name in self.headers if name.endswith(".scales"))
        if self.headers[first].dtype != scales.dtype:
            raise CheckpointError(
                f"{prefix}.scales is {scales.dtype}, but {first} is {self.headers[first].dtype}: GPTQ's tools write "
                "one dtype for all. Save the checkpoint again with one."
            )


def unpack_zeros(qzeros: Tensor, num_outputs: int, config: LinearConfig) -> Tensor:
    """[groups, words] int32 -> [groups, num_outputs] uint8.

    Format gptq stores one less. Its tools subtract from whole words, where a zero of 0 borrows from the next field, so
    adding to whole words undoes it; where fields run over words, from each field.
    """
    one = _ONE_IN_EVERY_FIELD.get(config.bits)
    if config.zeros_less_one and one is not None:
        qzeros = qzeros + one  # wraps, as theirs did
    fields = unpack_columns(qzeros, config.bits, num_outputs, planar=config.planar)
    if config.zeros_less_one and one is None:
        fields = (fields + 1) & (2**config.bits - 1)
    return fields


def _declared(config: LinearConfig, shape: LinearShape, scales: str) -> list[ParameterSpec]:
    """Every tensor that a linear may have.

    Args:
        scales: their dtype, by its name in safetensors.
    """
    num_groups, outputs = config.num_groups(shape.in_features), shape.out_features
    pack_factor, pack_elements = whole_words(config.bits, planar=config.planar)
    input_words, output_words = (
        words_for(features, config.bits, planar=config.planar) for features in (shape.in_features, outputs)
    )
    return [
        ParameterSpec(
            name="qweight",
            shape=(input_words, outputs),
            dtype=torch.int32,
            output_axis=1,
            input_axis=0,
            pack_factor=pack_factor,
            pack_elements=pack_elements,
        ),
        ParameterSpec(
            name="qzeros",
            shape=(num_groups, output_words),
            dtype=torch.int32,
            output_axis=1,
            pack_factor=pack_factor,
            pack_elements=pack_elements,
        ),
        ParameterSpec(
            name="scales",
            shape=(num_groups, outputs),
            dtype=getattr(torch, SAFETENSORS_DTYPES[scales]),
            output_axis=1,
        ),
        ParameterSpec(name="g_idx", shape=(shape.in_features,), dtype=torch.int32, input_axis=0),
    ]


def _groups_of_share(config: LinearConfig, stored: StoredLinear) -> tuple[slice, Tensor | None]:
    """Which groups a share's inputs have, and the group of each among them; None: they follow each other in order.

    Raises:
        CheckpointError: an input's group does not exist.
    """
    num_groups, size = len(stored.tensors["scales"]), config.group_size
    if num_groups == 1:
        return slice(0, 1), None
    start, end = stored.input_start, stored.input_start + stored.shape.in_features
    g_idx = stored.tensors.get("g_idx")
    if g_idx is not None:
        g_idx = g_idx.to(torch.int32)  # some exporters write int64
    natural = torch.arange(start, end, dtype=torch.int32, device=stored.tensors["scales"].device) // size
    # Some exporters write zeros alone where groups follow each other.
    if g_idx is not None and g_idx.any() and not torch.equal(g_idx, natural):
        lowest, highest = g_idx.aminmax()
        if lowest < 0 or highest >= num_groups:
            raise CheckpointError(
                f"{stored.prefix}.g_idx names the groups {int(lowest)} to {int(highest)}, but {stored.prefix}.scales "
                f"has {num_groups}, from 0. The file is damaged, or not this model's: fetch it again."
            )
        return slice(0, num_groups), g_idx
    groups = slice(start // size, -(-end // size))
    return groups, None if start % size == 0 else natural - groups.start
