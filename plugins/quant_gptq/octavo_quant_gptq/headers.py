"""Whether a linear's tensors are what the checkpoint's configuration makes of them; asked before any is read.

K is in_features, N out_features, G the number of groups: qweight int32 [K * bits / 32, N], qzeros int32
[G, N * bits / 32], scales floating [G, N], g_idx int32 or int64 [K]; all rounded up to whole words.
"""

from __future__ import annotations

from collections.abc import Mapping

from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape, TensorHeader
from octavo.packing import whole_words, words_for
from octavo_quant_gptq.config import BITS, LinearConfig, fitting_group_size

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")

_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32", "I64")}
_DAMAGED = "The file is damaged, or not this model's: fetch it again."
_CORRECT = "Correct quantization_config, or fetch the file again."


def headers_of(prefix: str, headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Those of one linear that are there, by suffix."""
    return {suffix: headers[f"{prefix}.{suffix}"] for suffix in SUFFIXES if f"{prefix}.{suffix}" in headers}


def check_headers(prefix: str, in_features: int, config: LinearConfig, found: Mapping[str, TensorHeader]) -> None:
    """Compare the headers of one linear with its configuration, its inputs and each other.

    The outputs are those of its qweight: one linear of the model may be a part of a larger one of the checkpoint.

    Args:
        found: by suffix.

    Raises:
        CheckpointError: they disagree; names the tensor and both facts.
    """
    _check_presence(prefix, config, found)
    for suffix, header in found.items():
        if header.dtype not in _DTYPES[suffix]:
            raise CheckpointError(
                f"{prefix}.{suffix} is {header.dtype}; GPTQ stores it as {' or '.join(_DTYPES[suffix])}. {_DAMAGED}"
            )
        num_axes = 1 if suffix == "g_idx" else 2
        if len(header.shape) != num_axes:
            raise CheckpointError(
                f"{prefix}.{suffix} is {list(header.shape)}; {num_axes} dimensions are wanted. {_DAMAGED}"
            )
    _check_inputs(prefix, in_features, config, found)
    _check_outputs(prefix, config, found)


def check_part(prefix: str, shape: LinearShape, config: LinearConfig, found: Mapping[str, TensorHeader]) -> None:
    """Refuse a linear that is a part of a larger one of the checkpoint, if its zeros are not whole words.

    Raises:
        CheckpointError: they are not; names the tensor and both facts.
    """
    of_whole, codes = found["qweight"].shape[1], whole_words(config.bits, planar=config.planar)[0]
    if of_whole != shape.out_features and shape.out_features % codes:
        raise CheckpointError(
            f"{prefix}.qzeros holds {codes} outputs in whole words, but of its {of_whole} outputs a part with "
            f"{shape.out_features} is wanted, which is no multiple of {codes}. Such a checkpoint is not read."
        )


def _check_presence(prefix: str, config: LinearConfig, found: Mapping[str, TensorHeader]) -> None:
    needed = ("qweight", "scales", "qzeros") if config.symmetric is False else ("qweight", "scales")
    for suffix in needed:
        if suffix not in found:
            there = " and ".join(f"{prefix}.{name}" for name in found)
            raise CheckpointError(
                f"{prefix}.{suffix} is missing, but {there} {'is' if len(found) == 1 else 'are'} there. {_DAMAGED}"
            )


def _check_inputs(prefix: str, in_features: int, config: LinearConfig, found: Mapping[str, TensorHeader]) -> None:
    rows = found["qweight"].shape[0]
    wanted = words_for(in_features, config.bits, planar=config.planar)
    if rows != wanted:
        fitting = [bits for bits in BITS if bits != config.bits and words_for(in_features, bits) == rows]
        advice = f"So many are {fitting[0]} bits: correct quantization_config." if fitting else _DAMAGED
        raise CheckpointError(
            f"{prefix}.qweight has {rows} rows of words, but {in_features} inputs of {config.bits} bits, as "
            f"quantization_config says, take {wanted}. {advice}"
        )
    num_groups = config.num_groups(in_features)
    for suffix in ("scales", "qzeros"):
        if suffix in found and found[suffix].shape[0] != num_groups:
            rows = found[suffix].shape[0]
            size = fitting_group_size([(in_features, rows)]) if rows else None
            fits = "" if size is None else f" {rows} rows are groups of {size}."
            raise CheckpointError(
                f"{prefix}.{suffix} has {rows} groups, but {in_features} inputs in groups of "
                f"{config.group_size_of(in_features)}, as quantization_config says, are {num_groups}.{fits} {_CORRECT}"
            )
    if "g_idx" in found and found["g_idx"].shape[0] != in_features:
        raise CheckpointError(
            f"{prefix}.g_idx names the groups of {found['g_idx'].shape[0]} inputs, but the linear has {in_features}. "
            f"{_DAMAGED}"
        )


def _check_outputs(prefix: str, config: LinearConfig, found: Mapping[str, TensorHeader]) -> None:
    outputs = found["qweight"].shape[1]
    if found["scales"].shape[1] != outputs:
        raise CheckpointError(
            f"{prefix}.scales has {found['scales'].shape[1]} outputs, but {prefix}.qweight has {outputs}. {_DAMAGED}"
        )
    wanted = words_for(outputs, config.bits, planar=config.planar)
    if "qzeros" in found and found["qzeros"].shape[1] != wanted:
        raise CheckpointError(
            f"{prefix}.qzeros has {found['qzeros'].shape[1]} words a group, but the {outputs} outputs of "
            f"{prefix}.qweight, {config.bits} bits each, take {wanted}. {_DAMAGED}"
        )
