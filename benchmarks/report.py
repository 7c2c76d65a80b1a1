"""What a result says beside its numbers (machine, versions, command), and the files it is written to."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark can be told."""
    parser.add_argument("--model", default="demo", help='a Hugging Face folder, or "demo" (default)')
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=num_cores(), help="default: all cores (%(default)s)")
    parser.add_argument(
        "--octavo", type=json.loads, default={}, metavar="JSON", help='fields of EngineConfig: {"attention": "torch"}'
    )
    parser.add_argument("--output", type=Path, help="path of the result without its suffix; default: a new dated one")


def circumstances(threads: int) -> dict[str, object]:
    """Everything a reader needs to judge or repeat a measurement."""
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "threads": threads,
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> dict[str, object]:
    """This machine, and how busy it is right now."""
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of Octavo, its commit, Python and the libraries that compute."""
    libraries = {}
    for name in ("octavo", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    return {**libraries, "python": platform.python_version(), "commit": git_commit()}


def git_commit() -> str:
    """The checkout's commit, with a "+" when Octavo's own files differ from it; "unknown" outside git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "framework", "plugins")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_circumstances(result: Mapping[str, object]) -> str:
    """The list of circumstances under a result's table."""
    on, with_versions = result["machine"], result["versions"]
    assert isinstance(on, dict)
    assert isinstance(with_versions, dict)
    return "\n".join(
        [
            f"- Machine: {on['cpu']}, {on['cores']} cores, {on['memory_gib']} GiB; {on['system']}; "
            f"load average at the start {', '.join(map(str, on['load_average']))}; {result['threads']} threads",
            f"- Versions: {', '.join(f'{name} {version}' for name, version in with_versions.items())}",
            f"- Command: `{result['command']}`",
        ]
    )


def result_path(benchmark: str, folder: Path = RESULTS) -> Path:
    """<folder>/<date>-<benchmark> without a suffix, numbered when today's first is there already."""
    stem = f"{date.today().isoformat()}-{benchmark}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(folder / name for name in names if not (folder / f"{name}.json").exists())


def write_result(path: Path, result: Mapping[str, object], markdown: str) -> None:
    """Write <path>.json and <path>.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{path}.md").write_text(markdown + "\n")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
