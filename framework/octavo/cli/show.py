"""Printing a stream of text, and what an engine has done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from octavo.llm import LLM
from octavo.outputs import RequestOutput


def print_text(stream: Iterable[RequestOutput], *, can_be_stopped: bool = False) -> str:
    """Print a growing output piece by piece and return its text.

    Args:
        can_be_stopped: Ctrl-C ends the text and keeps what is there; else it ends the line and is raised again.
    """
    text = ""
    try:
        for output in stream:
            print(output.outputs[0].text[len(text) :], end="", flush=True)
            text = output.outputs[0].text
    except KeyboardInterrupt:
        print(" [stopped]", end="" if can_be_stopped else "\n", flush=True)
        if not can_be_stopped:
            raise
    print()
    return text


def print_summary(llm: LLM, file: TextIO | None = None) -> None:
    """Tokens a second, the KV cache's use, and the chosen components."""
    stats, manifest = llm.stats(), llm.manifest
    rate = stats.num_output_tokens / stats.busy_seconds if stats.busy_seconds else 0.0
    tokens = stats.num_blocks * stats.block_size
    components = ", ".join(f"{kind} {chosen.plugin}/{chosen.name}" for kind, chosen in manifest.components.items())
    print(
        f"\n{stats.num_output_tokens} tokens, {rate:.1f} tokens/s on {manifest.device} in {manifest.dtype}\n"
        f"KV cache: at most {stats.kv_usage_peak * tokens:,.0f} of {tokens:,} tokens' room used, "
        f"{100 * stats.kv_waste:.1f} % of it wasted\n{components}",
        file=file,
    )
