"""`octavo env`: this machine and what is installed on it, for bug reports and for choosing plugins."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from octavo.plugins.host import discover

PACKAGES = (
    "octavo",
    "torch",
    "numpy",
    "triton",
    "transformers",
    "tokenizers",
    "peft",
    "safetensors",
    "pydantic",
    "pluggy",
)
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def run(args: argparse.Namespace) -> int:
    found = describe()
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    return 0


def describe() -> dict[str, object]:
    """Everything `octavo env` tells. Imports torch, which alone knows the CUDA devices it can use."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": describe_cpu(_read("/proc/cpuinfo")),
        "memory": _memory(),
        "cuda": _cuda(),
        "plugins": {plugin.name: f"{plugin.version}, {plugin.fault}".lstrip(", ") for plugin in discover()},
        "model_cache_folder": _model_cache_folder(),
    }


def describe_cpu(cpuinfo: str) -> dict[str, object]:
    """Model, cores and the flags kernels ask for, from the text of /proc/cpuinfo ("" where there is none)."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "num_cores": os.cpu_count(),
        "num_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> dict[str, int | None]:
    """Bytes of this machine; `available` is what can be taken without swapping, where the system tells."""
    available = None
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        total = None
    return {"total_bytes": total, "available_bytes": available}


def _cuda() -> dict[str, object]:
    try:
        import torch
    except Exception as error:
        return {"devices": [], "reason": f"torch does not import: {type(error).__name__}: {error}"}
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "version": torch.version.cuda,
        "devices": [
            {
                "name": device.name,
                "memory_bytes": device.total_memory,
                "compute_capability": f"{device.major}.{device.minor}",
            }
            for device in devices
        ],
    }


def _model_cache_folder() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _lines(values: Mapping[str, object], indent: str = "") -> Iterator[str]:
    for key, value in values.items():
        label = f"{indent}{key.replace('_', ' ')}:"
        if isinstance(value, Mapping):
            yield label
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list):
            yield f"{label} {', '.join(_item(one) for one in value) or 'none'}"
        elif isinstance(value, int) and key.endswith("_bytes"):
            yield f"{indent}{key.removesuffix('_bytes').replace('_', ' ')}: {value / 2**30:.1f} GiB"
        else:
            yield f"{label} {'none' if value is None else value}"


def _item(value: object) -> str:
    return " ".join(line.strip() for line in _lines(value)) if isinstance(value, Mapping) else str(value)
