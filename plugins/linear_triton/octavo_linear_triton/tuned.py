# mypy: disable-error-code="import-untyped"
"""Tile sizes of this package's kernels: data per GPU architecture in configs/, a heuristic where there is none.

Nothing is measured while serving; `python -m octavo_linear_triton.tune` does, and writes a file.

A file configs/sm_<capability>.json holds

    source              how its numbers were found
    gpu                 the GPU they were measured on, null when they were not
    versions, date      of that measurement
    multiprocessors     of that GPU, or of one of its architecture
    kernels             kernel name -> list of {"when": case, "config": sizes}; with "microseconds" it was measured

A case is made of numbers: dtype_bits (of an activation), bits (of a code), num_tokens (rounded up to a power of two).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels of this process are interpreted on the CPU instead of compiled."""

NUM_TOKENS = (8, 16, 32, 64, 128)
"""That products are tuned for. Of more, weights are dequantised first: from there on that is the faster way."""

_INTERPRETER = 0  # in place of a compute capability


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductConfig:
    """Of a product: tiles of block_outputs x block_tokens; programs a multiprocessor shall have, by cutting inputs."""

    block_outputs: int
    block_tokens: int
    num_warps: int
    num_stages: int
    programs: int


def target_capability() -> int:
    """Of the GPU that kernels are launched on, 90 for 9.0; 0 under the interpreter."""
    if INTERPRETED:
        return _INTERPRETER
    from triton.runtime import driver

    return int(driver.active.get_current_target().arch)


@cache
def num_multiprocessors(capability: int, device: str) -> int:
    """How many programs run side by side at the least."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return int(_load(capability).get("multiprocessors", 4))


def product_config(
    capability: int, kernel: str, bits: int, dtype: torch.dtype, num_tokens: int
) -> ProductConfig | None:
    """Of a product with so many tokens; None: dequantise the weights, and leave it to torch.

    Args:
        kernel: "affine_linear" or "lookup_linear".
        bits: of a code. dtype: of activations.
    """
    return _product_config(capability, kernel, bits, dtype.itemsize * 8, max(num_tokens - 1, 0).bit_length())


def most_splits(capability: int, config: ProductConfig, x: torch.Tensor, out_features: int) -> int:
    """Parts to cut the inputs into, so that every multiprocessor has its programs."""
    tiles = -(-out_features // config.block_outputs) * -(-len(x) // config.block_tokens)
    return max(config.programs * num_multiprocessors(capability, str(x.device)) // tiles, 1)


def product_heuristic(dtype_bits: int, num_tokens: int) -> ProductConfig:
    """Many outputs in a tile, so that activations are seldom read; of 32 bits few, which no tensor core takes."""
    if dtype_bits == 32:
        return ProductConfig(block_outputs=32, block_tokens=8, num_warps=4, num_stages=2, programs=8)
    return ProductConfig(
        block_outputs=128 if num_tokens <= 16 else 64,
        block_tokens=min(num_tokens, 64),
        num_warps=4 if num_tokens <= 16 else 8,  # whose registers hold the sums
        num_stages=4 if num_tokens <= 16 else 3,
        programs=4 if num_tokens <= 16 else 2,
    )


def nearest(entries: list[Mapping[str, Any]], case: Mapping[str, int]) -> Mapping[str, int] | None:
    """The configuration whose case is nearest, sizes compared by their logarithms; None: none is for such a dtype."""

    def distance(when: Mapping[str, int]) -> float:
        return sum(abs(math.log2(when[name]) - math.log2(case[name])) for name in when)

    fitting = [entry for entry in entries if entry["when"]["dtype_bits"] == case["dtype_bits"]]
    return min(fitting, key=lambda entry: distance(entry["when"]))["config"] if fitting else None


@lru_cache(maxsize=1024)
def _product_config(
    capability: int, kernel: str, bits: int, dtype_bits: int, log_num_tokens: int
) -> ProductConfig | None:
    num_tokens = max(1 << log_num_tokens, NUM_TOKENS[0])
    if num_tokens > NUM_TOKENS[-1]:
        return None
    if capability == _INTERPRETER:
        return ProductConfig(block_outputs=32, block_tokens=min(num_tokens, 32), num_warps=4, num_stages=1, programs=1)
    case = {"dtype_bits": dtype_bits, "bits": bits, "num_tokens": num_tokens}
    found = nearest(_load(capability).get("kernels", {}).get(kernel, []), case)
    return ProductConfig(**(asdict(product_heuristic(dtype_bits, num_tokens)) if found is None else found))


@cache
def _load(capability: int) -> Mapping[str, Any]:
    """The file of an architecture; {} when there is none."""
    path = CONFIGS / f"sm_{capability}.json"
    content: Mapping[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content
