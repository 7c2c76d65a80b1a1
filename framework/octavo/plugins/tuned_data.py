# mypy: disable-error-code="import-untyped"
"""Tile sizes of a plugin's Triton kernels: a file per GPU architecture, how it is read and how measured anew.

A file sm_<capability>.json holds

    source              how its numbers were found
    gpu                 the GPU they were measured on, null when they were not
    versions, date      of that measurement
    multiprocessors     of that GPU, or of one of its architecture
    kernels             kernel name -> list of {"when": case, "config": sizes}; with "microseconds" it was measured

A case is made of numbers, each plugin's own. torch and Triton are imported only where a GPU is asked.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

Config = dict[str, int]
Document = dict[str, Any]
Workload = TypeVar("Workload")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels of this process are interpreted on the CPU instead of compiled."""

INTERPRETER = 0
"""In place of a compute capability."""

_REPEATS = 5
_WHERE_IT_SAYS = ' where "microseconds" says so; the others: '


# ----------------------------------------------------------------------------------------------------- serving


def target_capability() -> int:
    """Of the GPU that kernels are launched on, 90 for 9.0; INTERPRETER under the interpreter."""
    if INTERPRETED:
        return INTERPRETER
    from triton.runtime import driver

    return int(driver.active.get_current_target().arch)


@cache
def load(folder: Path, capability: int) -> Mapping[str, Any]:
    """The file of an architecture; {} when there is none."""
    path = folder / f"sm_{capability}.json"
    content: Mapping[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def entries(folder: Path, capability: int, kernel: str) -> list[Mapping[str, Any]]:
    """A kernel's cases and configurations; [] when the architecture has no file, or the file nothing of the kernel."""
    found: list[Mapping[str, Any]] = load(folder, capability).get("kernels", {}).get(kernel, [])
    return found


@cache
def num_multiprocessors(folder: Path, capability: int, device: str) -> int:
    """How many programs run side by side at the least; of a GPU that is not there its file says it."""
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return int(load(folder, capability).get("multiprocessors", 4))


def nearest(
    entries: Iterable[Mapping[str, Any]], case: Mapping[str, int], *, same: Sequence[str], at_least: Sequence[str] = ()
) -> Config | None:
    """The configuration whose case is nearest, sizes compared by their logarithms; None: none fits.

    What an entry does not name does not matter.

    Args:
        same: names whose numbers must be the case's own.
        at_least: names whose numbers must not be smaller than the case's.
    """

    def fits(when: Mapping[str, int]) -> bool:
        is_same = all(when[name] == case[name] for name in same if name in when)
        return is_same and all(when[name] >= case[name] for name in at_least if name in when)

    def distance(when: Mapping[str, int]) -> float:
        return sum(abs(math.log2(when[name]) - math.log2(case[name])) for name in when if name not in same)

    fitting = [entry for entry in entries if fits(entry["when"])]
    if not fitting:
        return None
    config: Config = min(fitting, key=lambda entry: distance(entry["when"]))["config"]
    return config


# ---------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, kw_only=True)
class TunedCase(ABC, Generic[Workload]):
    """One entry of a file: a kernel and the "when" it is for."""

    kernel: str
    when: Mapping[str, int]

    @abstractmethod
    def workloads(self) -> Sequence[Workload]:
        """What it is timed on."""

    @abstractmethod
    def candidates(self) -> list[Config]:
        """Sizes to try."""


Case = TypeVar("Case", bound=TunedCase[Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a case's entry is to be; `seconds` of a launch, the geometric mean over its workloads."""

    case: TunedCase[Any]
    config: Config
    seconds: float


class Tuner(ABC, Generic[Case, Workload]):
    """Compiles and times the candidates of one GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @abstractmethod
    def faults(self, case: Case, config: Config) -> list[str]:
        """Reasons against a candidate, found by compiling it."""

    @abstractmethod
    def seconds(self, case: Case, workload: Workload, config: Config) -> float:
        """Of one launch on a workload; `graph_seconds` measures it."""


def cases_of(document: Document, make_case: Callable[..., Case]) -> list[Case]:
    """One for each entry."""
    return [
        make_case(kernel=kernel, when=entry["when"])
        for kernel, of_kernel in document["kernels"].items()
        for entry in of_kernel
    ]


def best(
    case: Case,
    faults: Callable[[Case, Config], list[str]],
    seconds: Callable[[Case, Any, Config], float],
) -> Measured:
    """The fastest candidate of those without faults, by the geometric mean over the workloads.

    Args:
        faults, seconds: as a `Tuner` has them.

    Raises:
        ValueError: every candidate has faults; the message quotes the first one's.
    """
    candidates, workloads = case.candidates(), case.workloads()
    reasons = [faults(case, candidate) for candidate in candidates]
    usable = [candidate for candidate, found in zip(candidates, reasons, strict=True) if not found]
    if not usable:
        raise ValueError(
            f"{case.kernel}: none of {len(candidates)} candidates can be used for {dict(case.when)}; {candidates[0]} "
            f"{'; '.join(reasons[0])}. Try smaller tiles."
        )
    logarithms = [0.0] * len(usable)
    for workload in workloads:  # outermost: its tensors are made once
        for index, candidate in enumerate(usable):
            logarithms[index] += math.log(seconds(case, workload, candidate))
    fastest = min(range(len(usable)), key=logarithms.__getitem__)
    return Measured(case=case, config=usable[fastest], seconds=math.exp(logarithms[fastest] / len(workloads)))


def graph_seconds(launch: Callable[[int], object], count: int) -> float:
    """Of one of the `count` launches launch(0), launch(1), ... in a CUDA graph, the median of several replays.

    Give each launch tensors of its own, more in all than the L2 holds.
    """
    import torch

    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            launch(index)
    graph.replay()
    times: list[float] = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / count)
    return sorted(times)[len(times) // 2]


def gpu_facts(distribution: str) -> Document:
    """What a file says of the GPU its numbers were measured on; `distribution` is the plugin's, for its version."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "versions": {name: version(name) for name in ("torch", "triton", distribution)},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "multiprocessors": properties.multi_processor_count,
    }


def with_measured(document: Document, measured: Sequence[Measured], facts: Document, tool: str) -> Document:
    """The document with what was measured in place of its entries for the same cases.

    Args:
        facts: gpu, versions, date, multiprocessors.
        tool: the module that measured.
    """
    kernels: dict[str, list[Document]] = {}
    for kernel, of_kernel in document["kernels"].items():
        new = {_key(one.case.when): one for one in measured if one.case.kernel == kernel}
        kernels[kernel] = [
            {"when": entry["when"], "config": one.config, "microseconds": round(one.seconds * 1e6, 2)}
            if (one := new.get(_key(entry["when"])))
            else entry
            for entry in of_kernel
        ]
    source = f"measured by {tool}"
    if not all("microseconds" in entry for of_kernel in kernels.values() for entry in of_kernel):
        source += f"{_WHERE_IT_SAYS}{document['source'].rpartition(_WHERE_IT_SAYS)[2]}"
    return {"source": source, **facts, "kernels": kernels}


def as_text(document: Document) -> str:
    """JSON with one entry a line."""
    text = json.dumps(document, indent=2)
    entry = re.compile(r"\{\s+\"when\": \{[^{}]*\},\s+\"config\": \{[^{}]*\}(?:,\s+\"microseconds\": [\d.e-]+)?\s+\}")
    return entry.sub(lambda found: re.sub(r"\s+", " ", found[0]).replace("{ ", "{").replace(" }", "}"), text) + "\n"


def tune(
    folder: Path,
    make_case: Callable[..., Case],
    make_tuner: Callable[[int], Tuner[Case, Any]],
    is_wanted: Callable[[Case], bool],
    *,
    distribution: str,
    out: Path | None = None,
) -> int:
    """Measures the wanted cases on this machine's GPU and writes its file; an exit status, 1 where there is no GPU.

    Args:
        folder: of the files. An architecture that has none begins with that of 90.
        distribution: the plugin's, "octavo-linear-triton".
        out: the file to write; by default the one that is read.
    """
    import torch

    if INTERPRETED or not torch.cuda.is_available():
        why = "TRITON_INTERPRET is set" if INTERPRETED else "torch sees no GPU"
        print(f"Tile sizes are measured on the GPU they are for, and {why}. Run this on that GPU.", file=sys.stderr)
        return 1
    major, minor = torch.cuda.get_device_capability()
    path = folder / f"sm_{10 * major + minor}.json"
    document = json.loads((path if path.exists() else folder / "sm_90.json").read_text())
    measured, tuner = [], make_tuner(10 * major + minor)
    for case in cases_of(document, make_case):
        if is_wanted(case):
            measured.append(one := best(case, tuner.faults, tuner.seconds))
            print(f"{case.kernel} {dict(case.when)}: {one.config}, {one.seconds * 1e6:.1f} us", flush=True)
    tool = f"{distribution.replace('-', '_')}.tune"
    (out or path).write_text(as_text(with_measured(document, measured, gpu_facts(distribution), tool)))
    print(f"{len(measured)} entries measured, {out or path} written")
    return 0


def _key(when: Mapping[str, int]) -> frozenset[tuple[str, int]]:
    return frozenset(when.items())
