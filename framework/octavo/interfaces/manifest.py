"""Manifest: what was chosen, as plain data. Whoever builds the model builds exactly this and discovers nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo.config import EngineConfig
from octavo.plugins.specs import AttentionNeed


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenComponent:
    """One selection's result."""

    kind: str
    plugin: str
    name: str
    target: str  # "package.module:Attribute"
    distribution: str
    version: str
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What to build.

    Attributes:
        model_path: folder or file, already on this machine.
        device, dtype: nothing is left at "auto".
        max_model_len: tokens, prompt and output.
        attention_need: what the attention backend was chosen for.
        components: the chosen component of each kind: checkpoint, model, quantization, attention, ...
    """

    model_path: str
    device: str
    dtype: str
    max_model_len: int
    config: EngineConfig
    attention_need: AttentionNeed
    components: Mapping[str, ChosenComponent]
