"""Specs: what a plugin offers, as data; and needs: what the core asks for, as data.

A spec is a frozen dataclass with the name a user types and a *string* target that is imported only when the
component is chosen, so listing and explaining every installed component costs no heavy import. `why_not(need)`
answers from the cheap facts here; the probe, the only part that may import, runs last and only when they agree.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar

from octavo.errors import PluginError
from octavo.plugins.foreign_formats import FOREIGN_FORMATS

# ---------------------------------------------------------------------------------------------------- needs


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What the core asks of a component. `None` means: any will do."""

    device: str | None = None  # "cpu", "cuda"
    dtype: str | None = None  # "float32", "bfloat16", "float16": the dtype activations have
    features: frozenset[str] = frozenset()

    def advice(self, specs: Iterable[Spec]) -> str:
        """What to tell the user when none of `specs`, all those installed, can serve."""
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionNeed(Need):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    sliding_window: int | None = None  # tokens a query sees in some layers, itself included
    logit_softcap: float | None = None  # of the scores in some layers
    kv_cache_dtype: str = "auto"  # "auto": as `dtype`; "fp8": e4m3 with scales, and then the feature is asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationNeed(Need):
    format: str  # the checkpoint's quant_method, "none" for plain weights
    bits: int | None = None
    config: Mapping[str, object] = field(default_factory=dict, hash=False)  # the checkpoint's quantization_config

    def advice(self, specs: Iterable[Spec]) -> str:
        """What the format is, if it is known, the formats installed, and how to add this one."""
        known = {name for spec in specs if isinstance(spec, QuantizationSpec) for name in spec.formats} - {"none"}
        if self.format in known:
            return ""  # who reads it has said why not
        if self.format == "unknown":
            return (
                "The checkpoint is quantized, but its configuration names no quant_method and no installed plugin "
                'recognises its tensors. Write it into config.json: "quantization_config": {"quant_method": ...}. '
                f"Installed: {_list(tuple(sorted(known))) or 'none'}."
            )
        what = FOREIGN_FORMATS.get(self.format)
        return (
            (f"{self.format} {what}. " if what else "")
            + "Load the model unquantized, or in one of the formats installed: "
            + f"{_list(tuple(sorted(known))) or 'none'}. "
            + f"A plugin adds this one with QuantizationSpec(formats=({self.format!r},), target=...), where the target "
            "is an octavo.interfaces.QuantizationMethod."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearKernelNeed(Need):
    form: str  # of the weights to multiply with: "affine", "lookup"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNeed(Need):
    architecture: str  # config.json's architectures[0], "LlamaForCausalLM"

    def advice(self, specs: Iterable[Spec]) -> str:
        """The architectures with the nearest names, and how to add this one."""
        known = {name for spec in specs if isinstance(spec, ModelSpec) for name in spec.architectures} - {_ANY}
        near = get_close_matches(self.architecture, known, n=3, cutoff=0.0)
        return (
            (f"Nearest architectures installed: {', '.join(near)}. " if near else "")
            + f"A plugin adds this one with ModelSpec(architectures=({self.architecture!r},), target=...), "
            "where the target is an octavo.interfaces.ModelArchitecture."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorNeed(Need):
    num_devices: int = 1  # ranks of one model: tensor_parallel_size


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
        features: optional abilities a need may ask for, of `known_features`.
        priority: `auto` takes the highest that has no reason against it.
        probe: "package.module:function", called with the need, returns a list of reasons; runs last.
        options: "package.module:PydanticModel" of the component's own options; the target is then constructed with
            an instance of it, `options=`, beside its socket's own arguments.
    """

    kind: ClassVar[str] = ""
    noun: ClassVar[str] = "component"  # the kind in a sentence
    known_features: ClassVar[tuple[str, ...]] = ()  # what needs of this kind may ask for

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

    def __post_init__(self) -> None:
        """Refuse a field of the wrong shape here, where the traceback still leads to the plugin's own line."""
        if faults := [*self._name_faults(), *self._target_faults(), *self._type_faults(), *self._feature_faults()]:
            raise PluginError(f"{type(self).__name__}(name={self.name!r}): {'; '.join(faults)}")

    def why_not(self, need: Need) -> list[str]:
        """Every reason, in sentences, why this component cannot serve `need`; empty means it can."""
        reasons = [
            f"needs the Python package {module!r}, which is not installed"
            + (f"; install it with `{self.install}`" if self.install else "")
            for module in self.requires
            if not _is_installed(module)
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
            reasons = load_target(self.probe)(need)
        except Exception as error:  # a broken probe is a reason against its component, not a crash of the others
            return [f"its probe {self.probe} raised {type(error).__name__}: {error}"]
        if isinstance(reasons, (list, tuple)) and all(isinstance(reason, str) for reason in reasons):
            return list(reasons)
        return [f"its probe {self.probe} returned {reasons!r}, not a list of sentences"]

    def _name_faults(self) -> list[str]:
        if not isinstance(self.name, str) or not re.fullmatch(r"[^\s/]+", self.name):
            return ["name must be a word without spaces and without '/', which parts plugin and component"]
        return (
            [f"{self.name!r} is not a name: it tells the core what to choose"] if self.name in ("auto", "none") else []
        )

    def _target_faults(self) -> list[str]:
        return [
            f'{field} must be "package.module:Attribute", not {value!r}'
            for field in ("target", *_OTHER_TARGETS)
            if (value := getattr(self, field, None)) is not None or field == "target"
            if not isinstance(value, str) or not _TARGET.fullmatch(value)
        ]

    def _type_faults(self) -> list[str]:
        """Above all `devices="cuda"`, a string where a tuple of strings is meant."""
        return [
            f"{field.name} must be a {type(field.default).__name__}, not {value!r}"
            for field in fields(self)
            if field.default is not MISSING and field.default is not None
            if not isinstance(value := getattr(self, field.name), type(field.default))
        ]

    def _feature_faults(self) -> list[str]:
        """A misspelt feature would never be asked for."""
        known = self.known_features
        return [
            f"there is no feature {feature!r} of {self.noun}s; there are: {_list(known) or 'none'}"
            for feature in (sorted(self.features - set(known)) if isinstance(self.features, frozenset) else ())
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec(Spec):
    """An `octavo.interfaces.AttentionBackend`.

    One backend may serve prefill and another decode when both declare the same `kv_layout`.
    """

    kind: ClassVar[str] = "attention"
    noun: ClassVar[str] = "attention backend"
    known_features: ClassVar[tuple[str, ...]] = ("prefill", "decode", "sliding_window", "logit_softcap", "fp8_kv_cache")

    head_sizes: tuple[int, ...] = ()  # empty: any
    block_sizes: tuple[int, ...] = ()  # empty: any
    kv_layout: str = ""  # the published name of its KVLayout; empty: its own, shared with no other backend
    decode_priority: int | None = None  # among the backends for decode; None: `priority` there too

    def priority_for(self, phase: str) -> int:
        """Where `auto` ranks it for "prefill" or "decode"."""
        return self.decode_priority if phase == "decode" and self.decode_priority is not None else self.priority

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
    noun: ClassVar[str] = "quantization method"

    formats: tuple[str, ...] = ()  # values of the checkpoint's quant_method
    bits: tuple[int, ...] = ()
    weight_form: str = ""  # what its `weight` gives, for linear kernels; empty: it multiplies itself
    recognise: str | None = None  # "package.module:function", for checkpoints that do not name their quant_method

    def _facts_against(self, need: Need) -> list[str]:
        assert isinstance(need, QuantizationNeed)
        reasons = []
        if need.format not in self.formats:
            reasons.append(f"reads checkpoints of format {_list(self.formats)}; this one is {need.format!r}")
        if self.bits and need.bits is not None and need.bits not in self.bits:
            reasons.append(f"supports {_list(self.bits)} bits; the checkpoint has {need.bits}")
        return reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearKernelSpec(Spec):
    """An `octavo.interfaces.LinearKernel`: the product with packed weights of some forms."""

    kind: ClassVar[str] = "linear_kernel"
    noun: ClassVar[str] = "linear kernel"

    forms: tuple[str, ...] = ()  # of weights: "affine", "lookup"

    def _facts_against(self, need: Need) -> list[str]:
        assert isinstance(need, LinearKernelNeed)
        if need.form in self.forms:
            return []
        return [f"multiplies with {_list(self.forms)} weights; the quantization method's are {need.form}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelsSpec(Spec):
    """An `octavo.interfaces.Kernels`: norms, gated activations and sampling."""

    kind: ClassVar[str] = "kernels"
    noun: ClassVar[str] = "kernel set"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(Spec):
    """An `octavo.interfaces.ModelArchitecture`."""

    kind: ClassVar[str] = "model"
    noun: ClassVar[str] = "model architecture"

    architectures: tuple[str, ...] = ()  # values of config.json's architectures[0]; "*" leaves it to the probe

    def _facts_against(self, need: Need) -> list[str]:
        assert isinstance(need, ModelNeed)
        if need.architecture in self.architectures or _ANY in self.architectures:
            return []
        return [f"builds {_list(self.architectures)}; the checkpoint is {need.architecture}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec(Spec):
    """An `octavo.interfaces.Checkpoint`: a format of model files."""

    kind: ClassVar[str] = "checkpoint"
    noun: ClassVar[str] = "checkpoint format"

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
    noun: ClassVar[str] = "scheduler policy"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorSpec(Spec):
    """An `octavo.interfaces.Executor`."""

    kind: ClassVar[str] = "executor"
    noun: ClassVar[str] = "executor"

    max_devices: int = 0  # devices one model may be spread over; 0: any number

    def _facts_against(self, need: Need) -> list[str]:
        assert isinstance(need, ExecutorNeed)
        if not self.max_devices or need.num_devices <= self.max_devices:
            return []
        return [f"runs a model on {self.max_devices} device(s); tensor_parallel_size is {need.num_devices}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsRuleSpec(Spec):
    """An `octavo.interfaces.LogitsRule`. Of all that serve, those apply that a configuration names, and the always."""

    kind: ClassVar[str] = "logits_rule"
    noun: ClassVar[str] = "logits rule"

    always: bool = False  # applies without being named; it costs nothing where no request asks for it


@dataclass(frozen=True, kw_only=True, slots=True)
class ProposerSpec(Spec):
    """An `octavo.interfaces.Proposer`, for speculative decoding."""

    kind: ClassVar[str] = "proposer"
    noun: ClassVar[str] = "proposer"

    draft_model: bool = False  # its option `model` is a model that the core loads for it beside the served one


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec(Spec):
    """An `octavo.interfaces.LoraBackend`."""

    kind: ClassVar[str] = "lora"
    noun: ClassVar[str] = "LoRA backend"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterResolverSpec(Spec):
    """An `octavo.interfaces.AdapterResolver`: finds the adapter of a name that the engine does not know yet."""

    kind: ClassVar[str] = "adapter_resolver"
    noun: ClassVar[str] = "adapter resolver"

    serves_root: bool = False  # the setting `lora_root` is its option `root`


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandSpec(Spec):
    """A sub-command of `octavo`; the target is a module with `add_arguments(parser)` and `run(args) -> int`."""

    kind: ClassVar[str] = "command"
    noun: ClassVar[str] = "command"


SPEC_KINDS: dict[str, type[Spec]] = {
    spec.kind: spec
    for spec in (
        AttentionSpec,
        QuantizationSpec,
        LinearKernelSpec,
        KernelsSpec,
        ModelSpec,
        CheckpointSpec,
        SchedulerSpec,
        ExecutorSpec,
        LogitsRuleSpec,
        ProposerSpec,
        LoraSpec,
        AdapterResolverSpec,
        CommandSpec,
    )
}


def load_target(target: str) -> Callable[..., Any]:
    """Import "package.module:Attribute", or the module itself when there is no colon.

    Raises:
        PluginError: the module does not import, or lacks the attribute; the cause is chained.
    """
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
        return getattr(module, attribute) if attribute else module  # type: ignore[return-value]
    except Exception as error:
        raise PluginError(f"{target!r} cannot be imported: {type(error).__name__}: {error}") from error


_ANY = "*"  # in ModelSpec.architectures: every one that the probe has no reason against
_OTHER_TARGETS = ("probe", "options", "recognise")
_TARGET = re.compile(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?")


def _is_installed(module: str) -> bool:
    """Whether the top-level package can be found; nothing is imported (a dotted name would import its parent)."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # in sys.modules without a spec: it was put there by hand, so it is there
        return True


def _list(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values)
