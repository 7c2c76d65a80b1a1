#!/usr/bin/env python3
"""How long requests queue: Octavo's continuous batching beside static batching, on one engine, on one stream.

    python benchmarks/queueing.py                                   # the whole workload w2, three rounds
    python benchmarks/queueing.py --requests 8 --rounds 1           # a quick look

First all requests run at once, which gives the engine's capacity in output tokens a second. Then the same requests
arrive as a Poisson stream at a share of that capacity, once for each way of batching:

- continuous: a request is given to the engine when it arrives;
- static: requests are collected while a batch runs; when all of it has ended, up to 16 of them are given to the engine
  together, and each gets its answer when its batch ends. The engine computes no request past its own end, so this
  baseline is faster than padded batches would be.

The prefix cache is off: the same prompts are served several times. The result is
benchmarks/results/<date>-queueing.md and .json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import cycle, islice

import report
from open_loop import Served, poisson_seconds, serve
from workload import WorkloadRequest, load_workload, warm_up_workload

from octavo import EngineConfig, SamplingParams
from octavo.assemble import Assembly, assemble
from octavo.request import Request

MEASURES = (
    # property of Timing, its name in the table
    ("queue_seconds", "queue time s"),
    ("ttft_seconds", "TTFT s"),
    ("latency_seconds", "latency s"),
)

NOTE = """\
Queue time is from a request's arrival to the first step it is part of; TTFT to its first token; latency to its whole
answer, for static batching the end of its batch. The ratio is static / continuous. Where requests come faster than
static batching can serve them, its queue grows for as long as they come, and so does the ratio."""


def main() -> None:
    args = parse_arguments()
    circumstances = report.circumstances(args.threads)
    path = args.output or report.result_path("queueing")
    result = {**circumstances, **measure(args)}
    text = markdown(result)
    report.write_result(path, result, text)
    print(f"\n{text}\n\nWritten to {path}.md and {path}.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    report.add_common_arguments(parser)
    parser.add_argument("--workload", default="w2", help="default: %(default)s")
    parser.add_argument("--requests", type=int, help="of each stream, starting over when the workload has fewer (all)")
    parser.add_argument("--load", type=float, default=0.7, help="share of the capacity that arrives (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="of the static batches (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="streams for each way of batching (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round's arrivals (%(default)s)")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Capacity first, then both ways of batching in turns, each round with a stream of its own."""
    import torch

    workload = load_workload(args.workload)
    if any(request.n > 1 for request in workload.requests):
        sys.exit(f"{args.workload} asks for several completions of a prompt; queueing is measured with one each.")
    torch.set_num_threads(args.threads)
    settings = {"model": args.model, "dtype": args.dtype, "device": "cpu", "enable_prefix_caching": False}
    assembly = assemble(EngineConfig.create(**{**settings, **args.octavo}))
    warm_up = warm_up_workload().requests
    run(assembly, warm_up, [0.0] * len(warm_up))

    requests = list(islice(cycle(workload.requests), args.requests or len(workload.requests)))
    capacity = run(assembly, requests, [0.0] * len(requests)).tokens_per_second
    rate = args.load * capacity * len(requests) / sum(request.num_output_tokens for request in requests)
    print(f"capacity {capacity:.1f} tokens/s; {rate:.3f} requests/s arrive", flush=True)

    batch_sizes = {"continuous": None, "static": args.batch_size}
    served = {name: Served() for name in batch_sizes}
    for number in range(args.rounds):
        arrivals = list(islice(poisson_seconds(rate, args.seed + number), len(requests)))
        for name, batch_size in batch_sizes.items():
            one = run(assembly, requests, arrivals, batch_size)
            served[name].add(one)
            print(f"round {number + 1}  {name:10} mean queue time {one.mean('queue_seconds'):8.3f} s", flush=True)
    assembly.engine.stop()
    return {
        "components": {kind: chosen.name for kind, chosen in assembly.manifest.components.items()},
        "workload": args.workload,
        "num_requests": len(requests),
        "rounds": args.rounds,
        "load": args.load,
        "batch_size": args.batch_size,
        "capacity_tokens_per_second": capacity,
        "requests_per_second": rate,
        "served": {name: summary(total) for name, total in served.items()},
    }


def run(
    assembly: Assembly, wanted: Sequence[WorkloadRequest], arrivals: Sequence[float], batch_size: int | None = None
) -> Served:
    """Serve one stream, whose requests arrive so many seconds after its start."""
    start = time.monotonic()
    stream: list[Request] = []
    for number, (each, seconds) in enumerate(zip(wanted, arrivals, strict=True)):
        params = SamplingParams(
            temperature=each.temperature, max_tokens=each.num_output_tokens, ignore_eos=True, detokenize=False
        )
        (request,) = assembly.inputs.requests(str(number), each.prompt_token_ids, params)
        request.arrival_time = start + seconds
        stream.append(request)
    timings = serve(assembly.engine, stream, batch_size)
    return Served(timings=timings, seconds=time.monotonic() - start)


def summary(served: Served) -> dict[str, object]:
    """The numbers of one way of batching, and every request's own in the order of arrival."""
    shares = {
        measure: {"mean": served.mean(measure), "p99": served.p99(measure), "all": served.values(measure)}
        for measure, _ in MEASURES
    }
    return {"tokens_per_second": served.tokens_per_second, "seconds": served.seconds, **shares}


def markdown(result: Mapping[str, object]) -> str:
    """The content of a result's Markdown file."""
    served, components = result["served"], result["components"]
    assert isinstance(served, dict)
    assert isinstance(components, dict)
    continuous, static = served["continuous"], served["static"]
    rows = []
    for measure, label in MEASURES:
        for statistic in ("mean", "p99"):
            ours, theirs = continuous[measure][statistic], static[measure][statistic]
            ratio = f"{theirs / ours:.1f}" if ours > 0 else ""
            rows.append([f"{label}, {statistic}", f"{ours:.3f}", f"{theirs:.3f}", ratio])
    rates = [each["tokens_per_second"] for each in (continuous, static)]
    rows.append(["output tokens/s", *(f"{rate:.1f}" for rate in rates), ""])
    return "\n\n".join(
        [
            f"# Queueing, {result['date']}",
            f"{result['num_requests']} requests of {result['workload']} in each of {result['rounds']} Poisson streams, "
            f"{result['requests_per_second']:.3f} requests/s: {result['load']:.0%} of the capacity of "
            f"{result['capacity_tokens_per_second']:.1f} output tokens/s that all at once reach. "
            f"Static batches of up to {result['batch_size']}.",
            report.markdown_table(["measure", "continuous", "static", "ratio"], rows),
            NOTE,
            report.markdown_circumstances(result)
            + f"\n- octavo: {', '.join(f'{kind} {name}' for kind, name in components.items())}",
        ]
    )


if __name__ == "__main__":
    main()
