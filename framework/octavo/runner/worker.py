"""Worker: builds on one device exactly what a manifest says, then runs steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from octavo.errors import AdapterError
from octavo.interfaces.executor import AdapterPlacement, ExecutorReport, Step, StepOutput
from octavo.interfaces.logits_rule import RuleLimits
from octavo.interfaces.lora import AdapterWeights
from octavo.interfaces.manifest import Manifest
from octavo.interfaces.proposer import IncrementalModel, ProposerContext
from octavo.lora.adapter import AdapterInfo
from octavo.runner.drafting import Drafter
from octavo.runner.graphs import graph_plan
from octavo.runner.incremental_model import PagedIncrementalModel
from octavo.runner.kv_cache import (
    check_num_kv_blocks,
    device_memory,
    kv_cache_budget,
    num_draft_kv_blocks,
    num_kv_blocks,
    without_draft_kv,
)
from octavo.runner.loaded_model import LoadedModel, check_same_vocabulary, load_model
from octavo.runner.model_runner import StepInFlight
from octavo.runner.trial import activation_bytes

logger = logging.getLogger(__name__)


class Worker:
    """The model, its cache and its runner on one device. Nothing is discovered here: targets come by name."""

    def __init__(self, manifest: Manifest) -> None:
        self._phases: list[tuple[str, float]] = []
        self._loaded: dict[int, AdapterWeights] = {}
        model, draft = load_model(manifest, self._phase), None
        if manifest.draft_model is not None:
            with self._phase("load draft model"):
                check_same_vocabulary(manifest, manifest.draft_model)
                draft = load_model(manifest.draft_model, lambda _phase: nullcontext())
        self._adapters = model.adapters
        engine, bytes_per_block = manifest.config, model.bytes_per_block
        rule_limits = RuleLimits(
            max_num_requests=engine.max_num_seqs, vocab_size=model.config.vocab_size, device=manifest.device
        )
        step_bytes = 0
        if manifest.device == "cuda":  # a CPU's KV cache takes no more than half of what is free
            with self._phase("try the largest steps"):
                rules = [rule.build(rule_limits) for rule in manifest.logits_rules]
                step_bytes = max(activation_bytes(one, rules) for one in (model, draft) if one is not None)
        with self._phase("allocate KV cache"):
            memory = device_memory(manifest.device)
            budget = kv_cache_budget(engine, memory, manifest.device, step_bytes)
            if draft is not None:
                budget = without_draft_kv(engine, draft.manifest.config, budget, bytes_per_block, draft.bytes_per_block)
            num_blocks = num_kv_blocks(engine, manifest.max_model_len, budget, bytes_per_block)
            gpu_memory = memory if manifest.device == "cuda" else None
            check_num_kv_blocks(engine, num_blocks, budget, bytes_per_block, gpu_memory, step_bytes)
            kv_cache_bytes = num_blocks * bytes_per_block
            beside, draft_kv_bytes = _beside(draft, num_blocks) if draft is not None else (None, 0)
            graphs = graph_plan(manifest.device, engine.max_num_seqs, engine.enforce_eager)
            self._runner = model.make_runner(
                num_blocks,
                rules=[rule.build(rule_limits) for rule in manifest.logits_rules],
                drafter=_drafter(model, beside),
                graph_plan=graphs,
            )
        if graphs is not None:
            with self._phase("capture decode steps"):
                self._runner.capture()
        self.report = ExecutorReport(
            num_blocks=num_blocks,
            kv_cache_bytes=kv_cache_bytes + draft_kv_bytes,
            weight_bytes=model.weight_bytes + (draft.weight_bytes if draft is not None else 0),
            adapter_bytes=0 if model.adapters is None else model.adapters.backend.num_bytes,
            phases=tuple(self._phases),
        )

    def submit(self, step: Step) -> StepInFlight:
        if step.placements:
            self._place(step.placements)
        return self._runner.submit(step)

    def collect(self, step: StepInFlight) -> StepOutput:
        return self._runner.collect(step)

    @torch.inference_mode()
    def load_adapter(self, adapter_id: int, path: str) -> AdapterInfo:
        """Read an adapter into the host's memory; may be called beside steps.

        Raises:
            AdapterError: it cannot be served.
        """
        if self._adapters is None:
            raise AdapterError("No LoRA adapters are served: set enable_lora=True.")
        self._loaded[adapter_id] = adapter = self._adapters.backend.load(path, self._adapters.base)
        return adapter.info

    def drop_adapter(self, adapter_id: int) -> None:
        """Let go of a loaded adapter."""
        self._loaded.pop(adapter_id, None)

    @torch.inference_mode()
    def _place(self, placements: Sequence[AdapterPlacement]) -> None:
        assert self._adapters is not None, "placements are of adapters that were loaded"
        for placement in placements:
            self._adapters.backend.place(placement.position, self._loaded[placement.adapter_id])

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._phases.append((name, time.monotonic() - start))


def _beside(draft: LoadedModel, num_served_blocks: int) -> tuple[IncrementalModel, int]:
    """The proposer's own model, ready to run, and the bytes of its KV cache."""
    manifest = draft.manifest
    num_blocks = num_draft_kv_blocks(manifest.config, manifest.max_model_len, num_served_blocks, draft.bytes_per_block)
    kv_cache_bytes = num_blocks * draft.bytes_per_block
    logger.info(
        "Draft model %s takes %s bytes of weights and %s bytes of KV cache (%d blocks)",
        manifest.config.model,
        f"{draft.weight_bytes:,}",
        f"{kv_cache_bytes:,}",
        num_blocks,
    )
    return PagedIncrementalModel(draft.make_runner(num_blocks), draft.limits, num_blocks), kv_cache_bytes


def _drafter(model: LoadedModel, beside: IncrementalModel | None) -> Drafter | None:
    """The proposer that was chosen, behind its guard."""
    manifest, vocab_size = model.manifest, model.config.vocab_size
    chosen = manifest.components.get("proposer")
    if chosen is None:
        return None
    context = ProposerContext(manifest=manifest, vocab_size=vocab_size, draft_model=beside)
    return Drafter(
        chosen.build(context),
        name=chosen.full_name,
        num_drafts=manifest.config.num_speculative_tokens,
        vocab_size=vocab_size,
        max_model_len=manifest.max_model_len,
    )
