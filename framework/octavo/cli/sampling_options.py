"""SamplingParams as command-line options. `--seed` is the engine's, which gives every request its own."""

from __future__ import annotations

import argparse

from octavo.sampling_params import SamplingParams


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Add the sampling options; `max_tokens` is this command's default."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default {max_tokens}")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1.0, all tokens")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="default 0, all tokens")
    group.add_argument("--adapter", metavar="NAME", help="answer with this LoRA adapter (--enable-lora)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be given again")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the options say; RequestError when they contradict each other."""
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        stop=args.stop,
    )
