"""`octavo generate`: complete prompts, or answer them as chat, and print the text as it comes."""

from __future__ import annotations

import argparse
import sys

from octavo.cli.engine_options import add_engine_options, engine_settings
from octavo.cli.sampling_options import add_sampling_options, sampling_params
from octavo.cli.show import print_summary, print_text
from octavo.errors import RequestError
from octavo.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to complete; without one, standard input")
    parser.add_argument("--chat", action="store_true", help="ask each prompt as a user's message, through the template")
    add_sampling_options(parser, max_tokens=128)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    prompts = args.prompts or [sys.stdin.read()]
    if not all(prompt.strip() for prompt in prompts):
        raise RequestError("The prompt is empty: give a text, or send one on standard input.")
    with LLM(config=engine_settings(args)) as llm:
        for prompt in prompts:
            if len(prompts) > 1:
                print(f">>> {prompt}")
            if args.chat:
                conversation = [{"role": "user", "content": prompt}]
                print_text(llm.stream_chat(conversation, params, adapter=args.adapter))
            else:
                print_text(llm.stream(prompt, params, adapter=args.adapter))
        print_summary(llm, file=sys.stderr)
    return 0
