"""Tile sizes of this package's kernels: data per GPU architecture in configs/, a heuristic where there is none.

Nothing is measured while serving; `python -m octavo_linear_triton.tune` does, and writes a file.

`octavo.plugins.tuned_data` says what a file holds. A case is made of numbers: dtype_bits (of an activation),
bits (of a code), num_tokens (rounded up to a power of two).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from octavo.plugins import tuned_data
from octavo.plugins.tuned_data import INTERPRETER

CONFIGS = Path(__file__).parent / "configs"

NUM_TOKENS = (8, 16, 32, 64, 128)
"""That products are tuned for. Of more, weights are dequantised first: from there on that is the faster way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductConfig:
    """Of a product: tiles of block_outputs x block_tokens; programs a multiprocessor shall have, by cutting inputs."""

    block_outputs: int
    block_tokens: int
    num_warps: int
    num_stages: int
    programs: int


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
    return max(config.programs * tuned_data.num_multiprocessors(CONFIGS, capability, str(x.device)) // tiles, 1)


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


@lru_cache(maxsize=1024)
def _product_config(
    capability: int, kernel: str, bits: int, dtype_bits: int, log_num_tokens: int
) -> ProductConfig | None:
    num_tokens = max(1 << log_num_tokens, NUM_TOKENS[0])
    if num_tokens > NUM_TOKENS[-1]:
        return None
    if capability == INTERPRETER:
        return ProductConfig(block_outputs=32, block_tokens=min(num_tokens, 32), num_warps=4, num_stages=1, programs=1)
    case = {"dtype_bits": dtype_bits, "bits": bits, "num_tokens": num_tokens}
    found = tuned_data.nearest(tuned_data.entries(CONFIGS, capability, kernel), case, same=["dtype_bits"])
    return ProductConfig(**(asdict(product_heuristic(dtype_bits, num_tokens)) if found is None else found))
