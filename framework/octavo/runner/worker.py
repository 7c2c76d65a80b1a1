"""Worker: builds on one device exactly what a manifest says, then runs steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from octavo.interfaces.attention import BatchLimits
from octavo.interfaces.checkpoint import Checkpoint
from octavo.interfaces.executor import ExecutorReport, Step, StepOutput
from octavo.interfaces.manifest import Manifest
from octavo.interfaces.model import ModelArchitecture
from octavo.interfaces.quantization import QuantizationMethod
from octavo.model_config import ModelConfig
from octavo.nn.factory import DeviceLayerFactory
from octavo.nn.rotary import RotaryTable
from octavo.nn.split_attention import build_attention
from octavo.nn.weights import WeightLoader
from octavo.runner.kv_cache import num_kv_blocks
from octavo.runner.model_runner import ModelRunner


class Worker:
    """The model, its cache and its runner on one device. Nothing is discovered here: targets come by name."""

    def __init__(self, manifest: Manifest) -> None:
        self._phases: list[tuple[str, float]] = []
        chosen = manifest.components
        checkpoint: Checkpoint = chosen["checkpoint"].build(manifest.model_path)
        config = ModelConfig.from_dict(checkpoint.config(), checkpoint.generation_config())
        dtype: torch.dtype = getattr(torch, manifest.dtype)
        engine = manifest.config
        attention = build_attention(chosen["attention.prefill"], chosen["attention.decode"], manifest.attention_need)
        loader = WeightLoader()
        with self._phase("build model"):
            method: QuantizationMethod = chosen["quantization"].build(config.quantization, dtype, manifest.device)
            factory = DeviceLayerFactory(method, attention, loader)
            model: ModelArchitecture = chosen["model"].build(config, factory)
            rotary = RotaryTable(config.rope, config.head_dim, manifest.max_model_len, dtype, manifest.device)
        with self._phase("load weights"):
            loader.load(checkpoint.tensors(), model.ignored_names())
        with self._phase("allocate KV cache"):
            layout = attention.kv_layout()
            num_blocks = num_kv_blocks(
                layout,
                config.num_layers,
                kv_cache_memory_bytes=engine.kv_cache_memory_bytes,
                max_useful_blocks=engine.max_num_seqs * -(-manifest.max_model_len // engine.block_size),
                min_tokens=1 if engine.max_model_len is None else engine.max_model_len,
                block_size=engine.block_size,
                device=manifest.device,
            )
            kv_caches = [layout.allocate(num_blocks, manifest.device) for _ in range(config.num_layers)]
        self._runner = ModelRunner(
            model,
            rotary,
            attention,
            kv_caches,
            BatchLimits(
                max_num_requests=engine.max_num_seqs,
                max_num_tokens=engine.max_num_batched_tokens,
                max_model_len=manifest.max_model_len,
                block_size=engine.block_size,
                device=manifest.device,
            ),
        )
        self.report = ExecutorReport(
            num_blocks=num_blocks,
            kv_cache_bytes=num_blocks * layout.bytes_per_block * config.num_layers,
            weight_bytes=loader.num_bytes,
            phases=tuple(self._phases),
        )

    def execute(self, step: Step) -> StepOutput:
        return self._runner.execute(step)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._phases.append((name, time.monotonic() - start))
