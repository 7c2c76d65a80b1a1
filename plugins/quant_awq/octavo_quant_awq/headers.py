"""Whether a linear's tensors are what the checkpoint's configuration makes of them; asked before any is read."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape, TensorHeader
from octavo_quant_awq.config import TAKE_GEMM, VERSIONS, AWQConfig
from octavo_quant_awq.layouts import BITS, CODES_PER_WORD, tensor_shapes

SUFFIXES = ("qweight", "scales", "qzeros")

_SCALES = ("F16", "BF16", "F32")
_DTYPES = {"qweight": ("I32",), "scales": _SCALES, "qzeros": ("I32",)}
_USUAL_GROUP_SIZES = (128, 64, 32)
_DAMAGED = "The file is damaged, or not this model's: fetch it again."


def check_headers(prefix: str, shape: LinearShape, config: AWQConfig, headers: Mapping[str, TensorHeader]) -> None:
    """Compare the headers of one linear with its configuration, its inputs, each other, and the other linears' scales.

    The outputs are those of its scales: one linear of the model may be a part of a larger one of the checkpoint.

    Raises:
        CheckpointError: they disagree; names the tensor and both facts.
    """
    found = {suffix: headers[f"{prefix}.{suffix}"] for suffix in SUFFIXES if f"{prefix}.{suffix}" in headers}
    for suffix in SUFFIXES if config.zero_point else SUFFIXES[:2]:
        if suffix not in found:
            raise CheckpointError(_missing(prefix, suffix, found))
    for suffix, header in found.items():
        if header.dtype not in _DTYPES[suffix]:
            of_16_bits = f"Words of 16 bits are gemv_fast's or llm-awq's. {TAKE_GEMM}"
            raise CheckpointError(
                f"{prefix}.{suffix} is {header.dtype}; AWQ of version {config.version!r} stores it as "
                f"{' or '.join(_DTYPES[suffix])}. {of_16_bits if header.dtype == 'I16' else _DAMAGED}"
            )
        if len(header.shape) != 2:
            raise CheckpointError(f"{prefix}.{suffix} is {list(header.shape)}; AWQ stores it as a matrix. {_DAMAGED}")
    shapes = {suffix: header.shape for suffix, header in found.items()}
    check_whole_words_and_groups(prefix, shape, config, shapes)
    _check_shapes(prefix, shape.in_features, config, shapes)
    first = next(name for name in headers if name.endswith(".scales"))
    if headers[first].dtype != found["scales"].dtype:
        raise CheckpointError(
            f"{prefix}.scales is {found['scales'].dtype}, but {first} is {headers[first].dtype}: AWQ's tools write one "
            "dtype for all. Save the checkpoint again with one."
        )


def check_whole_words_and_groups(
    prefix: str, shape: LinearShape, config: AWQConfig, found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a linear that AWQ cannot store.

    Args:
        found: shapes of its tensors, matrices all, by suffix; {} when no weights are there yet.

    Raises:
        CheckpointError: groups or words do not come out whole, which AWQ's tools never write.
    """
    group_size = config.group_size_of(shape.in_features)
    if shape.in_features % group_size:
        rows = f" of {list(found['scales'])}" if found else ""
        advice = _what_they_are(shape.in_features, config, found) if found else None
        raise CheckpointError(
            f"{prefix}.scales{rows}: the linear's {shape.in_features} inputs are not whole groups of {group_size}, the "
            "group_size of quantization_config. "
            f"{advice or 'Correct it, or quantize the model again with one that divides them.'}"
        )
    for features, what in ((shape.out_features, "outputs"), (shape.in_features, "inputs")):
        if features % CODES_PER_WORD:
            raise CheckpointError(
                f"{prefix}.qweight: the linear's {features} {what} are no multiple of {CODES_PER_WORD}, the {BITS}-bit "
                "weights of a word. AWQ does not store such a linear: leave it unquantized."
            )


def _missing(prefix: str, suffix: str, found: Mapping[str, TensorHeader]) -> str:
    there = " and ".join(f"{prefix}.{name}" for name in found)
    text = f"{prefix}.{suffix} is missing, but {there} {'is' if len(found) == 1 else 'are'} there."
    if suffix == "qzeros":
        return f'{text} quantization_config says zero_point; if every zero is 8, set "zero_point": false there.'
    return f"{text} {_DAMAGED}"


def _check_shapes(prefix: str, in_features: int, config: AWQConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    group_size = config.group_size_of(in_features)
    wanted = _wanted(config.version, in_features, group_size, found)
    for suffix, shape in found.items():
        if shape != wanted[suffix]:
            beside = "" if suffix == "scales" else f", and {prefix}.scales of {list(found['scales'])}"
            raise CheckpointError(
                f"{prefix}.{suffix} is {list(shape)}, but version {config.version!r} and group_size {group_size} of "
                f"quantization_config, with {in_features} inputs{beside}, make it {list(wanted[suffix])}. "
                f"{_what_they_are(in_features, config, found) or _DAMAGED}"
            )


def _wanted(
    version: str, in_features: int, group_size: int, found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    """Shapes of the tensors that go with the outputs of the scales found."""
    outputs = found["scales"][-1] if version == "gemm" else found["scales"][0]
    return tensor_shapes(version, in_features, outputs, group_size)


def _what_they_are(in_features: int, config: AWQConfig, found: Mapping[str, tuple[int, ...]]) -> str | None:
    """What the tensors are instead of what quantization_config says, and what to do; None where it cannot be told."""
    of_rows = max(1, in_features // max(1, found["scales"][0]))
    for group_size in dict.fromkeys((config.group_size_of(in_features), of_rows, *_USUAL_GROUP_SIZES)):
        for version in (config.version, *VERSIONS):
            if in_features % group_size == 0 and found == {
                suffix: shape
                for suffix, shape in _wanted(version, in_features, group_size, found).items()
                if suffix in found
            }:
                return (
                    f"These tensors are version {version!r} with group_size {group_size}: correct quantization_config."
                )
    if found["qweight"] == (in_features // CODES_PER_WORD, found["scales"][-1]):
        return 'These tensors are laid out as GPTQ\'s: set "quant_method": "gptq" in quantization_config.'
    return None
