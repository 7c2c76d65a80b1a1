"""`octavo plan`: what a model takes of a device's memory, from its configuration alone, and what to change."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction

from octavo.cli.engine_options import add_engine_options, add_model_argument, engine_settings
from octavo.plan import Plan, make_plan

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    parser.add_argument(
        "--memory",
        type=parse_bytes,
        metavar="SIZE",
        help="of each device, 80GiB say: plan for it, be it here or not; without it this machine's",
    )
    parser.add_argument(
        "--tokens-per-request", type=int, metavar="N", help="a typical length, to count concurrent requests for"
    )
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """1 when it does not fit."""
    plan = make_plan(
        engine_settings(args).config,
        memory_bytes=args.memory,
        tokens_per_request=args.tokens_per_request,
    )
    print(json.dumps(as_json(plan), indent=2) if args.json else "\n".join(as_lines(plan)))
    return 0 if plan.fits else 1


def parse_bytes(text: str) -> int:
    """ "80GiB" and "80 GB" as bytes: KiB, MiB, GiB, TiB count by 1024; kB, MB, GB, TB by 1000; a plain number bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; write bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB"
        )
    return int(Fraction(match[1]) * _UNITS[match[2]])


# -------------------------------------------------------------------------------------------------------- JSON


def as_json(plan: Plan) -> dict[str, object]:
    """A plan as plain data; bytes are of one device."""
    found: dict[str, object] = {
        name: getattr(plan, name)
        for name in (
            *("model", "architecture", "device", "dtype", "max_model_len", "num_ranks", "fits"),
            *("weight_bytes", "rotary_bytes", "adapter_bytes", "activation_bytes", "checkpoint_bytes"),
            *("kv_bytes_per_token", "kv_cache_budget", "kv_cache_rule", "kv_cache_bytes", "num_blocks", "num_tokens"),
            *("longest_context", "max_concurrent_requests", "max_loras", "max_lora_rank", "tokens_per_request"),
        )
    }
    typical = plan.tokens_per_request
    return {
        **found,
        **{
            f"{name}_of_all_ranks": getattr(plan, name) * plan.num_ranks
            for name in ("weight_bytes", "rotary_bytes", "adapter_bytes", "kv_cache_bytes")
        },
        "block_size": plan.config.block_size,
        "kv_bytes_per_block": plan.sizes.kv_bytes_per_block,
        "bits_per_weight": plan.sizes.bits_per_weight,
        "concurrent_typical_requests": None if typical is None else plan.concurrent_requests(typical),
        "memory": asdict(plan.memory),
        "faults": list(plan.faults),
        "advice": [asdict(one) for one in plan.advice],
        "notes": list(plan.notes),
    }


# -------------------------------------------------------------------------------------------------------- text


def as_lines(plan: Plan) -> Iterator[str]:
    """A heading, a table of bytes, a table of counts, the verdict with its advice, and notes."""
    devices = f"{plan.num_ranks} {plan.device} devices" if plan.num_ranks > 1 else f"one {plan.device} device"
    yield f"{plan.model}: {plan.architecture} in {plan.dtype} on {devices}"
    yield ""
    yield from _table(list(_byte_rows(plan)))
    yield ""
    yield from _table(list(_count_rows(plan)))
    yield ""
    if plan.fits:
        yield "It fits."
        if plan.advice:
            yield f"For requests of up to {plan.max_model_len:,} tokens, any of these does:"
    else:
        yield "It does not fit."
        yield from plan.faults
        yield "Any of these does:" if plan.advice else "No single setting changes that."
    yield from (f"  - {one.sentence}" for one in plan.advice)
    yield from plan.notes


def _byte_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    def row(label: str, num_bytes: int, remark: str = "") -> tuple[str, ...]:
        total = (f"{num_bytes * plan.num_ranks:,}",) if plan.num_ranks > 1 else ()
        return (label, f"{num_bytes:,}", f"{num_bytes / 2**30:,.2f} GiB", *total, remark)

    if plan.num_ranks > 1:
        yield ("", "bytes of each", "", f"of all {plan.num_ranks}", "")
    on_disk = "" if plan.checkpoint_bytes is None else f"; {plan.checkpoint_bytes:,} on disk"
    yield row("memory", plan.memory.free_bytes, "as given" if plan.memory_is_given else "free on this machine")
    yield row("weights", plan.weight_bytes, f"{plan.sizes.bits_per_weight:.2f} bits a weight{on_disk}")
    yield row("rotary tables", plan.rotary_bytes, f"{plan.max_model_len:,} positions")
    if plan.max_loras:
        yield row("adapters", plan.adapter_bytes, f"{plan.max_loras} of rank {plan.max_lora_rank}")
    if plan.activation_bytes:
        yield row("activations", plan.activation_bytes, "estimated; an engine measures them")
    yield row("KV budget", plan.kv_cache_budget, plan.kv_cache_rule)
    yield row("KV cache", plan.kv_cache_bytes, f"{plan.sizes.kv_bytes_per_block:,} bytes a block")
    left = plan.free_bytes - plan.kv_cache_bytes
    unused = "" if plan.activation_bytes else "for activations"
    yield row("left over", left, unused) if left >= 0 else row("missing", -left)


def _count_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    yield ("KV bytes a token", f"{plan.kv_bytes_per_token:,}", "")
    yield ("blocks", f"{plan.num_blocks:,}", f"of {plan.config.block_size} tokens")
    yield ("room", f"{plan.num_tokens:,}", "tokens")
    yield ("longest context", f"{plan.longest_context:,}", f"tokens, of {plan.max_model_len:,}")
    most = f"at most max_num_seqs={plan.config.max_num_seqs}"
    length = plan.longest_context or plan.max_model_len
    yield ("requests at once", f"{plan.max_concurrent_requests:,}", f"of {length:,} tokens; {most}")
    if (typical := plan.tokens_per_request) is not None:
        yield ("", f"{plan.concurrent_requests(typical):,}", f"of {typical:,} tokens; {most}")


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Labels to the left, numbers to the right, the last column as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for label, *numbers, remark in rows:
        cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:-1], strict=True)]
        yield "  ".join(["", f"{label:<{widths[0]}}", *cells, remark]).rstrip()
