"""Worker: builds on one device exactly what a manifest says, then runs steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from octavo.interfaces.attention import BatchLimits
from octavo.interfaces.checkpoint import Checkpoint
from octavo.interfaces.executor import ExecutorReport, Step, StepOutput
from octavo.interfaces.logits_rule import RuleLimits
from octavo.interfaces.manifest import Manifest
from octavo.interfaces.model import ModelArchitecture
from octavo.interfaces.proposer import ProposerContext
from octavo.interfaces.quantization import QuantizationMethod
from octavo.model_config import ModelConfig
from octavo.nn.factory import DeviceLayerFactory
from octavo.nn.split_attention import build_attention
from octavo.nn.weights import WeightLoader
from octavo.runner.drafting import Drafter
from octavo.runner.kv_cache import check_num_kv_blocks, device_memory, kv_cache_budget, num_kv_blocks
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
            rotary = factory.rotary_tables(manifest.max_model_len)
        with self._phase("load weights"):
            loader.load(checkpoint.tensors(), model.ignored_names())
        with self._phase("allocate KV cache"):
            layout = attention.kv_layout()
            bytes_per_block = layout.bytes_per_block * config.num_layers
            budget = kv_cache_budget(engine, device_memory(manifest.device), manifest.device)
            num_blocks = num_kv_blocks(engine, manifest.max_model_len, budget, bytes_per_block)
            check_num_kv_blocks(engine, num_blocks, budget, bytes_per_block)
            kv_caches = [layout.allocate(num_blocks, manifest.device) for _ in range(config.num_layers)]
        rule_limits = RuleLimits(
            max_num_requests=engine.max_num_seqs, vocab_size=config.vocab_size, device=manifest.device
        )
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
            rules=[rule.build(rule_limits) for rule in manifest.logits_rules],
            drafter=None
            if "proposer" not in chosen
            else Drafter(
                chosen["proposer"].build(ProposerContext(manifest=manifest, vocab_size=config.vocab_size)),
                name=chosen["proposer"].full_name,
                num_drafts=engine.num_speculative_tokens,
                vocab_size=config.vocab_size,
                max_model_len=manifest.max_model_len,
            ),
        )
        self.report = ExecutorReport(
            num_blocks=num_blocks,
            kv_cache_bytes=num_blocks * bytes_per_block,
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
