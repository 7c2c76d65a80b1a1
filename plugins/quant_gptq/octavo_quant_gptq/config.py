"""A GPTQ quantization_config: how each linear is quantized, and which checkpoints are refused.

Imports no torch: it is asked before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    "exl2": f"one linear of ExLlamaV2 mixes several numbers of bits. {_AGAIN}",
    "exl3": f"ExLlamaV3 stores a trellis, not scales and zeros. {_AGAIN}",
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
        symmetric: every zero is 2 ** (bits - 1), whatever is stored.
        act_order: groups may be in an order of their own; their index is what counts.
        format: one of FORMATS.
    """

    bits: int
    group_size: int
    symmetric: bool
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
    """

    general: LinearConfig
    rules: tuple[tuple[re.Pattern[str], LinearConfig | None], ...]
    endings: tuple[str, ...]
    head: bool

    @classmethod
    def read(cls, config: Mapping[str, object]) -> GPTQConfig:
        """Of a config.json's quantization_config, or of a quantize_config.json.

        Raises:
            CheckpointError: it says something that is not read here.
        """
        if reasons := _reasons(config):
            raise CheckpointError(f"quantization_config: {'; '.join(reasons)}")
        usual = LinearConfig(bits=4, group_size=128, symmetric=True, act_order=False, format=_format_of(config))
        general = _changed(usual, config, "quantization_config")
        return cls(
            general=general,
            rules=(*_rules_of_auto_round(config, general), *_dynamic_rules(config, general)),
            endings=_endings(config.get("modules_in_block_to_quantize")),
            head=config.get("lm_head") is True,
        )

    def rule_of(self, prefix: str) -> LinearConfig | None:
        """How the linear of this checkpoint name is quantized; None: not at all."""
        return next((rule for pattern, rule in self.rules if pattern.match(prefix)), self.general)


def recognise(config: Mapping[str, object], headers: Mapping[str, TensorHeader]) -> Mapping[str, object] | None:
    """The configuration of a checkpoint that does not name its quant_method, if it is GPTQ's; else None.

    A quantize_config.json of AutoGPTQ names no method; desc_act is a word of GPTQ's alone.

    Args:
        config: what the checkpoint's files say; {} when they say nothing.
    """
    said = "desc_act" in config or (_format_key(config) is not None and _format_of(config) in FORMATS)
    return {**config, "quant_method": "gptq"} if said else None


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
    bits = next((changes[key] for key in _BITS_KEYS if key in changes), linear.bits)
    group_size = next((changes[key] for key in _GROUP_SIZE_KEYS if key in changes), linear.group_size)
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError(f"{where}: GPTQ checkpoints are read with 2 to 8 bits; this says {bits!r}.")
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise CheckpointError(f"{where}: group_size is a number of inputs, or -1 for all; found {group_size!r}.")
    symmetric, act_order = changes.get("sym"), changes.get("desc_act")
    if symmetric is None and "zero_point" in changes:
        symmetric = changes["zero_point"] is False
    return LinearConfig(
        bits=bits,
        group_size=group_size,
        symmetric=linear.symmetric if symmetric is None else bool(symmetric),
        act_order=linear.act_order if act_order is None else bool(act_order),
        format=linear.format,
    )


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
            bits = changes.get("bits")
            dense = isinstance(bits, int) and bits >= _DENSE_BITS
            rule = None if dense else _changed(general, changes, f"quantization_config: extra_config[{name!r}]")
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
