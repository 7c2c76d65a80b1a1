"""Manifest: what was chosen, as plain data. Whoever builds the model builds exactly this and discovers nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import PluginError
from octavo.plugins.specs import SPEC_KINDS, AttentionNeed, load_target


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenComponent:
    """One selection's result.

    Attributes:
        target: "package.module:Attribute".
        options_model: "package.module:PydanticModel" that checked `options`; None when it takes none.
        options: its settings, defaults filled in, as plain data.
    """

    kind: str
    plugin: str
    name: str
    target: str
    distribution: str
    version: str
    options_model: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        return f"{self.plugin}/{self.name}"

    def build(self, *arguments: object) -> Any:
        """Construct the component with its socket's arguments, and with `options=` when it has an options model.

        Raises:
            PluginError: the target or its options model cannot be imported; says whose they are, the cause is chained.
        """
        try:
            make = load_target(self.target)
            model = None if self.options_model is None else load_target(self.options_model)
        except PluginError as error:
            raise PluginError(
                f"{SPEC_KINDS[self.kind].noun} {self.full_name} ({self.distribution} {self.version}) "
                f"cannot be loaded: {error}"
            ) from error
        return make(*arguments) if model is None else make(*arguments, options=model(**self.options))


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What to build.

    Attributes:
        model_path: folder or file, already on this machine.
        device, dtype: nothing is left at "auto".
        max_model_len: tokens, prompt and output.
        attention_need: what the attention backends were chosen for.
        components: the chosen component of each socket: "checkpoint", "model", "quantization", "attention.prefill",
            "attention.decode" (often the same), "scheduler", "executor", and where they were asked for
            "proposer" and "lora".
        logits_rules: those that apply, in the order they do.
        quantization_config: the checkpoint's, its quant_method found; {} for plain weights.
        linear_kernels: those that are asked for each quantized linear, the preferred first.
        adapter_resolvers: those that are asked for an unknown LoRA adapter, in their order.
        draft_model: what the proposer's own model is built of, where it has one.
    """

    model_path: str
    device: str
    dtype: str
    max_model_len: int
    config: EngineConfig
    attention_need: AttentionNeed
    components: Mapping[str, ChosenComponent]
    logits_rules: tuple[ChosenComponent, ...] = ()
    quantization_config: Mapping[str, object] = field(default_factory=dict)
    linear_kernels: tuple[ChosenComponent, ...] = ()
    adapter_resolvers: tuple[ChosenComponent, ...] = ()
    draft_model: Manifest | None = None
