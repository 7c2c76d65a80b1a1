"""Measures tile sizes on this machine's GPU and writes configs/sm_<capability>.json.

    python -m octavo_attention_triton.tune [--kernel paged_decode] [--head-dim 128] [--out FILE]

Every case of the file is tried with every candidate that compiles without spilling; of these the one whose time,
the geometric mean over the case's workloads, is the least takes the case's entry. Cases that are left out keep theirs.
Needs a GPU, and what the tests need (`pip install octavo-attention-triton[test] pytest`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.interfaces import AttentionBackend, AttentionParameters, BatchLayout, BatchLimits, KVCache
from octavo.plugins import tuned_data
from octavo.plugins.specs import AttentionNeed
from octavo.plugins.tuned_data import Config, TunedCase, Tuner, graph_seconds
from octavo_attention_triton.tuned import CONFIGS, FlashConfig, PagedConfig

_COLD_BYTES = 256 * 2**20  # of keys and values between two uses of one cache: more than any L2 holds
_NUM_KV_HEADS, _GROUP, _BLOCK_SIZE = 8, 4, 16  # of Llama-3-8B, where a case does not say


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Equal requests of one step: `context` tokens in the cache, `num_tokens` to compute."""

    num_requests: int
    num_tokens: int
    context: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Case(TunedCase[Workload]):
    """One entry of a file: a kernel and the "when" it is for."""

    def need(self) -> AttentionNeed:
        """Of a model that this case is for."""
        bits, group = self.when["bits"], self.when.get("group", _GROUP)
        return AttentionNeed(
            device="cuda",
            dtype={16: "bfloat16", 32: "float32"}[bits],
            num_heads=_NUM_KV_HEADS * group,
            num_kv_heads=_NUM_KV_HEADS,
            head_dim=self.when["head_dim"],
            block_size=self.when.get("block_size", _BLOCK_SIZE),
            kv_cache_dtype="fp8" if self.when["kv_bits"] == 8 else "auto",
        )

    def workloads(self) -> list[Workload]:
        """What it is timed on: few and many requests, short contexts and long ones."""
        if self.kernel == "paged_decode":
            return [
                Workload(num_requests=count, num_tokens=1, context=context)
                for count, context in ((1, 8191), (32, 2047), (128, 1023))
            ]
        num_tokens = max(self.when["max_query_len"] // self.when.get("group", _GROUP), 1)
        chunks = Workload(num_requests=max(2048 // num_tokens, 1), num_tokens=num_tokens, context=1024)
        prompts = Workload(num_requests=2, num_tokens=4096, context=0)
        return [chunks, prompts] if self.when["max_query_len"] > 128 else [chunks]

    def candidates(self) -> list[Config]:
        """Tile sizes to try."""
        sizes = {"block_n": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
        if self.kernel == "flash_prefill":
            sizes = {"block_m": (16, 32, 64, 128), **sizes}
        return [dict(zip(sizes, values, strict=True)) for values in itertools.product(*sizes.values())]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m octavo_attention_triton.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", help="only this kernel's cases")
    parser.add_argument("--head-dim", type=int, help="only cases of this head size")
    parser.add_argument("--out", type=Path, help="the file to write; by default the one that is read")
    options = parser.parse_args(arguments)

    def is_wanted(case: Case) -> bool:
        return options.kernel in (None, case.kernel) and options.head_dim in (None, case.when["head_dim"])

    return tuned_data.tune(CONFIGS, Case, _GPU, is_wanted, distribution="octavo-attention-triton", out=options.out)


class _GPU(Tuner[Case, Workload]):
    """Compiles and times candidates."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self._prepared: tuple[object, _Step] | None = None

    def faults(self, case: Case, config: Config) -> list[str]:
        from octavo.testing import compiling  # here: what it needs is installed for tests

        workload = Workload(num_requests=1, num_tokens=case.workloads()[0].num_tokens, context=64)
        try:
            with compiling(self.capability) as compiled:
                _Step(case, workload, "cpu", num_caches=1).launch(config, 0)
        except RuntimeError as error:  # what the compiler says is the reason
            return [str(error)]
        return [fault for kernel in compiled if kernel.name == f"{case.kernel}_kernel" for fault in kernel.faults()]

    def seconds(self, case: Case, workload: Workload, config: Config) -> float:
        """Of one launch in a CUDA graph that goes through caches which the L2 does not hold all of."""
        if self._prepared is None or self._prepared[0] != (case, workload):
            self._prepared = None  # its memory first
            self._prepared = (case, workload), _Step(case, workload, "cuda")
        step = self._prepared[1]
        return graph_seconds(lambda index: step.launch(config, index), len(step.caches))


class _Step:
    """A workload's tensors, and enough caches that each launch finds its own out of the L2."""

    def __init__(self, case: Case, workload: Workload, device: str, num_caches: int | None = None) -> None:
        from octavo_attention_triton.flash import TritonFlash
        from octavo_attention_triton.options import PagedOptions
        from octavo_attention_triton.paged import TritonPaged

        need = case.need()
        is_paged = case.kernel == "paged_decode"
        self._make_config = PagedConfig if is_paged else FlashConfig
        self._backend: AttentionBackend = TritonPaged(need, options=PagedOptions()) if is_paged else TritonFlash(need)
        self._layout = _layout(workload, need.block_size, device)
        limits = BatchLimits(
            max_num_requests=256,
            max_num_tokens=max(self._layout.num_tokens, 256),
            max_model_len=self._layout.max_seq_len,
            block_size=need.block_size,
            device=device,
        )
        self._state: Any = self._backend.make_state(limits)
        dtype: torch.dtype = getattr(torch, str(need.dtype))
        heads = (need.num_heads, need.num_kv_heads, need.num_kv_heads)
        self._inputs = [
            torch.randn(self._layout.num_tokens, count, need.head_dim, device=device).to(dtype) for count in heads
        ]
        self._parameters = AttentionParameters(scale=need.head_dim**-0.5)
        kv_layout, num_blocks = self._backend.kv_layout(), self._layout.block_table.numel()
        num_caches = num_caches or -(-_COLD_BYTES // (kv_layout.bytes_per_block * num_blocks)) + 1
        self.caches: list[KVCache] = [
            tuple(
                torch.randn(buffer.shape, device=device).to(buffer.dtype)
                for buffer in kv_layout.allocate(num_blocks, device)
            )
            for _ in range(num_caches)
        ]

    def launch(self, config: Config, index: int) -> None:
        """One layer over one of the caches, with this configuration in place of the one that was read."""
        self._state.config = self._make_config(**config)
        self._backend.plan(self._layout, self._state)
        self._state.config = self._make_config(**config)
        query, key, value = self._inputs
        self._backend.forward(query, key, value, self.caches[index], self._state, self._parameters)


def _layout(workload: Workload, block_size: int, device: str) -> BatchLayout:
    """The step, its blocks in random order."""
    count, length = workload.num_requests, workload.context + workload.num_tokens
    num_blocks = -(-length // block_size)
    table = torch.randperm(count * num_blocks, generator=torch.Generator().manual_seed(0)).view(count, num_blocks)
    positions = torch.arange(workload.context, length)
    slots = table[:, positions // block_size] * block_size + positions % block_size
    query_start_loc = np.arange(0, (count + 1) * workload.num_tokens, workload.num_tokens, dtype=np.int32)
    seq_lens = np.full(count, length, np.int32)
    num_decodes = count if workload.num_tokens == 1 else 0
    return BatchLayout(
        num_requests=count,
        num_tokens=slots.numel(),
        num_decode_requests=num_decodes,
        num_decode_tokens=num_decodes,
        max_query_len=workload.num_tokens,
        max_seq_len=length,
        block_size=block_size,
        query_start_loc=torch.from_numpy(query_start_loc).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        block_table=table.int().to(device),
        slot_mapping=slots.flatten().to(device),
        host_query_start_loc=query_start_loc,
        host_seq_lens=seq_lens,
    )


if __name__ == "__main__":
    sys.exit(main())
