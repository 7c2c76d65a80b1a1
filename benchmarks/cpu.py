#!/usr/bin/env python3
"""Octavo beside Hugging Face transformers on this machine's CPU.

    python benchmarks/cpu.py                                    # all workloads, three rounds
    python benchmarks/cpu.py --workloads w1,w2 --rounds 1
    python benchmarks/cpu.py --worker octavo --workload w2      # one measurement, one line of JSON

Each measurement has a process of its own, Octavo and transformers in turns, so that both meet the same machine and
neither keeps the other's memory. Both read the same weights. The result is benchmarks/results/<date>-cpu.md and .json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import comparison
import report
from comparison import PEERS, Measurement
from workload import Workload, load_workload, warm_up_workload

WORKLOADS = "w1,w2,w3,w4,w5"


def main() -> None:
    args = parse_arguments()
    if args.worker:
        workload = load_workload(args.workload, args.requests)
        print(json.dumps(asdict(measure(args.worker, workload, args))), flush=True)
        return
    if "transformers" in args.peers and importlib.util.find_spec("transformers") is None:
        sys.exit("transformers is not installed: `make test` brings it, or leave it out with --peers octavo.")
    for name in args.workloads:
        load_workload(name)  # a misspelt one is found before the first round, not after it
    circumstances = report.circumstances(args.threads)
    path = args.output or report.result_path("cpu")
    measurements: list[Measurement] = []
    for measurement in run_rounds(hugging_face_folder(args), args):
        measurements.append(measurement)
        # After each, so that a run broken off has a result.
        result = comparison.result(measurements, circumstances)
        report.write_result(path, result, comparison.markdown(measurements, circumstances))
    print(comparison.speed_table(measurements), f"\nWritten to {path}.md and {path}.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    report.add_common_arguments(parser)
    parser.add_argument("--workloads", type=_names, default=_names(WORKLOADS), help=f"default: {WORKLOADS}")
    parser.add_argument("--peers", type=_names, default=list(PEERS), help=f"default: {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--requests", type=int, help="only the first so many of each workload, for a quick look")
    parser.add_argument("--batch-size", type=int, default=16, help="of transformers' static batches (%(default)s)")
    parser.add_argument("--worker", choices=PEERS, help="measure this peer once, in this process, and print JSON")
    parser.add_argument("--workload", default="w1", help="what a worker runs (%(default)s)")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return text.split(",")


# ------------------------------------------------------------------------------------------------------ driver


def hugging_face_folder(args: argparse.Namespace) -> str:
    """A folder that both peers read. Converted in a process of its own: this one shall stay small."""
    if args.model != "demo":
        return str(args.model)
    command = [sys.executable, str(Path(__file__).with_name("demo_checkpoint.py")), "--dtype", args.dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit("The demo model could not be written as a Hugging Face folder; the reason is above.")
    return done.stdout.splitlines()[-1]


def run_rounds(model: str, args: argparse.Namespace) -> Iterator[Measurement]:
    """A, B, A, B. Rounds are outermost: a machine that drifts does so for both peers and for all workloads."""
    for number in range(1, args.rounds + 1):
        for workload in args.workloads:
            for peer in args.peers:
                measurement = run_worker(peer, workload, model, args)
                print(
                    f"round {number}  {workload:4} {peer:13} {measurement.tokens_per_second:8.1f} tokens/s "
                    f"{measurement.wall_seconds:8.1f} s {measurement.peak_rss_bytes / 2**20:7.0f} MiB",
                    flush=True,
                )
                yield measurement


def run_worker(peer: str, workload: str, model: str, args: argparse.Namespace) -> Measurement:
    """Measure in a fresh process; what it logs goes to standard error."""
    options = {
        "--worker": peer,
        "--workload": workload,
        "--model": model,
        "--dtype": args.dtype,
        "--threads": str(args.threads),
        "--batch-size": str(args.batch_size),
        "--octavo": json.dumps(args.octavo),
        **({} if args.requests is None else {"--requests": str(args.requests)}),
    }
    command = [sys.executable, __file__, *(part for option in options.items() for part in option)]
    environment = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **environment})
    if done.returncode != 0:
        sys.exit(f"{peer} failed on {workload} with exit status {done.returncode}; the reason is above.")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------------ worker


def measure(peer_name: str, workload: Workload, args: argparse.Namespace) -> Measurement:
    """Load a peer in this process, warm it up, let it answer the workload once."""
    start = time.perf_counter()
    import torch
    from peers import OctavoPeer, Peer, TransformersPeer

    torch.set_num_threads(args.threads)
    peer: Peer
    if peer_name == "octavo":
        peer = OctavoPeer(args.model, args.dtype, args.octavo)
    else:
        peer = TransformersPeer(args.model, args.dtype, args.batch_size)
    load_seconds = time.perf_counter() - start
    peer.answer(warm_up_workload())

    own_before, all_before, before = _own_cpu_seconds(), _machine_cpu_seconds(), time.perf_counter()
    answer = peer.answer(workload)
    elapsed, own = time.perf_counter() - before, _own_cpu_seconds() - own_before
    others_share = None
    if all_before is not None and (all_after := _machine_cpu_seconds()) is not None:
        others_share = max(0.0, all_after - all_before - own) / (elapsed * (os.cpu_count() or 1))

    wanted = [request.num_output_tokens for request in workload.requests for _ in range(request.n)]
    if (found := [len(token_ids) for token_ids in answer.token_ids]) != wanted:
        raise RuntimeError(f"{workload.name} asks for outputs of {wanted} tokens; {peer_name} gave {found}.")
    decode_seconds = answer.ttft_seconds and answer.wall_seconds - answer.ttft_seconds
    return Measurement(
        peer=peer_name,
        workload=workload.name,
        num_output_tokens=sum(wanted),
        tokens_per_second=sum(wanted) / answer.wall_seconds,
        wall_seconds=answer.wall_seconds,
        ttft_seconds=answer.ttft_seconds,
        decode_tokens_per_second=decode_seconds and (sum(wanted) - 1) / decode_seconds,
        load_seconds=load_seconds,
        cpu_seconds=own,
        others_share=others_share,
        peak_rss_bytes=_peak_rss_bytes(),
        kv_waste=peer.kv_waste(),
        details=peer.details(),
        token_ids=answer.token_ids if workload.greedy else [],
    )


def _own_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _machine_cpu_seconds() -> float | None:
    """CPU time that all processes have taken since the machine started; None where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _peak_rss_bytes() -> int:
    # Linux's ru_maxrss starts from the process that spawned this one; VmHWM is this process alone.
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
