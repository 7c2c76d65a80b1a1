"""How a checkpoint is quantized: what its configuration says, or what plugins recognise by its tensors.

checkpoint headers -> [quantization config] -> need -> selection.
"""

from __future__ import annotations

from collections.abc import Mapping

from octavo.errors import PluginError
from octavo.interfaces.checkpoint import TensorHeader
from octavo.plugins.registry import Registry
from octavo.plugins.specs import QuantizationNeed, QuantizationSpec, load_target

_FORMAT_KEYS = ("quant_method", "method")
_PACKED_SUFFIX = ".qweight"
_BITS_KEYS = ("bits", "w_bit", "wbits")


def quantization_config(
    registry: Registry, found: Mapping[str, object], headers: Mapping[str, TensorHeader]
) -> Mapping[str, object]:
    """The checkpoint's quantization_config with its quant_method; {} for plain weights.

    Args:
        found: what the checkpoint's files say; {} when they say nothing. Where it names no quant_method, every
            quantization method is asked whether it recognises it or the tensors.

    Raises:
        PluginError: a plugin's `recognise` failed; the cause is chained.
    """
    for key in _FORMAT_KEYS:
        if isinstance(named := found.get(key), str):
            return {**found, "quant_method": named.lower()}
    for candidate in registry.candidates("quantization"):
        spec = candidate.spec
        if isinstance(spec, QuantizationSpec) and spec.recognise is not None:
            try:
                recognised = load_target(spec.recognise)(found, headers)
            except Exception as error:
                raise PluginError(
                    f"{candidate.full_name} ({candidate.plugin.distribution} {candidate.plugin.version}) failed to say "
                    f"whether it recognises the checkpoint: {type(error).__name__}: {error}"
                ) from error
            if recognised is not None:
                return dict(recognised)
    quantized = found or any(name.endswith(_PACKED_SUFFIX) for name in headers)
    return {**found, "quant_method": "unknown"} if quantized else {}


def quantization_need(config: Mapping[str, object], device: str, dtype: str) -> QuantizationNeed:
    """What to ask of quantization methods for a checkpoint with this quantization_config."""
    bits = next((config[key] for key in _BITS_KEYS if key in config), None)
    return QuantizationNeed(
        device=device,
        dtype=dtype,
        format=str(config.get("quant_method", "none")),
        bits=bits if isinstance(bits, int) else None,
        config=config,
    )
