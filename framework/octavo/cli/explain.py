"""`octavo explain`: what would be chosen for a model, what refused and why, and where each setting is from."""

from __future__ import annotations

import argparse
import json

from octavo.cli.engine_options import add_engine_options, add_model_argument, engine_settings
from octavo.explanation import explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """1 when a socket has no component, so that an engine would not start."""
    explanation = explain(config=engine_settings(args))
    print(json.dumps(explanation.as_json(), indent=2) if args.json else explanation)
    return 0 if explanation.can_run else 1
