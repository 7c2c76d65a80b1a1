"""`octavo chat`: a conversation in the terminal, answers as they come."""

from __future__ import annotations

import argparse
import sys

from octavo.cli.engine_options import add_engine_options, engine_settings
from octavo.cli.sampling_options import add_sampling_options, sampling_params
from octavo.cli.show import print_summary, print_text
from octavo.errors import RequestError
from octavo.llm import LLM

_HELP = "Type a message; /clear begins anew, /exit or Ctrl-D ends, Ctrl-C ends the answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_options(parser, max_tokens=512)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    beginning = [{"role": "system", "content": args.system}] if args.system else []
    with LLM(config=engine_settings(args)) as llm:
        if sys.stdin.isatty():
            import readline  # noqa: F401  arrow keys and history in input()

            print(_HELP)
        messages = list(beginning)
        while (line := _read()) is not None:
            if line == "/exit":
                break
            if line == "/clear":
                messages = list(beginning)
            elif line:
                question = {"role": "user", "content": line}
                try:
                    stream = llm.stream_chat([*messages, question], params, adapter=args.adapter)
                    answer = print_text(stream, can_be_stopped=True)
                except RequestError as error:  # too long by now, say; the conversation so far stands
                    print(f"error: {error}", file=sys.stderr)
                    continue
                messages += [question, {"role": "assistant", "content": answer}]
        print_summary(llm, file=sys.stderr)
    return 0


def _read() -> str | None:
    """The next line; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
