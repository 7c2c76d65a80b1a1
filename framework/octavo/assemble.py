"""From a configuration to a running engine: ask the plugins once, then build what they answered."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from octavo.adapter_finder import AdapterFinder
from octavo.config import EngineConfig
from octavo.engine.adapters import AdapterStore
from octavo.engine.block_pool import BlockPool
from octavo.engine.engine import Engine
from octavo.engine.scheduler import Scheduler
from octavo.input_processor import InputProcessor
from octavo.interfaces.checkpoint import Checkpoint
from octavo.interfaces.executor import Executor, ExecutorReport
from octavo.interfaces.manifest import Manifest
from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.model_config import ModelConfig
from octavo.model_source import resolve_model
from octavo.output_processor import OutputProcessor
from octavo.selection import Selection, choose_checkpoint, select
from octavo.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """A running engine and what stands around it."""

    engine: Engine
    finder: AdapterFinder
    tokenizer: Tokenizer
    inputs: InputProcessor
    outputs: OutputProcessor
    model_config: ModelConfig
    selection: Selection
    manifest: Manifest
    report: ExecutorReport


def assemble(config: EngineConfig) -> Assembly:
    """Resolve the model, choose every component, load the weights, start the engine."""
    start = time.monotonic()
    selection = select(config)
    manifest = selection.manifest()
    tokenizer = Tokenizer(_tokenizer_source(selection).tokenizer())

    executor: Executor = manifest.components["executor"].build()
    policy: SchedulerPolicy = manifest.components["scheduler"].build()
    failures: list[BaseException] = []
    report = executor.start(manifest, failures.append)
    try:
        max_model_len = _served_model_len(config, manifest, report)
        scheduler = Scheduler(
            policy=policy,
            block_pool=BlockPool(report.num_blocks, config.block_size, config.enable_prefix_caching),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            adapters=_adapters(config, executor),
        )
        engine = Engine(scheduler, executor, selection.max_steps_in_flight, failures)
        assembly = Assembly(
            engine=engine,
            finder=AdapterFinder.of(manifest),
            tokenizer=tokenizer,
            inputs=InputProcessor(
                tokenizer, selection.files.model_config, max_model_len, config.seed, config.max_logprobs
            ),
            outputs=OutputProcessor(tokenizer),
            model_config=selection.files.model_config,
            selection=selection,
            manifest=manifest,
            report=report,
        )
    except BaseException:
        executor.stop()
        raise
    try:
        _load_adapters(engine, config.lora_modules)
    except BaseException:
        engine.stop()
        raise
    _log_start(manifest, report, time.monotonic() - start)
    return assembly


def _adapters(config: EngineConfig, executor: Executor) -> AdapterStore | None:
    if not config.enable_lora:
        return None
    return AdapterStore(
        executor.load_adapter,
        executor.drop_adapter,
        max_loras=config.max_loras,
        max_cpu_loras=config.num_cpu_loras,
    )


def _load_adapters(engine: Engine, paths: Mapping[str, str]) -> None:
    """Those that the settings name, before the first request."""
    loading = [engine.load_adapter(name, path) for name, path in paths.items()]
    while not all(one.done() for one in loading):
        engine.step()
    for one in loading:
        one.result()


def _tokenizer_source(selection: Selection) -> Checkpoint:
    config = selection.config
    if config.tokenizer is None:
        return selection.files.checkpoint
    path = resolve_model(config.tokenizer, config.revision, weights=False)
    source: Checkpoint = choose_checkpoint(selection.registry, path).get().build(str(path))
    return source


def _served_model_len(config: EngineConfig, manifest: Manifest, report: ExecutorReport) -> int:
    """What one request may hold: the model's length, or the whole KV cache when that is smaller."""
    capacity = report.num_blocks * config.block_size
    if capacity < manifest.max_model_len:
        logger.warning(
            "The KV cache holds %d tokens, fewer than the model's %d: longer requests are refused. "
            "Raise kv_cache_memory_bytes to serve them.",
            capacity,
            manifest.max_model_len,
        )
    return min(capacity, manifest.max_model_len)


def _log_start(manifest: Manifest, report: ExecutorReport, seconds: float) -> None:
    phases = ", ".join(f"{name} {duration:.2f} s" for name, duration in report.phases)
    chosen = ", ".join(f"{kind} {component.name}" for kind, component in manifest.components.items())
    logger.info("Engine ready in %.2f s (%s); %s; %d KV blocks", seconds, phases, chosen, report.num_blocks)
