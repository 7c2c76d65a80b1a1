"""A GPTQ quantization_config: how each linear is quantized, and which checkpoints are refused.

Imports no torch: it is asked before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from octavo.errors import CheckpointError
from octavo.plugins.specs import Need, QuantizationNeed

if TYPE_CHECKING:
    from octavo.interfaces import TensorHeader

BITS = (2, 3, 4, 5, 6, 7, 8)
FORMATS = ("gptq", "gptq_v2", "gptq_p")

_ONLY_PLANAR = (5, 6, 7)
_BITS_KEYS = ("bits", "w_bit", "wbits")
_GROUP_SIZE_KEYS = ("group_size", "q_group_size")
_FORMAT_KEYS = ("checkpoint_format", "format", "version")
_AGAIN = 'Take a checkpoint of format "gptq" or "gptq_v2", or quantize the model again with that format.'
_TILES = f"its weights lie in the tiles of one GPU kernel. {_AGAIN}"
_AWQ = 'it is a version of AWQ. Set "quant_method": "awq" in quantization_config.'
_REFUSED = {
    "marlin": _TILES,
    "gptq_marlin_24": f"half of its weights are left out, the others lie in the tiles of one GPU kernel. {_AGAIN}",
    "bitblas": _TILES,
    "qqq": f"it has 8-bit activations and two kinds of scales. {_AGAIN}",
    "gemm": _AWQ,
    "gemv": _AWQ,
    "gemv_fast": _AWQ,
}
_AUTO_ROUND_PACKINGS = ("auto_round:auto_gptq", "auto_round:gptq")
_DENSE_BITS = 16
"""AutoRound says so of linears that it left as they were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """How one linear is quantized.

    Attributes:
        group_size: inputs that share a scale; -1: all.
        symmetric: True: every zero is 2 ** (bits - 1), whatever is stored; None: not said, the stored zeros are it.
        act_order: groups may be in an order of their own; their index is what counts.
        format: one of FORMATS.
    """

    bits: int
    group_size: int
    symmetric: bool | None
    act_order: bool
    format: str

    @property
    def planar(self) -> bool:
        """Whether codes are parted into planes of 4, 2 and 1 bits."""
        return self.format == "gptq_p" or self.bits in _ONLY_PLANAR

    @property
    def zeros_less_one(self) -> bool:
        """Whether zeros are stored as one less than they are."""
        return self.format == "gptq"

    def group_size_of(self, in_features: int) -> int:
        """Inputs of a group, in a linear with so many inputs."""
        return in_features if self.group_size == -1 else self.group_size

    def num_groups(self, in_features: int) -> int:
        """Of a linear with so many inputs; the last may be shorter than the others."""
        return -(-in_features // self.group_size_of(in_features))


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTQConfig:
    """A checkpoint's quantization_config.

    Attributes:
        general: of linears that no rule is about.
        rules: (pattern of names, how these are quantized; None: not at all). The first that matches a name's beginning
            is about it.
        endings: of the names of linears in layers that are quantized; (): all are.
        head: whether the head is quantized, too.
        says_format: whether it names a format; else zeros are taken as those of "gptq".
    """

    general: LinearConfig
    rules: tuple[tuple[re.Pattern[str], LinearConfig | None], ...]
    endings: tuple[str, ...]
    head: bool
    says_format: bool

    @classmethod
    def read(cls, config: Mapping[str, object]) -> GPTQConfig:
        """Of a config.json's quantization_config, or of a quantize_config.json.

        Raises:
            CheckpointError: it says something that is not read here.
        """
        if reasons := _reasons(config):
            raise CheckpointError(f"quantization_config: {'; '.join(reasons)}")
        usual = LinearConfig(bits=4, group_size=128, symmetric=None, act_order=False, format=_format_of(config))
        general = _changed(usual, config, "quantization_config")
        return cls(
            general=general,
            rules=(*_rules_of_auto_round(config, general), *_dynamic_rules(config, general)),
            endings=_endings(config.get("modules_in_block_to_quantize")),
            head=config.get("lm_head") is True,
            says_format=_format_key(config) is not None,
        )

    def rule_of(self, prefix: str) -> LinearConfig | None:
        """How the linear of this checkpoint name is quantized; None: not at all."""
        return next((rule for pattern, rule in self.rules if pattern.match(prefix)), self.general)


def recognise(config: Mapping[str, object], headers: Mapping[str, TensorHeader]) -> Mapping[str, object] | None:
    """The configuration of a checkpoint that does not name its quant_method, if it is GPTQ's; else None.

    A quantize_config.json of AutoGPTQ names no method; desc_act is a word of GPTQ's alone. Tensors are known by a g_idx
    beside a qweight, or by their shapes; what the configuration does not say of bits and groups is theirs.

    Args:
        config: what the checkpoint's files say; {} when they say nothing.
    """
    names_format = _format_key(config) is not None
    said = "desc_act" in config or (names_format and _format_of(config) in FORMATS)
    if not said and (names_format or _format_of(config) not in FORMATS):
        return None
    found = _found_in(headers)
    indexed = any(f"{name.removesuffix('.g_idx')}.qweight" in headers for name in headers if name.endswith(".g_idx"))
    if not (said or found or indexed):
        return None
    unsaid = {
        keys[0]: found[keys[0]]
        for keys in (_BITS_KEYS, _GROUP_SIZE_KEYS)
        if keys[0] in found and all(config.get(key) is None for key in keys)
    }
    return {**config, **unsaid, "quant_method": "gptq"}


def fitting_group_size(linears: Sequence[tuple[int, int]]) -> int | None:
    """Which makes each linear's groups of its inputs: a power of two, else their quotient; None: none does.

    Args:
        linears: (inputs, groups) of each, neither of them 0.
    """
    inputs, groups = linears[0]
    for size in (*(1 << power for power in range(3, 16)), -(-inputs // groups)):
        if all(-(-inputs // size) == groups for inputs, groups in linears):
            return size
    return None


def _found_in(headers: Mapping[str, TensorHeader]) -> dict[str, int]:
    """bits and group_size as the shapes of GPTQ's tensors tell them; {}: they are not GPTQ's.

    AWQ's qweight is [K, N / 8], so it has other columns than its scales.
    """
    all_bits, linears = [], []
    for prefix in (name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")):
        there = [headers.get(f"{prefix}.{suffix}") for suffix in ("qweight", "scales", "qzeros")]
        shapes = [header.shape for header in there if header is not None and len(header.shape) == 2]
        if len(shapes) != 3 or 0 in (number for shape in shapes for number in shape):
            return {}
        (rows, outputs), of_scales, (num_groups, words) = shapes
        bits = 32 * words // outputs
        if of_scales != (num_groups, outputs) or bits not in BITS:
            return {}
        g_idx = headers.get(f"{prefix}.g_idx")
        all_bits.append(bits)
        linears.append(((prod(g_idx.shape) if g_idx else 0) or rows * 32 // bits, num_groups))
    if not linears:
        return {}
    if all(num_groups == 1 for _, num_groups in linears):
        return {"bits": all_bits[0], "group_size": -1}
    size = fitting_group_size(linears) or fitting_group_size(linears[:1])
    return {"bits": all_bits[0]} if size is None else {"bits": all_bits[0], "group_size": size}


def reasons_against(need: Need) -> list[str]:
    """Why such a checkpoint cannot be read, in sentences; none when it can."""
    assert isinstance(need, QuantizationNeed)
    return _reasons(need.config)


def _reasons(config: Mapping[str, object]) -> list[str]:
    reasons = []
    if (format := _format_of(config)) not in FORMATS:
        why = _REFUSED.get(format, f"it is not known. {_AGAIN}")
        reasons.append(f"reads GPTQ of format {', '.join(FORMATS)}, not {format!r}: {why}")
    if (pack_dtype := config.get("pack_dtype")) not in (None, "int32"):
        reasons.append(f'reads codes packed in "int32"; pack_dtype is {pack_dtype!r}. {_AGAIN}')
    packing = config.get("packing_format")
    if packing is not None and packing not in _AUTO_ROUND_PACKINGS:
        reasons.append(
            f"reads AutoRound's packing_format {_AUTO_ROUND_PACKINGS[0]!r}; this is {packing!r}. Export the model "
            "again with that format."
        )
    if (data_type := config.get("data_type")) not in (None, "int"):
        reasons.append(f'reads whole-number codes, AutoRound\'s data_type "int"; this is {data_type!r}. {_AGAIN}')
    return reasons


def _format_key(config: Mapping[str, object]) -> str | None:
    return next((key for key in _FORMAT_KEYS if config.get(key) is not None), None)


def _format_of(config: Mapping[str, object]) -> str:
    if config.get("is_marlin_format") is True:
        return "marlin"
    key = _format_key(config)
    return "gptq" if key is None else str(config[key]).lower()


def _changed(linear: LinearConfig, changes: Mapping[str, object], where: str) -> LinearConfig:
    """The same with what `changes` say.

    Raises:
        CheckpointError: of bits or groups that there are not; begins with `where`.
    """
    bits = _number(changes, _BITS_KEYS, linear.bits, where)
    group_size = _number(changes, _GROUP_SIZE_KEYS, linear.group_size, where)
    if bits not in BITS:
        raise CheckpointError(f"{where}: GPTQ checkpoints are read with 2 to 8 bits; this says {bits!r}.")
    if group_size < -1 or group_size == 0:
        raise CheckpointError(f"{where}: group_size is a number of inputs, or -1 for all; found {group_size!r}.")
    symmetric, act_order = changes.get("sym"), changes.get("desc_act")
    if symmetric is None and changes.get("zero_point") is not None:
        symmetric = changes["zero_point"] is False
    return LinearConfig(
        bits=bits,
        group_size=group_size,
        symmetric=linear.symmetric if symmetric is None else bool(symmetric),
        act_order=linear.act_order if act_order is None else bool(act_order),
        format=linear.format,
    )


def _number(changes: Mapping[str, object], keys: Sequence[str], usual: int, where: str) -> int:
    """What the first of the keys says that says something; digits in quotes are a number, too."""
    key = next((key for key in keys if changes.get(key) is not None), None)
    if key is None:
        return usual
    value = changes[key]
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+", value):
        return int(value)
    if type(value) is not int:
        raise CheckpointError(
            f"{where}: {key} is {value!r}, which is no whole number: write a number, such as {usual}."
        )
    return value


def _dynamic_rules(
    config: Mapping[str, object], general: LinearConfig
) -> Iterator[tuple[re.Pattern[str], LinearConfig | None]]:
    """GPTQModel's: patterns of names, after "-:" of those that are not quantized, after "+:" or nothing of others."""
    for key, changes in _mapping(config, "dynamic").items():
        where = f"quantization_config: dynamic[{key!r}]"
        try:
            pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(f"{where} is no regular expression: {error}.") from error
        if key.startswith("-:"):
            yield pattern, None
        elif isinstance(changes, Mapping):
            yield pattern, _changed(general, changes, where)
        else:
            raise CheckpointError(f"{where}: settings by name are wanted, found {changes!r}.")


def _rules_of_auto_round(
    config: Mapping[str, object], general: LinearConfig
) -> Iterator[tuple[re.Pattern[str], LinearConfig | None]]:
    """AutoRound's settings of single linears, by their whole names."""
    for name, changes in _mapping(config, "extra_config").items():
        if isinstance(changes, Mapping):
            where = f"quantization_config: extra_config[{name!r}]"
            dense = _number(changes, _BITS_KEYS, general.bits, where) >= _DENSE_BITS
            rule = None if dense else _changed(general, changes, where)
            yield re.compile(re.escape(name) + "$"), rule


def _mapping(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = config.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"quantization_config: {key} is settings by name; found {found!r}.")
    return found or {}


def _endings(modules: object) -> tuple[str, ...]:
    """Of a list of names inside a layer, or a list of such lists."""
    if isinstance(modules, str):
        return (modules,)
    return tuple(name for each in modules for name in _endings(each)) if isinstance(modules, list | tuple) else ()
