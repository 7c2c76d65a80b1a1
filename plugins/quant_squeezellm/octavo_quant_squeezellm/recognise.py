"""What a SqueezeLLM checkpoint is known by: the names in its folder and of its tensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.interfaces import TensorHeader
from octavo.plugins.specs import CheckpointNeed

FORMAT = "squeezellm"

_OF_TRAINING = ("optimizer", "scheduler", "rng_state", "training_args")
"""What the names begin with of a .pt that trainers leave beside the weights."""


def recognise(config: Mapping[str, object], headers: Mapping[str, TensorHeader]) -> Mapping[str, object] | None:
    """The quantization_config with its quant_method, when tensors or configuration are SqueezeLLM's; else None.

    Args:
        config: as the files have it: {} or the tool's own {"wbits": 4}; names no quant_method.
        headers: {} when no weights are there yet, and then the configuration alone is known.
    """
    known = any(name.endswith(".lookup_table") for name in headers) if headers else set(config) == {"wbits"}
    return {**config, "quant_method": FORMAT} if known else None


def why_not(need: CheckpointNeed) -> list[str]:
    """Reasons why a folder's weights are not in the tool's own .pt."""
    pickles = [name for name in need.filenames if name.endswith(".pt")]
    tensors = [name for name in need.filenames if name.endswith((".safetensors", ".bin"))]
    if tensors:
        return [f"reads folders whose weights are in a .pt alone; this one has {tensors[0]}"]
    if len(pickles) != 1:
        found = ", ".join(pickles) or "none"
        return [f"reads folders with exactly one .pt file; this one has {len(pickles)} ({found})"]
    if pickles[0].startswith(_OF_TRAINING):
        return [f"reads weights; the one .pt of this folder, {pickles[0]}, is of a training run's state"]
    return []
