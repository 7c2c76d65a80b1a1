"""`octavo plugins`: every plugin with its state, and what it brings."""

from __future__ import annotations

import argparse
import json

from octavo.plugins.host import Plugin, discover


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON list, for programs")


def run(args: argparse.Namespace) -> int:
    """Always 0: a plugin that failed is what this command is there to show."""
    plugins = discover()
    if args.json:
        print(json.dumps([as_json(plugin) for plugin in plugins], indent=2))
    else:
        print("\n\n".join(as_text(plugin) for plugin in plugins))
    return 0


def as_json(plugin: Plugin) -> dict[str, object]:
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
            for spec in plugin.specs
        ],
    }


def as_text(plugin: Plugin) -> str:
    """A heading, the reason when it did not load, and one line a component."""
    brought_by = f"  {plugin.distribution} {plugin.version}" if plugin.distribution else ""
    lines = [f"{plugin.name}  {plugin.state}{brought_by}"]
    if plugin.reason:
        lines.append(f"  {plugin.reason}")
    if plugin.location:
        lines.append(f"  at {plugin.location}")
    rows = [(spec.kind, spec.name, spec.summary) for spec in plugin.specs]
    kind_width = max((len(kind) for kind, _, _ in rows), default=0)
    name_width = max((len(name) for _, name, _ in rows), default=0)
    lines += [f"  {kind:<{kind_width}}  {name:<{name_width}}  {summary}".rstrip() for kind, name, summary in rows]
    return "\n".join(lines)
