#!/usr/bin/env python3
"""Octavo on one GPU: correctness first, then kernels, the engine, transformers beside it, and where the time goes.

    python benchmarks/gpu.py                          # an H200: under 10 minutes
    python benchmarks/gpu.py --quick                  # 2 minutes, fewer layers and cases
    python benchmarks/gpu.py --device cpu --tiny      # the script itself, in Triton's interpreter: measures nothing

Needs torch, triton, transformers and numpy, no network, and what `make gpu-wheels` fetched where Octavo is not
installed. Each part is a process of its own with its own seconds, so that one that fails or hangs leaves the others;
the report, benchmarks/results/<date>-gpu.md and .json, is written anew after each. docs/gpu.md explains the tables.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
from gpu_parts import environment, tables
from gpu_parts.part import Part, read_lines

GRACE_SECONDS = 5.0
"""What a part may take beyond its seconds before it is ended: it looks at the clock between cases only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One part. `seconds` are the most it may take, of a whole and of a quick run."""

    name: str
    module: str
    seconds: float
    quick_seconds: float
    arguments: Sequence[str] = ()


GROUPS = (
    (  # Correctness side by side: nothing here is timed.
        Process(
            name="triton-flash", module="attention_check", arguments=["triton-flash"], seconds=80, quick_seconds=45
        ),
        Process(
            name="triton-paged", module="attention_check", arguments=["triton-paged"], seconds=80, quick_seconds=45
        ),
        Process(name="other kernels", module="kernels_check", seconds=80, quick_seconds=45),
        Process(name="tokens", module="tokens_check", seconds=80, quick_seconds=45),
        Process(name="logits", module="logits_check", seconds=80, quick_seconds=45),
    ),
    (Process(name="kernel table", module="kernel_table", seconds=90, quick_seconds=20),),
    (Process(name="linear table", module="linear_table", seconds=80, quick_seconds=20),),
    (Process(name="engine table", module="engine_table", seconds=180, quick_seconds=40),),
    (Process(name="transformers", module="peer", seconds=150, quick_seconds=25),),
)
WHOLE_SECONDS, QUICK_SECONDS = 570.0, 140.0
TINY_FACTOR = 5
"""Of all these, in a tiny run: what it is for is to end, on however busy a machine."""


@dataclass(kw_only=True)
class Run:
    """What there is of a run so far."""

    args: argparse.Namespace
    circumstances: dict[str, Any]
    path: Path
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """By table."""
        found: dict[str, list[dict[str, Any]]] = {}
        for lines in self.lines.values():
            for line in lines:
                if "table" in line:
                    found.setdefault(line["table"], []).append(line["row"])
        return found

    @property
    def not_run(self) -> list[dict[str, Any]]:
        return [line for lines in self.lines.values() for line in lines if "not_run" in line]

    def write(self) -> None:
        result = {
            **self.circumstances,
            "is_measurement": not self.args.tiny,
            "part_seconds": self.seconds,
            "not_run": self.not_run,
            "tables": self.rows,
        }
        report.write_result(self.path, result, self.markdown())

    def markdown(self) -> str:
        kind = "no measurement" if self.args.tiny else "quick" if self.args.quick else "whole"
        parts = [f"# GPU, {self.circumstances['date']} ({kind})"]
        if self.args.tiny:
            parts.append(
                "**No measurement.** The script from end to end on a CPU, in Triton's interpreter at tiny shapes, to "
                "show that it runs. Every time and every speed below is meaningless; only what was compared with a "
                "reference means something."
            )
        parts.append(tables.markdown(self.rows))
        if self.not_run:
            lines = [f"- {line['not_run']}: {line['reason']}" for line in self.not_run]
            parts.append("## Not run\n\n" + "\n".join(lines))
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        gpu = ", ".join(f"{name} {value}" for name, value in self.circumstances["gpu"].items())
        parts.append(
            f"{report.markdown_circumstances(self.circumstances)}\n- GPU: {gpu or 'none'}\n- Layers of the engine's "
            f"model: {self.args.layers}; of Llama-3-8B 32\n- Seconds of the parts: {spent}"
        )
        return "\n\n".join(part for part in parts if part)


def main() -> None:
    args = parse_arguments()
    if args.worker:
        work(args)
        return
    if args.device == "cuda" and not environment.has_gpu():
        sys.exit("This machine has no NVIDIA GPU. To try the script itself: --device cpu --tiny")
    begin = time.monotonic()
    with scratch_folder() as scratch:
        environ = child_environ(args, scratch)
        run = Run(args=args, circumstances=circumstances(args), path=args.output or result_path(args))
        limit = args.seconds or seconds_for(args, WHOLE_SECONDS, QUICK_SECONDS)
        for group in GROUPS:
            chosen = [process for process in group if args.parts is None or process.name in args.parts]
            run_group(run, chosen, scratch, environ, limit - (time.monotonic() - begin))
            run.write()
        compare_with_peer(run)
        run.write()
    print(run.markdown())
    print(f"\n{time.monotonic() - begin:.0f} s. Written to {run.path}.md and {run.path}.json")
    if tables.is_wrong(run.rows) or any(line.get("failed") for line in run.not_run):
        sys.exit("Something is wrong or failed; see above.")


def parse_arguments() -> argparse.Namespace:
    names = [process.name for group in GROUPS for process in group]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, and 8 layers unless --layers says otherwise")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes; times are then meaningless")
    parser.add_argument("--layers", type=int, help="of the Llama-3-8B shape; default 32, quick 8, tiny 2")
    parser.add_argument("--seconds", type=float, help=f"for everything; default {WHOLE_SECONDS:.0f}")
    parser.add_argument("--parts", type=lambda text: text.split(","), help=f"some of: {','.join(names)}")
    parser.add_argument("--wheels", type=Path, default=environment.WHEELS, help="default: build/gpu-wheels")
    parser.add_argument("--output", type=Path, help="path of the result without its suffix; default: a new dated one")
    parser.add_argument("--worker", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--worker-seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu runs in Triton's interpreter, which is too slow for more than --tiny.")
    if unknown := set(args.parts or ()) - set(names):
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}; there are: {', '.join(names)}.")
    args.layers = args.layers or (2 if args.tiny else 8 if args.quick else 32)
    return args


# ------------------------------------------------------------------------------------------------------ driver


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """In memory where there is room for the weights, so that no disk is measured."""
    shm = Path("/dev/shm")
    in_memory = shm.is_dir() and shutil.disk_usage(shm).free > 24 * 10**9
    with tempfile.TemporaryDirectory(prefix="octavo-gpu-", dir=shm if in_memory else None) as folder:
        yield Path(folder)


def child_environ(args: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """Of the parts: Octavo can be imported, nothing is downloaded, and no kernel was compiled before this run."""
    environ = {
        **os.environ,
        "PYTHONPATH": environment.python_path(scratch / "environment", args.wheels),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if args.device == "cpu":
        environ["TRITON_INTERPRET"] = "1"
    else:
        environ.pop("TRITON_INTERPRET", None)
    return environ


def seconds_for(args: argparse.Namespace, whole: float, quick: float) -> float:
    return whole * TINY_FACTOR if args.tiny else quick if args.quick else whole


def result_path(args: argparse.Namespace) -> Path:
    return report.result_path("gpu-tiny" if args.tiny else "gpu-quick" if args.quick else "gpu")


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    found = report.circumstances(report.num_cores())
    versions = {"octavo": environment.octavo_version(), **report.versions(), **environment.library_versions()}
    return {**found, "versions": versions, "gpu": environment.gpu_machine(), "layers": args.layers}


def run_group(
    run: Run, group: Sequence[Process], scratch: Path, environ: Mapping[str, str], seconds_left: float
) -> None:
    """Run the parts of a group at once, each until it ends or its time is up, and read what they wrote."""
    started: list[tuple[Process, float, float, Path, subprocess.Popen[bytes]]] = []
    for process in group:
        own = seconds_for(run.args, process.seconds, process.quick_seconds)
        seconds = min(own, seconds_left - GRACE_SECONDS)
        output = scratch / f"{process.name}.jsonl"
        if seconds < 5:
            run.lines[process.name] = [_not_run(process.name, f"{max(seconds_left, 0):.0f} seconds were left")]
            continue
        print(f"{process.name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
        child = subprocess.Popen(worker_command(run.args, process, seconds, scratch), env=environ, stdout=sys.stderr)
        started.append((process, seconds, time.monotonic(), output, child))
    for process, seconds, begin, output, child in started:
        fault = _wait(child, seconds + GRACE_SECONDS - (time.monotonic() - begin))
        run.seconds[process.name] = time.monotonic() - begin
        run.lines[process.name] = read_lines(output) + ([_not_run(process.name, fault, failed=True)] if fault else [])


def worker_command(args: argparse.Namespace, process: Process, seconds: float, scratch: Path) -> list[str]:
    options = {
        "--worker": process.name,
        "--worker-seconds": str(seconds),
        "--scratch": str(scratch),
        "--device": args.device,
        "--layers": str(args.layers),
    }
    flags = ["--quick"] * args.quick + ["--tiny"] * args.tiny
    return [sys.executable, __file__, *(part for option in options.items() for part in option), *flags]


def _wait(child: subprocess.Popen[bytes], seconds: float) -> str:
    """Why it did not end well; empty when it did."""
    try:
        status = child.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return "it did not end in its time and was ended"
    return "" if status == 0 else f"it ended with status {status}; the reason is in the log"


def _not_run(what: str, reason: str, *, failed: bool = False) -> dict[str, Any]:
    return {"not_run": what, "reason": reason, "failed": failed}


def compare_with_peer(run: Run) -> None:
    """The headline: conversations served by Octavo over those served by transformers, in one run."""
    speeds = {row["measure"]: row["value"] for row in run.rows.get("engine", [])}
    ours, theirs = speeds.get("ShareGPT-like, offline"), speeds.get("ShareGPT-like, transformers generate")
    if ours and theirs:
        applies = run.args.device == "cuda" and run.args.layers == 32
        row = {
            "measure": "ShareGPT-like, ratio",
            "value": ours / theirs,
            "unit": "x",
            "target": 24.0 if applies else None,
            "met": ours / theirs >= 24 if applies else None,
            "note": "Octavo over transformers",
        }
        run.lines["ratio"] = [{"table": "engine", "row": row}]


# ------------------------------------------------------------------------------------------------------ worker


def work(args: argparse.Namespace) -> None:
    """Run one part in this process."""
    process = next(process for group in GROUPS for process in group if process.name == args.worker)
    part = Part(
        name=process.name,
        device=args.device,
        tiny=args.tiny,
        quick=args.quick,
        num_layers=args.layers,
        scratch=args.scratch,
        seconds=args.worker_seconds,
        output=args.scratch / f"{process.name}.jsonl",
    )
    importlib.import_module(f"gpu_parts.{process.module}").run(part, *process.arguments)


if __name__ == "__main__":
    main()
