"""How long an engine takes from the call of LLM() to its first request, and what it made of its memory."""

from __future__ import annotations

import time

from gpu_parts.part import Part
from octavo import LLM


def report_start(part: Part, llm: LLM, what: str, begin: float, target_seconds: float | None = None) -> None:
    """Add the row of a start that began at `begin`, seconds of `time.monotonic()`; imports are done by then."""
    seconds = time.monotonic() - begin
    report = llm.start_report
    part.add(
        "start",
        what=what,
        seconds=seconds,
        target=target_seconds,
        met=None if target_seconds is None else seconds < target_seconds,
        phases=", ".join(f"{name} {duration:.2f} s" for name, duration in report.phases),
        kv_blocks=report.num_blocks,
        kv_gib=report.kv_cache_bytes / 2**30,
        weight_gib=report.weight_bytes / 2**30,
        components=", ".join(f"{kind} {chosen.name}" for kind, chosen in llm.manifest.components.items()),
    )
