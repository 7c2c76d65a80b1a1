"""Where the time of decode steps goes, by torch.profiler: shares of kernels, and how long the GPU has nothing to do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts.part import Part
from octavo import LLM, SamplingParams
from octavo.interfaces.executor import Step

IDLE_TARGET = 0.03
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
KINDS = (
    # the first whose words are in a kernel's name, in lower case
    ("matrix products", ("gemm", "cutlass", "cublas", "nvjet", "splitk", "matmul")),
    ("attention", ("attention", "flash", "paged", "decode_kernel", "merge_splits", "write_kv", "fmha")),
    ("norms and activations", ("rms_norm", "gated", "silu")),
    ("sampling", ("sample", "top_threshold", "argmax", "gumbel", "top_k", "top_p", "sort", "reduce")),
    ("copies", ("memcpy", "memset", "copy")),
)


class ProfiledSteps:
    """Listens to an engine's steps and profiles some in the middle of a run of decodes."""

    def __init__(self, batch: int, skip: int, count: int, on_gpu: bool) -> None:
        self._batch, self._skip, self._count = batch, skip, count
        self._num_decodes = 0
        self._on_gpu = on_gpu
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        self._profile = profile(activities=activities)
        self._running = False
        self.done = False

    def __call__(self, step: Step) -> None:
        if self.done or (len(step.rows), step.num_tokens) != (self._batch, self._batch):
            return
        self._num_decodes += 1
        if self._num_decodes == self._skip:
            if self._on_gpu:
                torch.cuda.synchronize()  # an earlier step may still be running
            self._profile.start()
            self._running = True
        elif self._num_decodes == self._skip + self._count:
            self.stop()
            self.done = True

    def stop(self) -> None:
        """Also when the run ended before enough steps were seen."""
        if self._running:
            if self._on_gpu:
                torch.cuda.synchronize()
            self._profile.stop()
            self._running = False

    def events(self, scratch: Path) -> list[dict[str, Any]]:
        """Every complete event of the trace: name, cat, ts and dur in microseconds."""
        path = scratch / "trace.json"
        self._profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        path.unlink()
        return [event for event in events if event.get("ph") == "X"]


def profile_decode(part: Part, llm: LLM, prompts: list[list[int]]) -> None:
    """Profile some steps in which `prompts` decode together."""
    batch = len(prompts)
    skip, count = part.choose((8, 20), (8, 20), (1, 2))
    listener = ProfiledSteps(batch, skip, count, part.on_gpu)
    llm.engine.step_listeners.append(listener)
    # The first to be prefilled decode beside the prefills of the others: all must last until all decode.
    budget = llm.manifest.config.max_num_batched_tokens
    num_prefills = -(-sum(map(len, prompts)) // max(budget - batch, 1)) + 2
    max_tokens = num_prefills + skip + count + 3
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    try:
        llm.generate(prompts, params)
    finally:
        llm.engine.step_listeners.remove(listener)
        listener.stop()
    if not listener.done:
        part.not_run(f"profile at batch {batch}", "there were too few steps of decodes alone")
        return
    report(part, batch, count, listener.events(part.scratch))


def report(part: Part, batch: int, num_steps: int, events: Sequence[dict[str, Any]]) -> None:
    """A row for each kind of GPU work; of a CPU, for the operators that take longest."""
    work = [event for event in events if event.get("cat") in GPU_WORK]
    if not work:
        longest = Counter[str]()
        for event in events:
            if event.get("cat") == "cpu_op":
                longest[event["name"]] += event["dur"]
        for name, microseconds in longest.most_common(3):
            part.add("profile", batch=batch, what=f"{name} (CPU)", us_per_step=microseconds / num_steps)
        return
    begin, end = min(event["ts"] for event in work), max(event["ts"] + event["dur"] for event in work)
    idle = 1 - busy_microseconds(work) / (end - begin)
    by_kind, by_name = Counter[str](), Counter[str]()
    for event in work:
        by_kind[kind_of(event)] += event["dur"]
        by_name[event["name"]] += event["dur"]
    part.add(
        "profile",
        batch=batch,
        what="GPU idle",
        us_per_step=idle * (end - begin) / num_steps,
        share=idle,
        target=IDLE_TARGET,
        met=idle < IDLE_TARGET,
    )
    for kind, microseconds in by_kind.most_common():
        share = microseconds / (end - begin)
        part.add("profile", batch=batch, what=kind, us_per_step=microseconds / num_steps, share=share)
    for name, microseconds in by_name.most_common(6):
        part.add("longest", batch=batch, kernel=name[:90], us_per_step=microseconds / num_steps,
                 launches_per_step=sum(event["name"] == name for event in work) / num_steps)  # fmt: skip


def busy_microseconds(work: Sequence[dict[str, Any]]) -> float:
    """How long at least one of these events was running."""
    busy, until = 0.0, float("-inf")
    for event in sorted(work, key=lambda event: float(event["ts"])):
        begin, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy


def kind_of(event: dict[str, Any]) -> str:
    name = event["name"].lower()
    if event["cat"] != "kernel":
        return "copies"
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "other")
