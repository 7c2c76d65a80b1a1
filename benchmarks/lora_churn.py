#!/usr/bin/env python3
"""Whether requests of the base model notice that adapters come and go: many asked for at random, few positions.

    python benchmarks/lora_churn.py                                             # 200 adapters, 32 clients, 8 positions
    python benchmarks/lora_churn.py --adapters 12 --clients 4 --requests 16 --rounds 1      # a quick look

Clients ask one engine (AsyncLLM) for answers, each with an adapter that it draws from all of them, one request after
the other; beside them some clients ask for the model as it is. What is measured is the longest gap between two tokens
of such a request. Two variants in turns, a process of its own for each measurement:

- churn: an adapter is found in the folder and read when it is asked for, and evicted when others are;
- resident: the same requests, with all adapters in the host's memory before the first.

Afterwards a sample of the answers is compared with what the idle engine answers to each alone. The result is
benchmarks/results/<date>-lora-churn.md and .json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import report
from comparison import spread
from cpu import hugging_face_folder
from drawn_adapters import draw_adapters
from workload import load_workload, warm_up_workload

VARIANTS = ("churn", "resident")
NUM_PROMPT_TOKENS = 64
"""At most, of each request: so that answers, not prompts, are most of the work."""

NEAR_TIES = {"float32": 1e-3, "bfloat16": 0.25}
"""Where the best logprob is above the second by less, an answer may part from the one that is given alone."""

NOTE = """\
Medians over the rounds, with the range in brackets; one process for each measurement, the variants in turns. A gap is
the time between two tokens of one request of the base model, seen by its client; a variant's longest is over all of
them. "x resident" is the longest gap over that of the variant in which no adapter is read while requests run. Wrong
answers are those of the sample that part from what the request is answered alone where the best token is not nearly
tied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request and what came of it.

    Attributes:
        times: when each token came, seconds.
    """

    prompt: list[int]
    adapter: str | None
    start: float
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One variant, one process.

    Attributes:
        longest_gap_seconds, p99_gap_seconds: between tokens of requests of the base model.
        ttft_seconds: of requests with an adapter, median.
        num_loads: of adapters, while requests ran.
        num_checked, num_wrong: answers compared with those given alone, and those that are not the same.
    """

    variant: str
    longest_gap_seconds: float
    p99_gap_seconds: float
    num_gaps: int
    ttft_seconds: float
    requests_per_second: float
    num_loads: int
    num_checked: int
    num_wrong: int
    wall_seconds: float


def main() -> None:
    args = parse_arguments()
    if args.worker:
        print(json.dumps(asdict(asyncio.run(measure(args)))), flush=True)
        return
    circumstances = report.circumstances(args.threads)
    path = args.output or report.result_path("lora-churn")
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder:
        args.model = hugging_face_folder(args)
        draw_adapters(Path(folder), args.model, args.adapters, args.rank)
        for measurement in run_rounds(folder, args):
            measurements.append(measurement)
            # After each, so that a run broken off has a result.
            result = {**circumstances, "measurements": [asdict(one) for one in measurements]}
            report.write_result(path, result, markdown(measurements, args, circumstances))
    print(table(measurements), f"\nWritten to {path}.md and {path}.json")
    if any(one.num_wrong for one in measurements):
        sys.exit("Some answers are not those of their adapters.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    report.add_common_arguments(parser)
    numbers = {
        "--adapters": (200, "in the folder"),
        "--rank": (8, "of each"),
        "--positions": (8, "max_loras"),
        "--clients": (32, "that ask for adapters"),
        "--base-clients": (4, "that ask for the model as it is, for as long as the others ask"),
        "--requests": (320, "of all clients that ask for adapters"),
        "--tokens": (16, "of each answer with an adapter"),
        "--base-tokens": (64, "of each answer of the base model"),
        "--sample": (32, "answers that are compared"),
        "--rounds": (3, "of both variants"),
    }
    for name, (default, meaning) in numbers.items():
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (%(default)s)")
    parser.add_argument("--worker", choices=VARIANTS, help="measure this once, in this process, and print JSON")
    parser.add_argument("--folder", help="where a worker finds the adapters")
    parser.set_defaults(dtype="float32")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------ driver


def run_rounds(folder: str, args: argparse.Namespace) -> Iterator[Measurement]:
    """Rounds are outermost: a machine that drifts does so for both variants."""
    for number in range(1, args.rounds + 1):
        for variant in VARIANTS:
            measurement = run_worker(variant, folder, args)
            print(
                f"round {number}  {variant:9} longest gap {measurement.longest_gap_seconds:7.3f} s  "
                f"{measurement.requests_per_second:6.2f} requests/s  {measurement.num_loads:4} loads",
                flush=True,
            )
            yield measurement


def run_worker(variant: str, folder: str, args: argparse.Namespace) -> Measurement:
    """Measure in a fresh process; what it logs goes to standard error."""
    passed = {name: value for name, value in vars(args).items() if name not in ("worker", "folder", "output", "rounds")}
    options = {**passed, "worker": variant, "folder": folder, "octavo": json.dumps(args.octavo)}
    words = (word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value)))
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode != 0:
        sys.exit(f"{variant} failed with exit status {done.returncode}; the reason is above.")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------------ worker


async def measure(args: argparse.Namespace) -> Measurement:
    """Load the variant in this process, let all clients ask, compare a sample."""
    import torch

    from octavo import AsyncLLM

    torch.set_num_threads(args.threads)
    folder, names = Path(args.folder), [f"adapter-{index}" for index in range(args.adapters)]
    lora: dict[str, Any] = {"enable_lora": True, "max_loras": args.positions, "max_lora_rank": args.rank}
    if args.worker == "resident":
        lora["max_cpu_loras"] = max(args.adapters, args.positions)
        lora["lora_modules"] = {name: str(folder / name) for name in names}
    else:
        lora["lora_root"] = args.folder
    settings = {"dtype": args.dtype, "device": "cpu", "max_model_len": 512, **lora, **args.octavo}
    with AsyncLLM(args.model, **settings) as llm:
        for request in warm_up_workload().requests:
            await ask(llm, request.prompt_token_ids, None, 4)
        loads_before = num_loads(llm)
        start = time.perf_counter()
        with_adapter, plain = await ask_all(llm, names, args)
        seconds = time.perf_counter() - start
        loads = num_loads(llm) - loads_before
        sample = random.Random(0).sample([*with_adapter, *plain], min(args.sample, len(with_adapter) + len(plain)))
        num_wrong = sum([not await is_right(llm, each, NEAR_TIES[args.dtype]) for each in sample])
    gaps = sorted(later - earlier for each in plain for earlier, later in pairwise(each.times))
    return Measurement(
        variant=args.worker,
        longest_gap_seconds=gaps[-1],
        p99_gap_seconds=gaps[len(gaps) * 99 // 100],
        num_gaps=len(gaps),
        ttft_seconds=statistics.median(each.times[0] - each.start for each in with_adapter),
        requests_per_second=len(with_adapter) / seconds,
        num_loads=loads,
        num_checked=len(sample),
        num_wrong=num_wrong,
        wall_seconds=seconds,
    )


def num_loads(llm: Any) -> int:
    """Adapters read so far; asked while nothing runs."""
    return int(llm._assembly.engine.stats().num_adapter_loads)


async def ask_all(llm: Any, names: Sequence[str], args: argparse.Namespace) -> tuple[list[Asked], list[Asked]]:
    """What was asked with adapters, and without: the same requests in both variants, but for how many without."""
    prompts = [each.prompt_token_ids[:NUM_PROMPT_TOKENS] for each in load_workload("w2").requests]
    with_adapter, plain = list[Asked](), list[Asked]()

    async def client(number: int) -> None:
        choices = random.Random(number)
        for _ in range(number, args.requests, args.clients):
            prompt, name = choices.choice(prompts), choices.choice(names)
            with_adapter.append(await ask(llm, prompt, name, args.tokens))

    async def base_client(number: int) -> None:
        for prompt in islice(cycle(prompts), number, None):
            plain.append(await ask(llm, prompt, None, args.base_tokens))
            if clients.done():
                return

    clients = asyncio.gather(*map(client, range(args.clients)))
    await asyncio.gather(clients, *map(base_client, range(args.base_clients)))
    return with_adapter, plain


async def ask(llm: Any, prompt: list[int], adapter: str | None, num_tokens: int) -> Asked:
    """One greedy answer of so many tokens, with the time of each."""
    from octavo import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    asked = Asked(prompt=prompt, adapter=adapter, start=time.perf_counter())
    async for output in llm.generate(prompt, params, adapter=adapter):
        new_token_ids = output.outputs[0].token_ids[len(asked.token_ids) :]
        asked.token_ids.extend(new_token_ids)
        asked.times.extend([time.perf_counter()] * len(new_token_ids))
    return asked


async def is_right(llm: Any, asked: Asked, near_tie: float) -> bool:
    """Whether the request, asked again alone, is answered the same up to a near tie."""
    from octavo import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=len(asked.token_ids), ignore_eos=True, detokenize=False, logprobs=2
    )
    async for output in llm.generate(asked.prompt, params, adapter=asked.adapter):
        last = output
    alone = last.outputs[0]
    for found, wanted, entry in zip(asked.token_ids, alone.token_ids, alone.logprobs, strict=True):
        if found != wanted:
            best, second = sorted((each.logprob for each in entry.values()), reverse=True)[:2]
            return bool(best - second < near_tie)
    return True


# ------------------------------------------------------------------------------------------------------ tables


def markdown(measurements: Sequence[Measurement], args: argparse.Namespace, circumstances: Mapping[str, object]) -> str:
    """The content of a result's Markdown file."""
    return "\n\n".join(
        [
            f"# LoRA adapters that come and go, on a CPU, {circumstances['date']}",
            f"{args.clients} clients draw from {args.adapters} adapters of rank {args.rank}, in all {args.requests} "
            f"requests of {args.tokens} tokens, beside {args.base_clients} clients of the base model; {args.positions} "
            f"device positions; {args.dtype}.",
            table(measurements),
            NOTE,
            report.markdown_circumstances(circumstances),
        ]
    )


def table(measurements: Sequence[Measurement]) -> str:
    """A row for each variant."""
    runs = {name: [one for one in measurements if one.variant == name] for name in VARIANTS}
    longest = {name: [one.longest_gap_seconds for one in each] for name, each in runs.items() if each}
    rows = []
    for name, gaps in longest.items():
        ratio = (
            f"{statistics.median(gaps) / statistics.median(longest['resident']):.2f}" if "resident" in longest else ""
        )
        rows.append(
            [
                name,
                spread(gaps, 3),
                ratio,
                spread([one.p99_gap_seconds for one in runs[name]], 3),
                spread([one.ttft_seconds for one in runs[name]], 2),
                spread([one.requests_per_second for one in runs[name]], 2),
                spread([float(one.num_loads) for one in runs[name]], 0),
                f"{sum(one.num_wrong for one in runs[name])} of {sum(one.num_checked for one in runs[name])}",
            ]
        )
    header = ["variant", "longest gap s", "x resident", "p99 gap s", "adapters' TTFT s", "requests/s", "loads", "wrong"]
    return report.markdown_table(header, rows)


if __name__ == "__main__":
    main()
