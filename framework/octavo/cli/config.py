"""`octavo config`: check a configuration without a model, or print the JSON schema of everything installed."""

from __future__ import annotations

import argparse
import json

from octavo.cli.engine_options import add_engine_options, engine_settings
from octavo.config_schema import check_components, config_schema
from octavo.plugins.registry import default_registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("check", "schema"),
        help="check: names, types and components' options of what is set, and where each is from; "
        "schema: the JSON schema of a configuration file with the components that are installed",
    )
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    settings = engine_settings(args)
    registry = default_registry(settings.config.plugins)
    if args.action == "schema":
        print(json.dumps(config_schema(registry), indent=2))
        return 0
    check_components(registry, settings.config)
    width = max(map(len, settings.sources), default=0)
    for name, source in sorted(settings.sources.items()):
        print(f"{name:<{width}}  {source}")
    print(f"{len(settings.sources)} settings given, all of them valid; the others have their defaults.")
    return 0
