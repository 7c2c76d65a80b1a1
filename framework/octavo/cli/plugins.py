"""`octavo plugins`: every plugin with its state, and what it brings; with a name, everything of one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches

from octavo.errors import PluginError, UnknownNameError
from octavo.plugins.host import Plugin, discover
from octavo.plugins.known_packages import package_of_plugin
from octavo.plugins.options import options_model
from octavo.plugins.specs import Spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show this plugin alone, with every field of its components")
    parser.add_argument("--json", action="store_true", help="print one JSON list, for programs")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 when a plugin did not load")


def run(args: argparse.Namespace) -> int:
    """0 without --strict: a plugin that failed is what this command is there to show."""
    plugins = discover()
    shown = _named(args.name, plugins) if args.name else plugins
    detailed = args.name is not None
    if args.json:
        print(json.dumps([as_json(plugin, detailed) for plugin in shown], indent=2, default=str))
    else:
        print("\n\n".join(as_text(plugin, detailed) for plugin in shown))
    return int(args.strict and any(plugin.faulty for plugin in shown))


def as_json(plugin: Plugin, detailed: bool = False) -> dict[str, object]:
    """A plugin as plain data."""
    return {
        "name": plugin.name,
        "state": plugin.state.value,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
        "reason": plugin.reason,
        "location": plugin.location,
        "components": [
            {"kind": spec.kind, "name": spec.name, "summary": spec.summary, "target": spec.target}
            | (dict(_details(spec)) if detailed else {})
            for spec in plugin.specs
        ],
    }


def as_text(plugin: Plugin, detailed: bool = False) -> str:
    """A heading, the reason when it did not load, and one line a component; when detailed, one a field."""
    brought_by = f"  {plugin.distribution} {plugin.version}" if plugin.distribution else ""
    lines = [f"{plugin.name}  {plugin.state}{brought_by}"]
    if plugin.reason:
        lines.append(f"  {plugin.reason}")
    if plugin.location:
        lines.append(f"  at {plugin.location}")
    kind_width = max((len(spec.kind) for spec in plugin.specs), default=0)
    name_width = max((len(spec.name) for spec in plugin.specs), default=0)
    for spec in plugin.specs:
        lines.append(f"  {spec.kind:<{kind_width}}  {spec.name:<{name_width}}  {spec.summary}".rstrip())
        if detailed:
            lines += [
                f"    {field:<12}  {text}"
                for field, value in _details(spec)
                if (text := _text(value) or _WHEN_EMPTY.get(field))
            ]
    return "\n".join(lines)


def _named(name: str, plugins: tuple[Plugin, ...]) -> list[Plugin]:
    """The plugin of this name; several when they conflict."""
    if found := [plugin for plugin in plugins if plugin.name == name]:
        return found
    known = [plugin.name for plugin in plugins]
    near = get_close_matches(name, known, n=1)
    hint = package_of_plugin(name) or (f"Did you mean {near[0]!r}?" if near else "")
    raise UnknownNameError(f"No plugin named {name!r}. Installed: {', '.join(known)}. {hint}".rstrip())


def _details(spec: Spec) -> Iterator[tuple[str, object]]:
    """Every field beside name and summary as plain data; the options with their defaults."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name == "options":
            yield "options", _options(spec)
        elif field.name not in ("name", "summary"):
            yield field.name, sorted(value) if isinstance(value, frozenset) else value


def _options(spec: Spec) -> object:
    """Each option's default by its name; or why they cannot be told."""
    try:
        model = options_model(spec)
    except PluginError as error:
        return str(error)
    if model is None:
        return {}
    return {
        name: "required" if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in model.model_fields.items()
    }


_WHEN_EMPTY = {"devices": "any", "dtypes": "any"}


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={default!r}" for key, default in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
