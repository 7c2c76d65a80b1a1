"""The `octavo` command: finds the sub-command among the installed components, imports that one module and runs it.

A sub-command is a module with `add_arguments(parser)` and `run(args) -> int`, named by a CommandSpec. Nothing heavy
is imported before one is named, so `octavo --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from octavo import __version__
from octavo.errors import OctavoError, PluginError, UnavailableComponentError
from octavo.plugins.host import PluginRules, discover
from octavo.plugins.registry import Candidate, Registry
from octavo.plugins.specs import Need, load_target


class Command(Protocol):
    """What a CommandSpec's target module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the sub-command's options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the result is the process's exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo` with these arguments (the process's own by default).

    Returns:
        The exit status: 0, what the sub-command returns, 1 for an error raised on purpose, 130 for Ctrl-C.
        Like any argparse program it raises SystemExit for --help, --version and wrong options.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, `head` say, has seen enough; the interpreter's own flush must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    registry = Registry(discover(_plugin_rules(arguments)))
    if not arguments or arguments[0].startswith("-"):
        parser = _main_parser(registry)
        parser.parse_args(arguments)
        parser.print_help()
        return 0
    candidate = registry.find("command", arguments[0])
    command = _load(candidate)
    parser = argparse.ArgumentParser(prog=f"octavo {arguments[0]}", description=candidate.spec.summary)
    command.add_arguments(parser)
    rest = arguments[1:]
    if parser.get_default("component_options") is None:
        return command.run(parser.parse_args(rest))
    from octavo.cli.engine_options import add_component_help, split_component_options

    if "--help" in rest or "-h" in rest:
        add_component_help(parser, registry)
    rest, component_options = split_component_options(rest)
    return command.run(parser.parse_args(rest, argparse.Namespace(component_options=component_options)))


def _plugin_rules(arguments: list[str]) -> PluginRules | None:
    """Which plugins may load, where the arguments or a configuration file have a say: before any is imported."""
    if "OCTAVO_CONFIG" not in os.environ and not any(word.startswith(("--plugins.", "--config")) for word in arguments):
        return None
    from octavo.cli.engine_options import plugin_settings

    return PluginRules(**plugin_settings(arguments).model_dump())


def _main_parser(registry: Registry) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo",
        description="Serve large language models from plugins.",
        epilog="`octavo COMMAND --help` tells a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for candidate in registry.candidates("command"):
        # argparse fills in %-formats of help texts
        commands.add_parser(registry.short_name(candidate), help=candidate.spec.summary.replace("%", "%%"))
    return parser


def _load(candidate: Candidate) -> Command:
    if reasons := candidate.spec.why_not(Need()):
        raise UnavailableComponentError(f"`octavo {candidate.spec.name}` cannot run here: {'; '.join(reasons)}.")
    module = load_target(candidate.spec.target)
    if missing := [name for name in ("add_arguments", "run") if not callable(getattr(module, name, None))]:
        raise PluginError(
            f"{candidate.spec.target}, the command {candidate.full_name}, has no {' and no '.join(missing)}: "
            "a command's module offers add_arguments(parser) and run(args) -> int."
        )
    return cast(Command, module)
