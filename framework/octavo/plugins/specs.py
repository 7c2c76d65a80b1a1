"""Specs: what a plugin offers, as data; and needs: what the core asks for, as data.

A spec is a frozen dataclass with the name a user types and a *string* target that is imported only when the
component is chosen, so listing and explaining every installed component costs no heavy import. `why_not(need)`
answers from the cheap facts here; the probe, the only part that may import, runs last and only when they agree.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

# ---------------------------------------------------------------------------------------------------- needs


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What the core asks of a component. `None` means: any will do."""

    device: str | None = None  # "cpu", "cuda"
    dtype: str | None = None  # "float32", "bfloat16", "float16": the dtype activations have
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionNeed(Need):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationNeed(Need):
    format: str  # the checkpoint's quant_method, "none" for plain weights
    bits: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNeed(Need):
    architecture: str  # config.json's architectures[0], "LlamaForCausalLM"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointNeed(Need):
    path: str
    filenames: tuple[str, ...]  # of a folder: the names in it; of a file: its own name


# ---------------------------------------------------------------------------------------------------- specs


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One component of one plugin.

    Attributes:
        name: what a user types to choose it.
        target: "package.module:Attribute", imported only when chosen.
        summary: one line for listings.
        requires: top-level modules that must be importable (found, not imported).
        install: what to type when one of `requires` is missing.
        devices, dtypes: what it runs on; empty means any.
        features: optional abilities a need may ask for.
        priority: `auto` takes the highest that has no reason against it.
        probe: "package.module:function", called with the need, returns a list of reasons; runs last.
        options: "package.module:PydanticModel" of the component's own options.
    """

    kind: ClassVar[str] = ""

    name: str
    target: str
    summary: str = ""
    requires: tuple[str, ...] = ()
    install: str = ""
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    priority: int = 0
    probe: str | None = None
    options: str | None = None

    def why_not(self, need: Need) -> list[str]:
        """Every reason, in sentences, why this component cannot serve `need`; empty means it can."""
        reasons = [
            f"needs the Python package {module!r}, which is not installed"
            + (f"; install it with `{self.install}`" if self.install else "")
            for module in self.requires
            if importlib.util.find_spec(module) is None
        ]
        if self.devices and need.device is not None and need.device not in self.devices:
            reasons.append(f"runs on {', '.join(self.devices)}; this engine runs on {need.device}")
        if self.dtypes and need.dtype is not None and need.dtype not in self.dtypes:
            reasons.append(f"supports {', '.join(self.dtypes)}; the model computes in {need.dtype}")
        if missing := sorted(need.features - self.features):
            reasons.append(f"does not support {', '.join(missing)}")
        reasons += self._facts_against(need)
        if not reasons and self.probe is not None:
            reasons += self._ask_probe(need)
        return reasons

    def _facts_against(self, need: Need) -> list[str]:
        """Reasons from the kind's own fields."""
        return []

    def _ask_probe(self, need: Need) -> list[str]:
        assert self.probe is not None
        try:
            return list(load_target(self.probe)(need))
        except Exception as error:  # a broken probe is a reason against its component, not a crash of the others
            return [f"its probe {self.probe} raised {type(error).__name__}: {error}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec(Spec):
    """An `octavo.interfaces.AttentionBackend`. Features: "prefill", "decode"."""

    kind: ClassVar[str] = "attention"

    head_sizes: tuple[int, ...] = ()  # empty: any
    block_sizes: tuple[int, ...] = ()  # empty: any

    def _facts_against(self, need: Need) -> list[str]:
        assert isinstance(need, AttentionNeed)
        reasons = []
        if self.head_sizes and need.head_dim not in self.head_sizes:
            reasons.append(f"supports head sizes {_list(self.head_sizes)}; the model has {need.head_dim}")
        if self.block_sizes and need.block_size not in self.block_sizes:
            reasons.append(f"supports block sizes {_list(self.block_sizes)}; block_size is {need.block_size}")
        return reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationSpec(Spec):
    """An `octavo.interfaces.QuantizationMethod`."""

    kind: ClassVar[str] = "quantization"

    formats: tuple[str, ...] = ()  # values of the checkpoint's quant_method
    bits: tuple[int, ...] = ()

    def _facts_against(self, need: Need) -> list[str]:
        assert isinstance(need, QuantizationNeed)
        reasons = []
        if need.format not in self.formats:
            reasons.append(f"reads checkpoints of format {_list(self.formats)}; this one is {need.format!r}")
        if self.bits and need.bits is not None and need.bits not in self.bits:
            reasons.append(f"supports {_list(self.bits)} bits; the checkpoint has {need.bits}")
        return reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(Spec):
    """An `octavo.interfaces.ModelArchitecture`."""

    kind: ClassVar[str] = "model"

    architectures: tuple[str, ...] = ()

    def _facts_against(self, need: Need) -> list[str]:
        assert isinstance(need, ModelNeed)
        if need.architecture in self.architectures:
            return []
        return [f"builds {_list(self.architectures)}; the checkpoint is {need.architecture}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec(Spec):
    """An `octavo.interfaces.Checkpoint`: a format of model files."""

    kind: ClassVar[str] = "checkpoint"

    suffixes: tuple[str, ...] = ()  # of a single file: (".gguf",)
    folder_files: tuple[str, ...] = ()  # a folder is recognised when it holds all of these

    def _facts_against(self, need: Need) -> list[str]:
        assert isinstance(need, CheckpointNeed)
        if self.suffixes and need.path.endswith(self.suffixes):
            return []
        if self.folder_files and set(self.folder_files) <= set(need.filenames):
            return []
        wanted = [f"*{suffix} files" for suffix in self.suffixes]
        if self.folder_files:
            wanted.append(f"folders with {_list(self.folder_files)}")
        return [f"reads {' and '.join(wanted)}; this is {need.path}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec(Spec):
    """An `octavo.interfaces.SchedulerPolicy`."""

    kind: ClassVar[str] = "scheduler"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorSpec(Spec):
    """An `octavo.interfaces.Executor`."""

    kind: ClassVar[str] = "executor"


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandSpec(Spec):
    """A sub-command of `octavo`; the target is a module with `add_arguments(parser)` and `run(args) -> int`."""

    kind: ClassVar[str] = "command"


SPEC_KINDS: dict[str, type[Spec]] = {
    spec.kind: spec
    for spec in (
        AttentionSpec,
        QuantizationSpec,
        ModelSpec,
        CheckpointSpec,
        SchedulerSpec,
        ExecutorSpec,
        CommandSpec,
    )
}


def load_target(target: str) -> Callable[..., Any]:
    """Import "package.module:Attribute", or the module itself when there is no colon."""
    module_name, _, attribute = target.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module  # type: ignore[return-value]


def _list(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
