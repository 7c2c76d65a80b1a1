"""`octavo bench throughput|latency`: how fast a model is here, by the field's definitions, as a table or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from octavo.bench.measure import Latency, Spread, Throughput, measure_latency, measure_throughput
from octavo.bench.prompts import random_prompts, read_prompts
from octavo.cli.engine_options import add_engine_options, add_model_argument, engine_settings
from octavo.cli.env import describe
from octavo.demo_model import cache_folder
from octavo.errors import ConfigError
from octavo.input_processor import Prompt
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

_DEFAULTS = {
    # input_len, output_len, num_prompts, batch_size, num_iters_warmup, num_iters
    "throughput": (128, 128, 64, 1, 1, 1),
    "latency": (32, 128, None, 8, 10, 30),
}

_WARM_UP_LEN = 16
"""Tokens of a prompt before a dataset is measured."""
_SEEDS = 100_000
"""Runs that one --seed has prompts for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=tuple(_DEFAULTS), help="many prompts at once, or one batch after the other")
    add_model_argument(parser)
    group = parser.add_argument_group("measurement")

    def add(name: str, text: str) -> None:
        group.add_argument(f"--{name}", type=_at_least_1, metavar="N", help=text)

    add("input-len", "tokens of a random prompt (default 128; latency 32)")
    add("output-len", "output tokens of each prompt, the end of sequence passed over (default 128)")
    add("num-prompts", "throughput: how many come at once (default 64, or all of the dataset)")
    add("batch-size", "latency: prompts in a batch (default 8); with 1 it is streamed, and has ITL")
    add("num-iters", "latency: batches that are measured (default 30)")
    group.add_argument(
        "--num-iters-warmup", type=_at_least_0, metavar="N", help="runs before it, not measured (1; latency 10)"
    )
    group.add_argument("--dataset", type=Path, metavar="FILE", help="throughput: prompts, one a line, or .jsonl")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    group.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    group.add_argument("--output", type=Path, metavar="FILE", help="write that object to a file too")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    names = ("input_len", "output_len", "num_prompts", "batch_size", "num_iters_warmup", "num_iters")
    for name, default in zip(names, _DEFAULTS[args.what], strict=True):
        if getattr(args, name) is None and not (args.dataset and name in ("input_len", "num_prompts")):
            setattr(args, name, default)
    params = SamplingParams(temperature=args.temperature, max_tokens=args.output_len, ignore_eos=True)
    texts = read_prompts(args.dataset, args.num_prompts) if args.dataset else None
    settings = engine_settings(args)
    with _alone(), LLM(config=settings) as llm:
        if texts is None and args.input_len + args.output_len > llm.manifest.max_model_len:
            raise ConfigError(
                f"{args.input_len} tokens of prompt and {args.output_len} of output are more than max_model_len="
                f"{llm.manifest.max_model_len}. Lower --input-len or --output-len."
            )
        measured = _throughput(llm, args, params, texts) if args.what == "throughput" else _latency(llm, args, params)
        found: dict[str, object] = {
            "measured": args.what,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": settings.config.model,
            **{name: getattr(args, name) for name in names if getattr(args, name) is not None},
            "dataset": str(args.dataset) if args.dataset else None,
            "temperature": args.temperature,
            **asdict(measured),
            "device": llm.manifest.device,
            "dtype": llm.manifest.dtype,
            "components": {kind: one.full_name for kind, one in llm.manifest.components.items()},
            "engine": settings.config.model_dump(mode="json"),
            "machine": describe(),
        }
    text = json.dumps(found, indent=2)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else "\n".join(_lines(args.what, llm, measured)))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that this measurement does not know, and an output that cannot be written."""
    others = ("batch_size", "num_iters") if args.what == "throughput" else ("num_prompts", "dataset")
    if wrong := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) is not None]:
        raise ConfigError(f"`octavo bench {args.what}` has no {' and no '.join(wrong)}; see --help.")
    if args.dataset and args.input_len:
        raise ConfigError("--input-len is of random prompts; those of a --dataset have their own lengths.")
    if args.output and not args.output.absolute().parent.is_dir():
        raise ConfigError(f"--output {args.output}: there is no folder {args.output.absolute().parent}.")


def _throughput(llm: LLM, args: argparse.Namespace, params: SamplingParams, texts: Sequence[str] | None) -> Throughput:
    for iteration in range(args.num_iters_warmup):
        llm.generate(_random(llm, args, min(args.num_prompts or 8, 8), seed=-1 - iteration), params, use_tqdm=False)
    prompts: Sequence[Prompt] = texts if texts is not None else _random(llm, args, args.num_prompts, seed=0)
    return measure_throughput(llm, prompts, params)


def _latency(llm: LLM, args: argparse.Namespace, params: SamplingParams) -> Latency:
    """Every batch has prompts of its own: the prefix cache would know those of the one before."""
    num_warmups = args.num_iters_warmup
    batches = [_random(llm, args, args.batch_size, seed) for seed in range(-num_warmups, args.num_iters)]
    if num_warmups:
        measure_latency(llm, batches[:num_warmups], params)
    return measure_latency(llm, batches[num_warmups:], params)


def _random(llm: LLM, args: argparse.Namespace, num_prompts: int, seed: int) -> list[list[int]]:
    tokenizer = llm.get_tokenizer()
    length = args.input_len or _WARM_UP_LEN
    seed += _SEEDS * llm.config.seed
    return random_prompts(num_prompts, length, tokenizer.vocab_size, seed, avoid=tokenizer.special_ids)


@contextmanager
def _alone() -> Iterator[None]:
    """Keep another measurement from running meanwhile: both would be wrong.

    Raises:
        ConfigError: one is running.
    """
    try:
        import fcntl
    except ImportError:  # not a system of this family: whoever measures sees to it
        yield
        return
    path = cache_folder() / "bench.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "Another `octavo bench` is running; two at once would spoil each other's numbers."
            ) from None
        yield


def _at_least_1(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too little; give at least 1")
    return value


def _at_least_0(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is too little; give at least 0")
    return value


# -------------------------------------------------------------------------------------------------------- table


def _lines(what: str, llm: LLM, measured: Throughput | Latency) -> Iterator[str]:
    manifest = llm.manifest
    yield f"{llm.config.model}, {what}, on {manifest.device} in {manifest.dtype}"
    yield ""
    if isinstance(measured, Throughput):
        yield f"  prompts          {measured.num_prompts:>12,}"
        yield f"  prompt tokens    {measured.num_prompt_tokens:>12,}"
        yield f"  output tokens    {measured.num_output_tokens:>12,}"
        yield f"  seconds          {measured.elapsed_seconds:>12,.2f}"
        yield f"  requests/s       {measured.requests_per_second:>12,.2f}"
        yield f"  output tokens/s  {measured.output_tokens_per_second:>12,.1f}"
        yield f"  total tokens/s   {measured.total_tokens_per_second:>12,.1f}"
        spreads = {"TTFT": measured.ttft_seconds, "TPOT": measured.tpot_seconds}
    else:
        yield f"  batches          {len(measured.latencies_seconds):>12,}"
        yield f"  batch size       {measured.batch_size:>12,}"
        spreads = {
            "latency": measured.latency_seconds,
            "TTFT": measured.ttft_seconds,
            "TPOT": measured.tpot_seconds,
            "ITL": measured.itl_seconds,
        }
    yield ""
    yield f"  {'milliseconds':<17}{'mean':>12}{'median':>12}{'p99':>12}"
    yield from (_row(name, one) for name, one in spreads.items() if one is not None)


def _row(name: str, one: Spread) -> str:
    return f"  {name:<17}{1000 * one.mean:>12,.1f}{1000 * one.median:>12,.1f}{1000 * one.p99:>12,.1f}"
