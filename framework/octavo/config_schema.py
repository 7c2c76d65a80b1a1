"""What a configuration may hold, given what is installed: checked component by component, or as a JSON schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from octavo.config import ComponentConfig, EngineConfig
from octavo.errors import ConfigError, PluginError
from octavo.plugins.options import checked_options, options_model
from octavo.plugins.registry import Registry
from octavo.plugins.specs import Spec

SCHEMA = "https://json-schema.org/draft/2020-12/schema"
KINDS = ("attention", "quantization", "linear_kernel", "kernels", "scheduler", "executor", "proposer", "lora")

_LISTED_ADAPTERS: dict[str, Any] = {
    "type": "array",
    "items": {
        "anyOf": [
            {"type": "string", "pattern": "^[^={][^=]*=."},
            {
                "type": "object",
                "properties": {key: {"type": "string", "minLength": 1} for key in ("name", "path")},
                "required": ["name", "path"],
                "additionalProperties": False,
            },
        ]
    },
}
"""The setting lora_modules as a list of "name=path" or {"name": ..., "path": ...}."""


def check_components(registry: Registry, config: EngineConfig) -> None:
    """Check that every component named is installed and takes its options.

    Raises:
        UnknownNameError, UnavailableComponentError, ConfigError: of the first that is not or does not.
    """
    for kind, wish in _wishes(config):
        if wish.name != "auto":
            checked_options(registry.find(kind, wish.name).spec, wish.options)
        elif wish.options:
            _check_options_of_any(registry, kind, wish)


def _check_options_of_any(registry: Registry, kind: str, wish: ComponentConfig) -> None:
    """Options without a name go to whichever component is taken; one at least must take them."""
    faults = []
    for candidate in registry.candidates(kind):
        try:
            checked_options(candidate.spec, wish.options)
        except ConfigError as error:
            faults.append(str(error))
        else:
            return
    raise ConfigError(f"No {kind} component takes these options: {' '.join(faults)}")


def config_schema(registry: Registry) -> dict[str, Any]:
    """The JSON schema (2020-12) of a configuration file: EngineConfig, each socket with its installed components.

    A component whose options cannot be described, because their model does not import, is allowed any.
    """
    schema = {"$schema": SCHEMA, **EngineConfig.model_json_schema()}
    schema["title"] = "Octavo configuration"
    schema["description"] = "Settings of an engine, as `--config FILE` reads them."
    definitions = schema["$defs"]
    for unused in ("AttentionConfig", "ComponentConfig"):
        definitions.pop(unused)
    for kind in KINDS:
        default = EngineConfig.model_fields[kind].default.name
        described = {"description": schema["properties"][kind]["description"], "default": default}
        components = list(_component_schemas(registry, kind, definitions, {"auto", default}))
        if kind == "attention":
            definitions["attention_side"] = {"anyOf": components}
            components += _with_sides(registry, definitions)
        schema["properties"][kind] = {**described, "anyOf": components}
    by_name = schema["properties"]["lora_modules"]
    described = {key: by_name.pop(key) for key in ("description", "title") if key in by_name}
    schema["properties"]["lora_modules"] = {**described, "anyOf": [by_name, _LISTED_ADAPTERS]}
    for kind in ("logits_rule", "adapter_resolver"):
        several = list(_component_schemas(registry, kind, definitions, set()))
        schema["properties"][f"{kind}s"] |= {"items": {"anyOf": several}}
    return schema


def _component_schemas(
    registry: Registry, kind: str, definitions: dict[str, Any], words: set[str]
) -> Iterator[dict[str, Any]]:
    """A name or one of `words` alone, or a component with its options, which may go without its name."""
    candidates = registry.candidates(kind)
    names = {registry.short_name(one) for one in candidates} | {one.full_name for one in candidates}
    yield {"enum": sorted(words | names)}
    for candidate in candidates:
        definition = f"{kind}:{candidate.full_name}"
        definitions[definition] = _options_schema(candidate.spec, definitions)
        definitions[definition]["properties"]["name"] = {
            "enum": sorted({registry.short_name(candidate), candidate.full_name} | ({"auto"} & words))
        }
        yield {"$ref": f"#/$defs/{definition.replace('/', '~1')}"}


def _with_sides(registry: Registry, definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Attention with sides of its own: beside no name, or beside a component that serves the side not named."""
    sides = {side: {"$ref": "#/$defs/attention_side"} for side in ("prefill", "decode")}
    for candidate in registry.candidates("attention"):
        whole = definitions[f"attention:{candidate.full_name}"]
        yield {**whole, "properties": {**whole["properties"], **sides}}


def _options_schema(spec: Spec, definitions: dict[str, Any]) -> dict[str, Any]:
    try:
        model = options_model(spec)
    except PluginError as error:
        return {"type": "object", "description": f"{spec.summary} (options not known: {error})", "properties": {}}
    if model is None:
        return {"type": "object", "description": spec.summary, "properties": {}, "additionalProperties": False}
    schema = model.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(schema.pop("$defs", {}))
    return {**schema, "description": spec.summary, "additionalProperties": False}


def _wishes(config: EngineConfig) -> Iterator[tuple[str, ComponentConfig]]:
    for side in config.attention.wishes:
        yield "attention", side
    yield "quantization", config.quantization
    yield "linear_kernel", config.linear_kernel
    yield "kernels", config.kernels
    yield "scheduler", config.scheduler
    yield "executor", config.executor
    if config.proposer.name != "none":
        yield "proposer", config.proposer
    for rule in config.logits_rules:
        yield "logits_rule", rule
    yield "lora", config.lora
    for resolver in config.adapter_resolvers:
        yield "adapter_resolver", resolver
