"""Octavo: a plugin framework that serves large language models. Nothing heavy is imported until it is used."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from octavo._lazy import lazy_getattr

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM as AsyncLLM
    from octavo.beam_search.data import BeamSearchOutput as BeamSearchOutput
    from octavo.beam_search.data import BeamSearchParams as BeamSearchParams
    from octavo.beam_search.data import BeamSearchSequence as BeamSearchSequence
    from octavo.builtin.hf_checkpoint import HuggingFaceCheckpoint as HuggingFaceCheckpoint
    from octavo.config import EngineConfig as EngineConfig
    from octavo.explanation import explain as explain
    from octavo.llm import LLM as LLM
    from octavo.lora.adapter import AdapterInfo as AdapterInfo
    from octavo.lora.adapter import AdapterStatus as AdapterStatus
    from octavo.lora.request import LoRARequest as LoRARequest
    from octavo.outputs import CompletionOutput as CompletionOutput
    from octavo.outputs import Logprob as Logprob
    from octavo.outputs import RequestOutput as RequestOutput
    from octavo.plugins.hookspecs import hookimpl as hookimpl
    from octavo.plugins.specs import AdapterResolverSpec as AdapterResolverSpec
    from octavo.plugins.specs import AttentionSpec as AttentionSpec
    from octavo.plugins.specs import CheckpointSpec as CheckpointSpec
    from octavo.plugins.specs import CommandSpec as CommandSpec
    from octavo.plugins.specs import ExecutorSpec as ExecutorSpec
    from octavo.plugins.specs import KernelsSpec as KernelsSpec
    from octavo.plugins.specs import LinearKernelSpec as LinearKernelSpec
    from octavo.plugins.specs import LogitsRuleSpec as LogitsRuleSpec
    from octavo.plugins.specs import LoraSpec as LoraSpec
    from octavo.plugins.specs import ModelSpec as ModelSpec
    from octavo.plugins.specs import ProposerSpec as ProposerSpec
    from octavo.plugins.specs import QuantizationSpec as QuantizationSpec
    from octavo.plugins.specs import SchedulerSpec as SchedulerSpec
    from octavo.plugins.specs import Spec as Spec
    from octavo.sampling_params import SamplingParams as SamplingParams
    from octavo.selection import open_checkpoint as open_checkpoint

__version__ = "0.1.0"

# How long torch's OpenMP threads spin for each other before they sleep; read when torch is imported. The default, some
# milliseconds, stalls every operator while other programs run (docs/decisions/0004-threads-spin-briefly.md).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

_MODULES = {
    "async_llm": ("AsyncLLM",),
    "beam_search.data": ("BeamSearchOutput", "BeamSearchParams", "BeamSearchSequence"),
    "builtin.hf_checkpoint": ("HuggingFaceCheckpoint",),
    "config": ("EngineConfig",),
    "explanation": ("explain",),
    "llm": ("LLM",),
    "lora.adapter": ("AdapterInfo", "AdapterStatus"),
    "lora.request": ("LoRARequest",),
    "outputs": ("CompletionOutput", "Logprob", "RequestOutput"),
    "plugins.hookspecs": ("hookimpl",),
    "plugins.specs": (
        "AdapterResolverSpec",
        "AttentionSpec",
        "CheckpointSpec",
        "CommandSpec",
        "ExecutorSpec",
        "KernelsSpec",
        "LinearKernelSpec",
        "LogitsRuleSpec",
        "LoraSpec",
        "ModelSpec",
        "ProposerSpec",
        "QuantizationSpec",
        "SchedulerSpec",
        "Spec",
    ),
    "sampling_params": ("SamplingParams",),
    "selection": ("open_checkpoint",),
}

if not TYPE_CHECKING:  # type checkers read the imports above, and so find a misspelt name
    __getattr__, __all__ = lazy_getattr(__name__, _MODULES)
