"""Manifest: what was chosen, as plain data. Whoever builds the model builds exactly this and discovers nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo.config import EngineConfig


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
    """The model's path, the chosen component of each kind, and the configuration with nothing left at "auto"."""

    model_path: str
    device: str
    dtype: str
    max_model_len: int
    config: EngineConfig
    components: Mapping[str, ChosenComponent]  # by kind: checkpoint, model, quantization, attention, ...
