"""From a configuration to a running engine: ask the plugins once, then build what they answered."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from octavo.config import ComponentConfig, EngineConfig
from octavo.engine.block_pool import BlockPool
from octavo.engine.engine import Engine
from octavo.engine.scheduler import Scheduler
from octavo.errors import ConfigError
from octavo.input_processor import InputProcessor
from octavo.interfaces.checkpoint import Checkpoint
from octavo.interfaces.executor import Executor, ExecutorReport
from octavo.interfaces.manifest import ChosenComponent, Manifest
from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.model_config import ModelConfig
from octavo.model_source import resolve_model
from octavo.output_processor import OutputProcessor
from octavo.plugins.registry import Registry, default_registry
from octavo.plugins.specs import AttentionNeed, CheckpointNeed, ModelNeed, Need, QuantizationNeed, load_target
from octavo.runner.device import resolve_device, resolve_dtype
from octavo.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """A running engine and what stands around it."""

    engine: Engine
    tokenizer: Tokenizer
    inputs: InputProcessor
    outputs: OutputProcessor
    model_config: ModelConfig
    manifest: Manifest
    report: ExecutorReport


def assemble(config: EngineConfig) -> Assembly:
    """Resolve the model, choose every component, load the weights, start the engine."""
    start = time.monotonic()
    registry = default_registry()
    model_path = resolve_model(config.model, config.revision)
    checkpoint_choice = _choose_checkpoint(registry, model_path)
    checkpoint: Checkpoint = load_target(checkpoint_choice.target)(str(model_path))
    model_config = ModelConfig.from_dict(checkpoint.config(), checkpoint.generation_config())
    manifest = choose(registry, config, model_path, checkpoint_choice, model_config)
    tokenizer = Tokenizer(_tokenizer_source(registry, config, checkpoint).tokenizer())

    executor: Executor = load_target(manifest.components["executor"].target)()
    policy: SchedulerPolicy = load_target(manifest.components["scheduler"].target)()
    failures: list[BaseException] = []
    report = executor.start(manifest, failures.append)
    try:
        max_model_len = _served_model_len(config, manifest, report)
        scheduler = Scheduler(
            policy=policy,
            block_pool=BlockPool(report.num_blocks, config.block_size, config.enable_prefix_caching),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        assembly = Assembly(
            engine=Engine(scheduler, executor, config.max_steps_in_flight, failures),
            tokenizer=tokenizer,
            inputs=InputProcessor(tokenizer, model_config, max_model_len, config.seed),
            outputs=OutputProcessor(tokenizer),
            model_config=model_config,
            manifest=manifest,
            report=report,
        )
    except BaseException:
        executor.stop()
        raise
    _log_start(manifest, report, time.monotonic() - start)
    return assembly


def choose(
    registry: Registry,
    config: EngineConfig,
    model_path: Path,
    checkpoint: ChosenComponent,
    model_config: ModelConfig,
) -> Manifest:
    """Select one component of each kind, before any weight is read."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    attention_need = AttentionNeed(
        device=device,
        dtype=dtype,
        features=frozenset({"prefill", "decode"}),
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
    )
    quantization_need = QuantizationNeed(
        device=device, dtype=dtype, format=str(model_config.quantization.get("quant_method", "none"))
    )
    needs: dict[str, tuple[Need, ComponentConfig]] = {
        "model": (ModelNeed(device=device, dtype=dtype, architecture=model_config.architecture), ComponentConfig()),
        "quantization": (quantization_need, config.quantization),
        "attention": (attention_need, config.attention),
        "scheduler": (Need(), config.scheduler),
        "executor": (Need(device=device), config.executor),
    }
    components = {kind: registry.select(kind, need, wish.name, wish.options) for kind, (need, wish) in needs.items()}
    return Manifest(
        model_path=str(model_path),
        device=device,
        dtype=dtype,
        max_model_len=_max_model_len(config, model_config),
        config=config,
        attention_need=attention_need,
        components={"checkpoint": checkpoint, **components},
    )


def _choose_checkpoint(registry: Registry, path: Path) -> ChosenComponent:
    filenames = tuple(sorted(entry.name for entry in path.iterdir())) if path.is_dir() else (path.name,)
    return registry.select("checkpoint", CheckpointNeed(path=str(path), filenames=filenames))


def _tokenizer_source(registry: Registry, config: EngineConfig, checkpoint: Checkpoint) -> Checkpoint:
    if config.tokenizer is None:
        return checkpoint
    path = resolve_model(config.tokenizer, config.revision)
    source: Checkpoint = load_target(_choose_checkpoint(registry, path).target)(str(path))
    return source


def _max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    longest = model_config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={config.max_model_len} was asked for, but the model's positions end at {longest}. "
            f"Set max_model_len to at most {longest}."
        )
    return config.max_model_len or longest


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
