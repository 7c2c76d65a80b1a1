"""First-party packages outside the core and what they bring, so that an error can name the one to install.

Data only: the core imports none of them, and works the same when none is installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from octavo.plugins.specs import CheckpointNeed, ModelNeed, Need, QuantizationNeed


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownPackage:
    """What one package brings of one kind.

    Attributes:
        names: of its components.
        serves: what they are chosen by when no name is given: a model's architectures, a checkpoint's file suffixes,
            a quantization's formats; empty for other kinds.
    """

    distribution: str
    kind: str
    names: frozenset[str]
    serves: frozenset[str] = frozenset()

    def brings(self, name: str) -> bool:
        """Whether a user's "name" or "plugin/name" means one of its components."""
        plugin, _, component = name.rpartition("/")
        return component in self.names and plugin in ("", self.distribution.removeprefix("octavo-"))

    def can_serve(self, need: Need) -> bool:
        match need:
            case ModelNeed():
                return need.architecture in self.serves
            case QuantizationNeed():
                return need.format in self.serves
            case CheckpointNeed():
                return need.path.endswith(tuple(self.serves))
        return False


KNOWN_PACKAGES = (
    KnownPackage(
        distribution="octavo-attention-flash",
        kind="attention",
        names=frozenset({"flash-attn", "flashinfer"}),
    ),
    KnownPackage(
        distribution="octavo-attention-triton",
        kind="attention",
        names=frozenset({"triton-flash", "triton-paged"}),
    ),
    KnownPackage(
        distribution="octavo-checkpoint-gguf",
        kind="checkpoint",
        names=frozenset({"gguf"}),
        serves=frozenset({".gguf"}),
    ),
    KnownPackage(
        distribution="octavo-kernels-triton",
        kind="kernels",
        names=frozenset({"triton"}),
    ),
    KnownPackage(
        distribution="octavo-linear-cpu",
        kind="linear_kernel",
        names=frozenset({"cpu-int4", "cpu-int8"}),
    ),
    KnownPackage(
        distribution="octavo-linear-triton",
        kind="linear_kernel",
        names=frozenset({"triton-affine", "triton-lookup"}),
    ),
    KnownPackage(
        distribution="octavo-lora",
        kind="lora",
        names=frozenset({"torch", "triton"}),
    ),
    KnownPackage(
        distribution="octavo-lora",
        kind="adapter_resolver",
        names=frozenset({"filesystem", "hf"}),
    ),
    KnownPackage(
        distribution="octavo-model-gemma",
        kind="model",
        names=frozenset({"gemma2", "gemma3"}),
        serves=frozenset({"Gemma2ForCausalLM", "Gemma3ForCausalLM"}),
    ),
    KnownPackage(
        distribution="octavo-model-phi",
        kind="model",
        names=frozenset({"phi3"}),
        serves=frozenset({"Phi3ForCausalLM"}),
    ),
    KnownPackage(
        distribution="octavo-model-qwen",
        kind="model",
        names=frozenset({"qwen2", "qwen3"}),
        serves=frozenset({"Qwen2ForCausalLM", "Qwen3ForCausalLM"}),
    ),
    KnownPackage(
        distribution="octavo-model-transformers",
        kind="model",
        names=frozenset({"transformers"}),
        serves=frozenset({"*"}),
    ),
    KnownPackage(
        distribution="octavo-proposer-draft-model",
        kind="proposer",
        names=frozenset({"draft_model"}),
    ),
    KnownPackage(
        distribution="octavo-proposer-ngram",
        kind="proposer",
        names=frozenset({"ngram"}),
    ),
    KnownPackage(
        distribution="octavo-quant-awq",
        kind="quantization",
        names=frozenset({"awq"}),
        serves=frozenset({"awq"}),
    ),
    KnownPackage(
        distribution="octavo-quant-gptq",
        kind="quantization",
        names=frozenset({"gptq"}),
        serves=frozenset({"gptq", "auto-round"}),
    ),
    KnownPackage(
        distribution="octavo-quant-squeezellm",
        kind="checkpoint",
        names=frozenset({"squeezellm-pt"}),
    ),
    KnownPackage(
        distribution="octavo-quant-squeezellm",
        kind="quantization",
        names=frozenset({"squeezellm"}),
        serves=frozenset({"squeezellm"}),
    ),
    KnownPackage(
        distribution="octavo-quantize",
        kind="command",
        names=frozenset({"quantize"}),
    ),
    KnownPackage(
        distribution="octavo-scheduler-fair",
        kind="scheduler",
        names=frozenset({"priority", "fair"}),
    ),
)


def packages_to_install(kind: str, wanted: str | Need, installed: Iterable[str]) -> str:
    """A sentence for each package that would bring a component of this name, or one for this need; often empty.

    Args:
        installed: distributions that are here already, whatever became of their plugins.
    """
    here = set(installed)
    return " ".join(
        _advice(package.distribution)
        for package in KNOWN_PACKAGES
        if package.kind == kind and package.distribution not in here
        if (package.brings(wanted) if isinstance(wanted, str) else package.can_serve(wanted))
    )


def package_of_plugin(name: str) -> str:
    """A sentence when a known package brings the plugin of this name; else empty."""
    return next((_advice(one.distribution) for one in KNOWN_PACKAGES if one.distribution == f"octavo-{name}"), "")


def _advice(distribution: str) -> str:
    return f"{distribution} brings it: `pip install {distribution}`."
