"""`octavo eval perplexity`: how well a model foretells a text, as a table or JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from octavo.cli.engine_options import add_engine_options, add_model_argument, engine_settings
from octavo.cli.env import describe
from octavo.errors import ConfigError
from octavo.llm import LLM
from octavo.perplexity import Perplexity, perplexity

_LONGEST = "max_model_len"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("perplexity",), help="of a text: exp of the mean negative logprob of a token")
    add_model_argument(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--text", type=Path, required=True, metavar="FILE", help="what the model reads, in UTF-8")
    group.add_argument(
        "--window",
        type=_window,
        default=256,
        metavar="N",
        help=f"tokens that are read at a time, without those before them; {_LONGEST} for as many as there is room for "
        "(default 256)",
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="read the text's first tokens only")
    group.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    text = _read(args.text)
    settings = engine_settings(args)
    with LLM(config=settings) as llm:
        start = time.monotonic()
        measured = perplexity(llm, text, args.window, args.max_tokens)
        seconds = time.monotonic() - start
    if args.json:
        found = {
            "evaluated": args.what,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": settings.config.model,
            "text": str(args.text),
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            **asdict(measured),
            "elapsed_seconds": seconds,
            "device": llm.manifest.device,
            "dtype": llm.manifest.dtype,
            "components": {kind: one.full_name for kind, one in llm.manifest.components.items()},
            "engine": settings.config.model_dump(mode="json"),
            "machine": describe(),
        }
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_lines(llm, args.text, measured, seconds)))
    return 0


def _window(text: str) -> int | None:
    if text == _LONGEST:
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; give one, or {_LONGEST}") from None


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read: {error}. Give a text file in UTF-8.") from error
    if not text.strip():
        raise ConfigError(f"--text {path} is empty; perplexity is of a text.")
    return text


def _lines(llm: LLM, path: Path, measured: Perplexity, seconds: float) -> Iterator[str]:
    yield f"{llm.config.model}, perplexity of {path}, on {llm.manifest.device} in {llm.manifest.dtype}"
    yield ""
    yield f"  perplexity       {measured.value:>12,.4f}"
    yield f"  tokens           {measured.num_tokens:>12,}"
    yield f"  scored tokens    {measured.num_scored_tokens:>12,}"
    yield f"  windows          {measured.num_windows:>12,}"
    yield f"  tokens a window  {measured.window:>12,}"
    yield f"  seconds          {seconds:>12,.2f}"
