"""EngineConfig as command-line options: one for each field, so that a new field needs no line here."""

from __future__ import annotations

import argparse
from typing import Any

from octavo.config import ComponentConfig, EngineConfig


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add `--max-model-len` and its kin, each named and defaulting as the field of EngineConfig."""
    group = parser.add_argument_group("engine")
    for name, field in EngineConfig.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        default = field.get_default(call_default_factory=True)
        shown = default.name if isinstance(default, ComponentConfig) else default
        text = field.description if shown is None else f"{field.description} (default {shown})"
        if field.annotation is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(option, default=argparse.SUPPRESS, metavar="VALUE", help=text)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given; EngineConfig checks them and reads their types."""
    return {name: getattr(args, name) for name in EngineConfig.model_fields if hasattr(args, name)}
