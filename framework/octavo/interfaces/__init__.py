"""The sockets: one abstract class for each thing a plugin can be.

Names are imported when first used, so that code without tensors (scheduler, block pool) stays without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo._lazy import lazy_getattr

if TYPE_CHECKING:
    from octavo.interfaces.adapter_resolver import AdapterResolver as AdapterResolver
    from octavo.interfaces.attention import PAD_SLOT as PAD_SLOT
    from octavo.interfaces.attention import AttentionBackend as AttentionBackend
    from octavo.interfaces.attention import AttentionParameters as AttentionParameters
    from octavo.interfaces.attention import BatchLayout as BatchLayout
    from octavo.interfaces.attention import BatchLimits as BatchLimits
    from octavo.interfaces.attention import KVBuffer as KVBuffer
    from octavo.interfaces.attention import KVCache as KVCache
    from octavo.interfaces.attention import KVLayout as KVLayout
    from octavo.interfaces.attention import nhd_layout as nhd_layout
    from octavo.interfaces.attention import rotate as rotate
    from octavo.interfaces.checkpoint import SAFETENSORS_DTYPES as SAFETENSORS_DTYPES
    from octavo.interfaces.checkpoint import Checkpoint as Checkpoint
    from octavo.interfaces.checkpoint import TensorHeader as TensorHeader
    from octavo.interfaces.checkpoint import TokenizerData as TokenizerData
    from octavo.interfaces.executor import AdapterPlacement as AdapterPlacement
    from octavo.interfaces.executor import Executor as Executor
    from octavo.interfaces.executor import ExecutorReport as ExecutorReport
    from octavo.interfaces.executor import NewRow as NewRow
    from octavo.interfaces.executor import ScheduledRow as ScheduledRow
    from octavo.interfaces.executor import Step as Step
    from octavo.interfaces.executor import StepOutput as StepOutput
    from octavo.interfaces.kernels import Activation as Activation
    from octavo.interfaces.kernels import Kernels as Kernels
    from octavo.interfaces.kernels import SamplingInputs as SamplingInputs
    from octavo.interfaces.linear_kernel import AffineWeight as AffineWeight
    from octavo.interfaces.linear_kernel import LinearKernel as LinearKernel
    from octavo.interfaces.linear_kernel import LinearKernels as LinearKernels
    from octavo.interfaces.linear_kernel import LookupWeight as LookupWeight
    from octavo.interfaces.linear_kernel import PackedWeight as PackedWeight
    from octavo.interfaces.linear_kernel import WeightFacts as WeightFacts
    from octavo.interfaces.linear_kernel import sparse_rows as sparse_rows
    from octavo.interfaces.logits_rule import LogitsRule as LogitsRule
    from octavo.interfaces.logits_rule import RuleLimits as RuleLimits
    from octavo.interfaces.lora import NO_ADAPTER as NO_ADAPTER
    from octavo.interfaces.lora import AdapterWeights as AdapterWeights
    from octavo.interfaces.lora import BaseWeight as BaseWeight
    from octavo.interfaces.lora import LoraBackend as LoraBackend
    from octavo.interfaces.lora import LoraBase as LoraBase
    from octavo.interfaces.lora import LoraLimits as LoraLimits
    from octavo.interfaces.lora import LoraModule as LoraModule
    from octavo.interfaces.lora import LoraPart as LoraPart
    from octavo.interfaces.lora import LowRank as LowRank
    from octavo.interfaces.manifest import ChosenComponent as ChosenComponent
    from octavo.interfaces.manifest import Manifest as Manifest
    from octavo.interfaces.model import ForwardContext as ForwardContext
    from octavo.interfaces.model import LayerFactory as LayerFactory
    from octavo.interfaces.model import ModelArchitecture as ModelArchitecture
    from octavo.interfaces.proposer import Continuation as Continuation
    from octavo.interfaces.proposer import IncrementalModel as IncrementalModel
    from octavo.interfaces.proposer import Proposer as Proposer
    from octavo.interfaces.proposer import ProposerContext as ProposerContext
    from octavo.interfaces.quantization import LinearShape as LinearShape
    from octavo.interfaces.quantization import ParameterSpec as ParameterSpec
    from octavo.interfaces.quantization import QuantizationMethod as QuantizationMethod
    from octavo.interfaces.quantization import StoredLinear as StoredLinear
    from octavo.interfaces.scheduling import SchedulerPolicy as SchedulerPolicy

_MODULES = {
    "adapter_resolver": ("AdapterResolver",),
    "attention": (
        "PAD_SLOT",
        "AttentionBackend",
        "AttentionParameters",
        "BatchLayout",
        "BatchLimits",
        "KVBuffer",
        "KVCache",
        "KVLayout",
        "nhd_layout",
        "rotate",
    ),
    "checkpoint": ("SAFETENSORS_DTYPES", "Checkpoint", "TensorHeader", "TokenizerData"),
    "executor": ("AdapterPlacement", "Executor", "ExecutorReport", "NewRow", "ScheduledRow", "Step", "StepOutput"),
    "kernels": ("Activation", "Kernels", "SamplingInputs"),
    "linear_kernel": (
        "AffineWeight",
        "LinearKernel",
        "LinearKernels",
        "LookupWeight",
        "PackedWeight",
        "WeightFacts",
        "sparse_rows",
    ),
    "logits_rule": ("LogitsRule", "RuleLimits"),
    "lora": (
        "NO_ADAPTER",
        "AdapterWeights",
        "BaseWeight",
        "LoraBackend",
        "LoraBase",
        "LoraLimits",
        "LoraModule",
        "LoraPart",
        "LowRank",
    ),
    "manifest": ("ChosenComponent", "Manifest"),
    "model": ("ForwardContext", "LayerFactory", "ModelArchitecture"),
    "proposer": ("Continuation", "IncrementalModel", "Proposer", "ProposerContext"),
    "quantization": ("LinearShape", "ParameterSpec", "QuantizationMethod", "StoredLinear"),
    "scheduling": ("SchedulerPolicy",),
}

if not TYPE_CHECKING:  # type checkers read the imports above, and so find a misspelt name
    __getattr__, __all__ = lazy_getattr(__name__, _MODULES)
