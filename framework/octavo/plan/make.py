"""make_plan: from a configuration to its plan, by the selection that an engine is built from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.plan.advice import advise
from octavo.plan.counts import Plan
from octavo.plan.sizes import Sizer
from octavo.plugins.specs import ExecutorNeed
from octavo.runner.kv_cache import DeviceMemory, device_memory
from octavo.selection import Selection, select


def make_plan(
    config: EngineConfig,
    *,
    memory_bytes: int | None = None,
    tokens_per_request: int | None = None,
) -> Plan:
    """Count what an engine of this configuration would hold. No weight is read or allocated.

    Args:
        memory_bytes: of each device; this machine need not have such a device then. Without it, this machine's.
        tokens_per_request: a typical length, to count concurrent requests for.

    Raises:
        ModelNotFoundError: there is no such model.
        CheckpointError: it cannot be read, or its headers show that its weights are not those of its configuration.
        ConfigError: a setting is wrong; nothing installed can count this model; so many devices cannot share it.
    """
    for name, value, least in (
        ("memory_bytes", memory_bytes, 1),
        ("tokens_per_request", tokens_per_request, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value} is too little; give at least {least}.")

    def count(config: EngineConfig) -> tuple[Plan, Sizer, Selection]:
        # A device whose memory is told need not be here.
        elsewhere = config.device if memory_bytes is not None and config.device != "auto" else None
        selection = select(config, device=elsewhere, weights=False)
        sizer = Sizer(selection)
        sizes = sizer.sizes(config.tensor_parallel_size)
        headers = selection.files.checkpoint.tensor_headers()
        if headers:
            sizer.check(headers)
        counted = Plan(
            model=config.model,
            architecture=selection.files.model_config.architecture,
            config=config,
            device=selection.device,
            dtype=selection.dtype,
            max_model_len=selection.max_model_len,
            memory=_memory(memory_bytes, selection.device),
            memory_is_given=memory_bytes is not None,
            sizes=sizes,
            max_loras=config.max_loras if config.enable_lora else 0,
            tokens_per_request=tokens_per_request,
            checkpoint_bytes=sum(header.num_bytes for header in headers.values()) if headers else None,
            notes=(*sizes.remarks, *_obstacles(selection), *_not_counted(selection)),
        )
        return counted, sizer, selection

    plan, sizer, selection = count(config)
    advice = advise(
        plan,
        lambda num_ranks: sizer.sizes_of(num_ranks) if sizer.can_share(num_ranks) else None,
        lambda num_ranks: _can_run(selection, num_ranks),
        lambda: count(config.model_copy(update={"dtype": "bfloat16"}))[0],
    )
    return replace(plan, advice=tuple(advice))


def _memory(given: int | None, device: str) -> DeviceMemory:
    return device_memory(device) if given is None else DeviceMemory(free_bytes=given, total_bytes=given)


def _can_run(selection: Selection, num_ranks: int) -> bool:
    need = ExecutorNeed(device=selection.device, num_devices=num_ranks)
    return any(not executor.reasons for executor in selection.registry.ask("executor", need))


def _not_counted(selection: Selection) -> Iterator[str]:
    if selection.draft_model is not None:
        yield "The draft model is not counted: its weights and its KV cache, of as many blocks, come on top of this."


def _obstacles(selection: Selection) -> list[str]:
    """Why this installation could not run what is planned, one sentence a socket; counting does without these."""
    return [
        f"This installation cannot run it: {' '.join(str(choice.error).split())}"
        for socket in ("scheduler", "executor")
        if (choice := selection.choices[socket]).error is not None
    ]
