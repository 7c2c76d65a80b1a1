"""An AWQ quantization_config: what is read of it, which checkpoints are AWQ's without saying so, which are refused.

Imports no torch: it is asked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.errors import CheckpointError
from octavo.plugins.specs import Need, QuantizationNeed

if TYPE_CHECKING:
    from octavo.interfaces import TensorHeader

VERSIONS = ("gemm", "gemv")
DEFAULT_GROUP_SIZE = 128

_VERSION_KEYS = ("version", "checkpoint_format", "format")
_ORIGINAL_KEYS = ("w_bit", "q_group_size")
TAKE_GEMM = 'Take a checkpoint of version "gemm", which nearly all are, or quantize the model again with that version.'
_REAL_ZEROS = "it stores -scale * zero rounded to 16 bits, and zeros are whole numbers here"
_REFUSED = {
    "marlin": "it stores weights in the tiles of Marlin's GPU kernels",
    "gemv_fast": _REAL_ZEROS,
    "llm-awq": _REAL_ZEROS,
}
_OF_AWQ_ALONE = (*VERSIONS, "gemv_fast", "llm-awq")
"""Marlin is also a version of GPTQ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AWQConfig:
    """A checkpoint's quantization_config.

    Attributes:
        version: how tensors are laid out, in lower case: "gemm" or "gemv".
        group_size: inputs that share a scale; -1: all.
        zero_point: whether zeros are stored; else each is 8.
        dense: parts of the names of linears that are plain weights.
        head: whether the head is quantized, too.
    """

    version: str
    group_size: int
    zero_point: bool
    dense: tuple[str, ...]
    head: bool

    @classmethod
    def read(cls, config: Mapping[str, object]) -> AWQConfig:
        """Of a config.json's quantization_config, a quantize_config.json or an original quant_config.json.

        Raises:
            CheckpointError: its version, group size or bits are not read here.
        """
        bits, version = config.get("bits", config.get("w_bit", 4)), version_of(config)
        if bits != 4:
            raise CheckpointError(f"quantization_config: AWQ checkpoints are read with 4 bits; this one has {bits!r}.")
        if version not in VERSIONS:
            raise CheckpointError(f"quantization_config: {_refusal(version)}")
        group_size = config.get("group_size", config.get("q_group_size", DEFAULT_GROUP_SIZE))
        if not isinstance(group_size, int) or group_size < -1 or group_size == 0:
            raise CheckpointError(
                f"quantization_config: group_size is a number of inputs, or -1 for all; found {group_size!r}."
            )
        named = config.get("modules_to_not_convert")
        return cls(
            version=version,
            group_size=group_size,
            zero_point=config.get("zero_point") is not False,
            dense=tuple(map(str, named)) if isinstance(named, list | tuple) else (),
            head=config.get("lm_head") is True,
        )

    def group_size_of(self, in_features: int) -> int:
        """Of a linear with so many inputs."""
        return in_features if self.group_size == -1 else self.group_size


def version_of(config: Mapping[str, object]) -> str:
    """How its tensors are laid out, in lower case; "gemm" when it does not say."""
    named = next((config[key] for key in _VERSION_KEYS if config.get(key) is not None), "gemm")
    return str(named).lower()


def recognise(config: Mapping[str, object], headers: Mapping[str, TensorHeader]) -> Mapping[str, object] | None:
    """The configuration of a checkpoint that does not name its quant_method, if it is AWQ's; else None.

    An original quant_config.json (w_bit, q_group_size, zero_point, version) is known by its keys. Tensors are known by
    their shapes, as version "gemm": only there all three lie [.., N] or [.., N / 8]. Neither is asked where something
    is GPTQ's alone: desc_act in the configuration, or a g_idx of any linear.

    Args:
        config: what the checkpoint's files say; {} when they say nothing.
    """
    if "desc_act" in config or any(name.endswith(".g_idx") for name in headers):
        return None
    says_version = any(config.get(key) is not None for key in _VERSION_KEYS)
    if any(key in config for key in _ORIGINAL_KEYS) or (says_version and version_of(config) in _OF_AWQ_ALONE):
        return {**config, "quant_method": "awq"}
    prefix = next((name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")), None)
    qweight, scales, qzeros = (headers.get(f"{prefix}.{name}") for name in ("qweight", "scales", "qzeros"))
    if qweight is None or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
        return None
    (in_features, num_words), (num_groups, out_features) = qweight.shape, scales.shape
    if num_words * 8 != out_features or num_groups < 1 or in_features % num_groups:
        return None
    if qzeros is not None and qzeros.shape != (num_groups, num_words):
        return None
    found = {"bits": 4, "version": "gemm", "group_size": in_features // num_groups, "zero_point": qzeros is not None}
    return {**found, **config, "quant_method": "awq"}


def reasons_against(need: Need) -> list[str]:
    """Why a checkpoint of format "awq" cannot be read, in sentences; none when it can."""
    assert isinstance(need, QuantizationNeed)
    version = version_of(need.config)
    return [] if version in VERSIONS else [_refusal(version)]


def _refusal(version: str) -> str:
    why = _REFUSED.get(version, "it is not a version that is known")
    return f"reads AWQ checkpoints of version {' and '.join(VERSIONS)}, not {version!r}: {why}. {TAKE_GEMM}"
