#!/usr/bin/env python3
"""Quantized models on this machine's CPU, beside the same model in bfloat16 and beside dequantising at load.

    python benchmarks/quantized_cpu.py --gptq FOLDER --awq FOLDER --squeezellm FOLDER
    python benchmarks/quantized_cpu.py --gptq FOLDER --workloads w1 --rounds 1
    python benchmarks/quantized_cpu.py --worker gptq --gptq FOLDER --workload w2   # one measurement, one line of JSON

Each measurement has a process of its own, all variants in turns, so that they meet the same machine and none keeps
another's memory. The result is benchmarks/results/<date>-quantized-cpu.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import report
from comparison import spread
from cpu import hugging_face_folder
from workload import Workload, load_workload, warm_up_workload

BASE = "unquantized"
METHODS = ("gptq", "awq", "squeezellm")
AT_LOAD = ", dequantised at load"
KV_CACHE_BYTES = 256 * 2**20
"""The same for all, so that memory differs by the weights."""

NOTE = """\
Medians over the rounds, with the range in brackets; one process for each measurement, the variants in turns. Tokens/s
are generated tokens that the workload asks for, over the whole run. "x unquantized" above 1 is faster than the plain
weights, "x at load" above 1 faster than the same checkpoint dequantised at load. Resident MiB are anonymous memory of
the process after its first answers: weights, KV cache ({kv_cache} MiB at most, the same for all) and the interpreter;
peak MiB are of the whole process with its loading. CPU s below wall s x threads mean that others took the machine
meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A checkpoint and how it is computed."""

    name: str
    model: str
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One variant, one workload, one process.

    Attributes:
        resident_bytes: anonymous memory of the process after the warm-up; None where the system does not say.
        peak_bytes: largest resident memory of the process; None where the system does not say.
    """

    variant: str
    workload: str
    tokens_per_second: float
    ttft_seconds: float | None
    wall_seconds: float
    cpu_seconds: float
    load_seconds: float
    resident_bytes: int | None
    peak_bytes: int | None
    details: Mapping[str, str]


def main() -> None:
    args = parse_arguments()
    if args.worker:
        (variant,) = (one for one in variants(args.model, args) if one.name == args.worker)
        print(json.dumps(asdict(measure(variant, load_workload(args.workload, args.requests), args))), flush=True)
        return
    for name in args.workloads:
        load_workload(name)
    if not any(getattr(args, method) for method in METHODS):
        sys.exit(f"Name at least one quantized model: {', '.join(f'--{method} FOLDER' for method in METHODS)}.")
    circumstances = report.circumstances(args.threads)
    path = args.output or report.result_path("quantized-cpu")
    measurements: list[Measurement] = []
    for measurement in run_rounds(hugging_face_folder(args), args):
        measurements.append(measurement)
        # After each, so that a run broken off has a result.
        result = {**circumstances, "measurements": [asdict(one) for one in measurements]}
        report.write_result(path, result, markdown(measurements, circumstances))
    print(table(measurements), f"\nWritten to {path}.md and {path}.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    report.add_common_arguments(parser)
    for method in METHODS:
        parser.add_argument(f"--{method}", metavar="FOLDER", help=f"the model, quantized with {method}")
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=["w1", "w2"], help="default: w1,w2")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--requests", type=int, help="only the first so many of each workload, for a quick look")
    parser.add_argument("--worker", metavar="VARIANT", help="measure this once, in this process, and print JSON")
    parser.add_argument("--workload", default="w1", help="what a worker runs (%(default)s)")
    return parser.parse_args()


def variants(model: str, args: argparse.Namespace) -> list[Variant]:
    """Plain weights, then each quantized checkpoint as it is chosen and dequantised at load."""
    found = [Variant(name=BASE, model=model)]
    for method in METHODS:
        if (folder := getattr(args, method)) is not None:
            found.append(Variant(name=method, model=folder))
            found.append(Variant(name=method + AT_LOAD, model=folder, settings={"linear_kernel": "torch-dequantized"}))
    return found


# ------------------------------------------------------------------------------------------------------ driver


def run_rounds(model: str, args: argparse.Namespace) -> Iterator[Measurement]:
    """Rounds are outermost: a machine that drifts does so for all variants and workloads."""
    for number in range(1, args.rounds + 1):
        for workload in args.workloads:
            for variant in variants(model, args):
                measurement = run_worker(variant, workload, model, args)
                print(
                    f"round {number}  {workload:4} {variant.name:32} {measurement.tokens_per_second:8.1f} tokens/s "
                    f"{measurement.wall_seconds:8.1f} s {_mebibytes(measurement.resident_bytes):>7} MiB",
                    flush=True,
                )
                yield measurement


def run_worker(variant: Variant, workload: str, model: str, args: argparse.Namespace) -> Measurement:
    """Measure in a fresh process; what it logs goes to standard error."""
    options = {
        "--worker": variant.name,
        "--workload": workload,
        "--model": model,
        "--dtype": args.dtype,
        "--threads": str(args.threads),
        "--octavo": json.dumps(args.octavo),
        **{f"--{method}": getattr(args, method) for method in METHODS if getattr(args, method) is not None},
        **({} if args.requests is None else {"--requests": str(args.requests)}),
    }
    command = [sys.executable, __file__, *(part for option in options.items() for part in option)]
    environment = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **environment})
    if done.returncode != 0:
        sys.exit(f"{variant.name} failed on {workload} with exit status {done.returncode}; the reason is above.")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------------ worker


def measure(variant: Variant, workload: Workload, args: argparse.Namespace) -> Measurement:
    """Load a variant in this process, warm it up, let it answer the workload once."""
    start = time.perf_counter()
    import torch
    from peers import OctavoPeer

    torch.set_num_threads(args.threads)
    settings = {"kv_cache_memory_bytes": KV_CACHE_BYTES, **args.octavo, **variant.settings}
    peer = OctavoPeer(variant.model, args.dtype, settings)
    load_seconds = time.perf_counter() - start
    peer.answer(warm_up_workload())
    resident_bytes = memory_bytes("RssAnon")
    cpu_before = time.process_time()
    answer = peer.answer(workload)
    cpu_seconds = time.process_time() - cpu_before
    num_output_tokens = sum(request.num_output_tokens * request.n for request in workload.requests)
    if (found := sum(map(len, answer.token_ids))) != num_output_tokens:
        raise RuntimeError(f"{workload.name} asks for {num_output_tokens} tokens; {variant.name} gave {found}.")
    return Measurement(
        variant=variant.name,
        workload=workload.name,
        tokens_per_second=num_output_tokens / answer.wall_seconds,
        ttft_seconds=answer.ttft_seconds,
        wall_seconds=answer.wall_seconds,
        cpu_seconds=cpu_seconds,
        load_seconds=load_seconds,
        resident_bytes=resident_bytes,
        peak_bytes=memory_bytes("VmHWM"),
        details=peer.details(),
    )


def memory_bytes(name: str) -> int | None:
    """A line of /proc/self/status; None where there is none."""
    status = Path("/proc/self/status")
    match = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(match[1]) * 1024 if match else None


# ------------------------------------------------------------------------------------------------------ tables


def markdown(measurements: Sequence[Measurement], circumstances: Mapping[str, object]) -> str:
    """The content of a result's Markdown file."""
    return "\n\n".join(
        [
            f"# Quantized models on a CPU, {circumstances['date']}",
            table(measurements),
            NOTE.format(kv_cache=KV_CACHE_BYTES // 2**20),
            report.markdown_circumstances(circumstances),
        ]
    )


def table(measurements: Sequence[Measurement]) -> str:
    """A row for each workload and variant."""
    speeds: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements:
        speeds.setdefault((one.workload, one.variant), []).append(one)
    rows = []
    for (workload, variant), runs in speeds.items():
        values = [run.tokens_per_second for run in runs]
        first_tokens = [run.ttft_seconds for run in runs if run.ttft_seconds is not None]
        rows.append(
            [
                workload,
                variant,
                spread(values, 1),
                _ratio(values, speeds.get((workload, BASE))),
                _ratio(values, speeds.get((workload, variant + AT_LOAD))),
                spread(first_tokens, 3),
                *(f"{statistics.median(times):.1f}" for times in _times(runs)),
                *(_mebibytes(_median(sizes)) for sizes in _sizes(runs)),
            ]
        )
    header = ["workload", "variant", "tokens/s", "x unquantized", "x at load", "TTFT s", "wall s", "CPU s", "load s"]
    return report.markdown_table([*header, "resident MiB", "peak MiB"], rows)


def _times(runs: Sequence[Measurement]) -> tuple[list[float], ...]:
    return [run.wall_seconds for run in runs], [run.cpu_seconds for run in runs], [run.load_seconds for run in runs]


def _sizes(runs: Sequence[Measurement]) -> tuple[list[int | None], ...]:
    return [run.resident_bytes for run in runs], [run.peak_bytes for run in runs]


def _ratio(values: Sequence[float], others: Sequence[Measurement] | None) -> str:
    if not others:
        return ""
    return f"{statistics.median(values) / statistics.median(run.tokens_per_second for run in others):.2f}"


def _median(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _mebibytes(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


if __name__ == "__main__":
    main()
