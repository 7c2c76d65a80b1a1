#!/usr/bin/env python3
"""How long discovery takes among many installed distributions, some of them plugins.

    python benchmarks/discovery.py                                  # 300 distributions, 10 of them plugins
    python benchmarks/discovery.py --distributions 1000 --processes 5

The distributions are made in a temporary folder, as pip would leave them: METADATA with a long description, RECORD,
entry points of other groups for every third. Each measurement is a fresh process, since discovery runs once in a
process: first it imports the plugin host, then it calls `discover()`, and both are timed. The result is
benchmarks/results/<date>-discovery.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import report

TARGET_MS = 50.0

PLUGIN = """\
from octavo import SchedulerSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components():
    return [SchedulerSpec(name="{name}", summary="One of many", target="{name}.policy:Policy")]
"""

WORKER = """\
import json, time
def now():
    return time.perf_counter(), time.process_time()
start = now()
from octavo.plugins.host import discover
imported = now()
plugins = discover()
end = now()
from importlib.metadata import distributions
print(json.dumps({
    "import_wall_ms": 1000 * (imported[0] - start[0]),
    "import_cpu_ms": 1000 * (imported[1] - start[1]),
    "discover_wall_ms": 1000 * (end[0] - imported[0]),
    "discover_cpu_ms": 1000 * (end[1] - imported[1]),
    "num_distributions": len({distribution.metadata["Name"] for distribution in distributions()}),
    "num_plugins_ok": sum(plugin.state == "ok" for plugin in plugins),
}))
"""

NOTE = """\
Medians over fresh processes, files in the system's cache. `import` is of octavo.plugins.host with what it imports
itself; `discover` is everything after that: reading the entry points of every distribution, importing the plugins'
modules and running their hooks, the built-ins' too."""


def main() -> None:
    args = parse_arguments()
    circumstances = report.circumstances(threads=1)
    path = args.output or report.result_path("discovery")
    result = {**circumstances, **measure(args)}
    text = markdown(result)
    report.write_result(path, result, text)
    print(f"{text}\n\nWritten to {path}.md and {path}.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--distributions", type=int, default=300, help="made for the measurement (%(default)s)")
    parser.add_argument("--plugins", type=int, default=10, help="of them, how many are plugins (%(default)s)")
    parser.add_argument("--processes", type=int, default=21, help="measurements (%(default)s)")
    parser.add_argument("--output", type=Path, help="path of the result without its suffix; default: a new dated one")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Every process's numbers and their medians."""
    with tempfile.TemporaryDirectory() as folder:
        make_distributions(Path(folder), args.distributions, args.plugins)
        discover(folder)  # compiles the modules and warms the system's cache
        runs = [discover(folder) for _ in range(args.processes)]
    if (found := min(run["num_plugins_ok"] for run in runs)) <= args.plugins:
        sys.exit(f"{found} plugins loaded, of {args.plugins} that were made and the built-ins.")
    times = [name for name in runs[0] if name.endswith("_ms")]
    return {
        "num_distributions": runs[0]["num_distributions"],
        "num_plugins": runs[0]["num_plugins_ok"],
        "processes": args.processes,
        "target_ms": TARGET_MS,
        "medians": {name: statistics.median(run[name] for run in runs) for name in times},
        "runs": [{name: run[name] for name in times} for run in runs],
    }


def make_distributions(folder: Path, number: int, num_plugins: int) -> None:
    """As pip would leave them, the plugins spread among the others."""
    plugins = {number * index // num_plugins for index in range(num_plugins)}
    for index in range(number):
        make_distribution(folder, f"dummy_{index}", index in plugins)


def make_distribution(folder: Path, name: str, is_plugin: bool) -> None:
    """A module and its dist-info; a plugin's entry point, or for every third of the others a script's."""
    (folder / f"{name}.py").write_text(PLUGIN.format(name=name) if is_plugin else "")
    dist_info = folder / f"{name}-1.0.dist-info"
    dist_info.mkdir()
    description = "A sentence of its description.\n" * 250
    requirements = "".join(f"Requires-Dist: library_{number}>=1\n" for number in range(12))
    distribution = name.replace("_", "-")
    (dist_info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{requirements}\n{description}"
    )
    (dist_info / "RECORD").write_text("".join(f"{name}/part_{part}.py,sha256=x,100\n" for part in range(100)))
    (dist_info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    if is_plugin:
        (dist_info / "entry_points.txt").write_text(f"[octavo]\n{distribution} = {name}\n")
    elif int(name.rpartition("_")[2]) % 3 == 0:
        (dist_info / "entry_points.txt").write_text(f"[console_scripts]\n{distribution} = {name}:main\n")


def discover(folder: str) -> dict[str, float]:
    """One fresh process with this folder on its path."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    environ["PYTHONPATH"] = folder
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, check=True, env=environ)
    numbers: dict[str, float] = json.loads(done.stdout)
    return numbers


def markdown(result: Mapping[str, object]) -> str:
    """The content of a result's Markdown file."""
    medians = result["medians"]
    assert isinstance(medians, dict)
    steps = ("discover", "import")
    rows = [[step, f"{medians[f'{step}_wall_ms']:.1f}", f"{medians[f'{step}_cpu_ms']:.1f}"] for step in steps]
    met = "met" if medians["discover_wall_ms"] < TARGET_MS else "missed"
    return "\n\n".join(
        [
            f"# Discovery, {result['date']}",
            f"{result['num_distributions']} installed distributions, {result['num_plugins']} plugins loaded, the "
            f"built-ins among them; {result['processes']} processes. The target of {TARGET_MS:.0f} ms for `discover` "
            f"is {met}.",
            report.markdown_table(["step", "wall ms", "CPU ms"], rows),
            NOTE,
            report.markdown_circumstances(result),
        ]
    )


if __name__ == "__main__":
    main()
