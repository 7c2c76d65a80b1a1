"""What a linear's tensors are by the checkpoint's headers, and all that contradicts itself there."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.errors import CheckpointError
from octavo.interfaces import LinearShape, TensorHeader

CODES_PER_BLOCK = 32
"""Inputs that fill whole words, whatever the bits: as many words as a code has bits."""

_FLOATS, _WORDS = ("F32", "F16", "BF16"), ("I32",)
DTYPES: Mapping[str, tuple[str, ...]] = {
    "qweight": _WORDS,
    "lookup_table": _FLOATS,
    "rows": _WORDS,
    "cols": _WORDS,
    "vals": _FLOATS,
    "startrows": _WORDS,
    "full_rows": _FLOATS,
    "full_row_indices": _WORDS,
}
"""The tensors of a linear by the suffix of their names, and what they may be stored as."""

_DIMENSIONS = {"qweight": 2, "lookup_table": 2, "full_rows": 2}  # the others have one
_ALWAYS = ("qweight", "lookup_table")
_TOGETHER = (("rows", "cols", "vals"), ("full_rows", "full_row_indices"))
"""Where one of these is, the others are."""

_BITS_OF_TABLE = {8: 3, 16: 4}

DAMAGED = "The file is damaged, or not this model's: fetch it again."
"""What to do where tensors contradict each other."""


def headers_of(prefix: str, headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Those of one linear, by the suffix of their names."""
    return {suffix: headers[f"{prefix}.{suffix}"] for suffix in DTYPES if f"{prefix}.{suffix}" in headers}


def configured_bits(config: Mapping[str, object]) -> int | None:
    """What quantization_config says of the bits of a code."""
    said = next((config[key] for key in ("wbits", "bits", "w_bit") if key in config), None)
    return said if isinstance(said, int) else None


def bits_of(prefix: str, found: Mapping[str, TensorHeader]) -> int:
    """Of a linear's codes, by the size of its codebooks.

    Raises:
        CheckpointError: it has none, or of a size that SqueezeLLM has not.
    """
    if faults := _incomplete(prefix, found) or _mistyped(prefix, found):
        raise CheckpointError(" ".join([*faults, DAMAGED]))
    size = found["lookup_table"].shape[1]
    if size not in _BITS_OF_TABLE:
        raise CheckpointError(
            f"{prefix}.lookup_table has {size} values for each output; 3 bits have 8 and 4 bits have 16. {DAMAGED}"
        )
    return _BITS_OF_TABLE[size]


def whole_shape(prefix: str, found: Mapping[str, TensorHeader]) -> LinearShape:
    """Of the linear that lies in the checkpoint, of which a device may have a share."""
    num_words, out_features = found["qweight"].shape
    return LinearShape(in_features=num_words * CODES_PER_BLOCK // bits_of(prefix, found), out_features=out_features)


def check(prefix: str, in_features: int, found: Mapping[str, TensorHeader], said_bits: int | None) -> None:
    """Compare a linear's tensors with each other, the model's inputs and the bits of the configuration.

    Args:
        found: by the suffix of their names. How many outputs there are is compared by who loads them.
        said_bits: by the configuration; None: it says nothing.

    Raises:
        CheckpointError: with a sentence for each fault, and what to do.
    """
    if in_features % CODES_PER_BLOCK:
        raise CheckpointError(
            f"{prefix} has {in_features} inputs, and SqueezeLLM packs them {CODES_PER_BLOCK} at a time. It does not "
            "store such a linear: leave it unquantized."
        )
    bits = bits_of(prefix, found)
    if faults := _codebook_faults(prefix, in_features, found, bits) + _sparse_faults(prefix, in_features, found):
        raise CheckpointError(" ".join([*faults, DAMAGED]))
    if said_bits not in (None, bits):
        raise CheckpointError(
            f"{prefix}.lookup_table has {2**bits} values for each output, which is {bits} bits, but the quantization "
            f"configuration says {said_bits}. Correct it there."
        )


def _incomplete(prefix: str, found: Mapping[str, TensorHeader]) -> list[str]:
    return [
        f"{prefix}.{missing[0]} is missing: of this linear there are {', '.join(found)}."
        for names in (_ALWAYS, *_TOGETHER)
        if (missing := [name for name in names if name not in found])
        if names is _ALWAYS or len(missing) < len(names)
    ]


def _mistyped(prefix: str, found: Mapping[str, TensorHeader]) -> list[str]:
    faults = [
        f"{prefix}.{name} is stored as {header.dtype}; SqueezeLLM stores it as {' or '.join(DTYPES[name])}."
        for name, header in found.items()
        if header.dtype not in DTYPES[name]
    ]
    return faults + [
        f"{prefix}.{name} has the shape {list(header.shape)}, wanted are {_DIMENSIONS.get(name, 1)} dimension(s)."
        for name, header in found.items()
        if len(header.shape) != _DIMENSIONS.get(name, 1)
    ]


def _codebook_faults(prefix: str, in_features: int, found: Mapping[str, TensorHeader], bits: int) -> list[str]:
    faults = []
    num_codebooks, _ = found["lookup_table"].shape
    num_words, num_columns = found["qweight"].shape
    if num_words != (wanted := in_features // CODES_PER_BLOCK * bits):
        faults.append(
            f"{prefix}.qweight has {num_words} rows of words, but {in_features} inputs of {bits} bits fill {wanted}."
        )
    if num_codebooks != num_columns:
        faults.append(f"{prefix}.lookup_table is for {num_codebooks} outputs, but {prefix}.qweight has {num_columns}.")
    return faults


def _sparse_faults(prefix: str, in_features: int, found: Mapping[str, TensorHeader]) -> list[str]:
    sizes = {name: header.shape[-1] for name, header in found.items()}
    out_features, faults = sizes["qweight"], []
    if "rows" in found and sizes["rows"] != out_features + 1:
        faults.append(
            f"{prefix}.rows has {sizes['rows']} entries, but the {out_features} outputs of {prefix}.qweight want one "
            f"more than they are."
        )
    if "rows" in found and sizes["cols"] != sizes["vals"]:
        faults.append(f"{prefix}.cols has {sizes['cols']} entries, but {prefix}.vals has {sizes['vals']}.")
    if "full_rows" in found and found["full_rows"].shape != (wanted := (in_features, sizes["full_row_indices"])):
        faults.append(
            f"{prefix}.full_rows has the shape {list(found['full_rows'].shape)}, but inputs and "
            f"{prefix}.full_row_indices are {list(wanted)}."
        )
    return faults
