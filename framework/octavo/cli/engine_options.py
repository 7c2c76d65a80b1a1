"""EngineConfig as command-line options: one for each field, so that a new field needs no line here.

A component's own options follow its socket's name: `--attention.num-kv-splits 8`. They are told from the rest before
argparse sees them, because which there are depends on what is installed, and are checked where the other ways in are.
"""

from __future__ import annotations

import argparse
from typing import Any

from octavo.config import ComponentConfig, EngineConfig, PluginsConfig
from octavo.errors import ConfigError, PluginError
from octavo.plugins.options import options_model
from octavo.plugins.registry import Registry
from octavo.settings import Settings, parse_collection, parse_value, read_settings

Tree = dict[str, Any]

_DOTTED = tuple(
    name
    for name, field in EngineConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, (ComponentConfig, PluginsConfig))
)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, and `--max-model-len` and its kin, each named and defaulting as the field of EngineConfig."""
    group = parser.add_argument_group("engine")
    group.add_argument("--config", metavar="FILE", help="a YAML file with these settings; what is given here wins")
    for name, field in EngineConfig.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        default = field.get_default(call_default_factory=True)
        if isinstance(default, PluginsConfig):
            for key, inner in PluginsConfig.model_fields.items():
                group.add_argument(f"{option}.{key}", metavar="VALUE", help=_text(inner.description))
            continue
        shown = default.name if isinstance(default, ComponentConfig) else default
        if isinstance(default, (tuple, dict)):
            shown = "none"
        text = field.description if shown is None else f"{field.description} (default {shown})"
        if field.annotation is bool:
            group.add_argument(
                option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=_text(text)
            )
        elif isinstance(default, dict):
            words: Tree = {"nargs": "+", "action": "extend", "metavar": "NAME=VALUE"}
            group.add_argument(option, default=argparse.SUPPRESS, help=_text(text), **words)
        else:
            group.add_argument(option, default=argparse.SUPPRESS, metavar="VALUE", help=_text(text))
        if isinstance(default, ComponentConfig):
            group.add_argument(f"{option}.OPTION", metavar="VALUE", help=f"an option of that {name} component")
    parser.set_defaults(component_options={})


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, which is `--model` without its name."""
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="as --model; the demo model without one"
    )


def add_component_help(parser: argparse.ArgumentParser, registry: Registry) -> None:
    """For `--help`: the options of every installed component. Imports their options' models."""
    for kind in _DOTTED:
        for candidate in registry.candidates(kind) if kind != "plugins" else ():
            if candidate.spec.options is None:
                continue
            group = parser.add_argument_group(f"options of {kind} {registry.short_name(candidate)!r}")
            try:
                model = options_model(candidate.spec)
            except PluginError as error:
                group.description = _text(f"not known: {error}")
                continue
            assert model is not None
            for name, field in model.model_fields.items():
                default = field.get_default(call_default_factory=True)
                group.add_argument(
                    f"--{kind}.{name.replace('_', '-')}",
                    metavar="VALUE",
                    help=_text(f"{field.description or ''} (default {default})"),
                )


def split_component_options(arguments: list[str]) -> tuple[list[str], Tree]:
    """Tell `--scheduler.name fair`, `--attention.num-kv-splits=8` and their kin from the other arguments.

    Raises:
        ConfigError: one of them has no value.
    """
    rest: list[str] = []
    tree: Tree = {}
    words = iter(arguments)
    for word in words:
        if word == "--":
            return [*rest, word, *words], tree
        path, equals, text = word.removeprefix("--").partition("=")
        kind, *keys = path.replace("-", "_").split(".")
        if not (word.startswith("--") and keys and kind in _DOTTED):
            rest.append(word)
            continue
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"{word} needs a value: {word} VALUE.")
            text = following
        node = tree.setdefault(kind, {})
        for key in keys[:-1]:
            node = node.setdefault(key, {}) if isinstance(node.get(key, {}), dict) else {"name": node[key]}
        node[keys[-1]] = text if kind == "plugins" else parse_value(text)
    return rest, tree


def engine_settings(args: argparse.Namespace) -> Settings:
    """The settings that were given over those of the file and the environment.

    Raises:
        ConfigError: unknown settings (the nearest name is given) and wrong values.
    """
    given: Tree = {name: getattr(args, name) for name in EngineConfig.model_fields if hasattr(args, name)}
    given = {name: parse_collection(name, one) if isinstance(one, str) else one for name, one in given.items()}
    for name, options in args.component_options.items():
        named = given.get(name)
        given[name] = options if named is None else {"name": named, **options}
    return read_settings(given, args.config, given_as="flag")


def plugin_settings(arguments: list[str]) -> PluginsConfig:
    """Which plugins may load: of `--plugins.*`, the environment and the configuration file, the rest left unread.

    Raises:
        ConfigError: as `engine_settings`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    rest, tree = split_component_options(arguments)
    args, _ = parser.parse_known_args(rest)
    return read_settings({"plugins": tree.get("plugins", {})}, args.config, given_as="flag").config.plugins


def _text(text: str | None) -> str:
    """argparse fills in %-formats of help texts."""
    return (text or "").replace("%", "%%")
