"""From a configuration to one component of each kind, chosen before any weight is read. Imports no implementation.

config -> plugins -> [selection] -> manifest. What `assemble` builds, what `explain` shows and what `plan` counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from octavo.config import ComponentConfig, EngineConfig
from octavo.errors import ConfigError
from octavo.interfaces.checkpoint import Checkpoint
from octavo.interfaces.manifest import Manifest
from octavo.model_config import ModelConfig
from octavo.model_source import resolve_model
from octavo.plugins.attention_pair import choose_attention
from octavo.plugins.quantized_checkpoint import quantization_config, quantization_need
from octavo.plugins.registry import Choice, Choices, Registry, default_registry
from octavo.plugins.specs import (
    AdapterResolverSpec,
    AttentionNeed,
    CheckpointNeed,
    ExecutorNeed,
    LinearKernelNeed,
    LogitsRuleSpec,
    ModelNeed,
    Need,
    ProposerSpec,
    QuantizationNeed,
    QuantizationSpec,
)
from octavo.runner.device import resolve_device, resolve_dtype

_CACHE_FEATURES: Mapping[str, frozenset[str]] = {"auto": frozenset(), "fp8": frozenset({"fp8_kv_cache"})}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """The model's files, found and opened; headers only were read."""

    path: Path
    choice: Choice
    checkpoint: Checkpoint
    model_config: ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What was chosen for every socket, and what was refused and why.

    Attributes:
        config: what the user asked for; `device`, `dtype` and `max_model_len` are what its "auto" came to.
        choices: by socket, as in Manifest.components.
        quantization_config: of the checkpoint, its quant_method found; {} for plain weights.
        linear_kernels: those that are asked for each quantized linear; none where the method multiplies itself.
        adapter_resolvers: those that are asked for an unknown adapter, in their order; none unless configured.
        draft_model: of the proposer's own model, where it has one.
    """

    registry: Registry
    config: EngineConfig
    files: ModelFiles
    device: str
    dtype: str
    max_model_len: int
    attention_need: AttentionNeed
    choices: Mapping[str, Choice]
    logits_rules: Choices
    quantization_config: Mapping[str, object]
    linear_kernels: Choices
    adapter_resolvers: Choices
    draft_model: Selection | None

    @property
    def max_steps_in_flight(self) -> int:
        """What the user said, or as many as keep the device busy: a CPU computes a step while it is submitted.

        Guesses of a proposer are only verified when no other step is in flight.
        """
        if self.config.max_steps_in_flight is not None:
            return self.config.max_steps_in_flight
        return 2 if self.device == "cuda" and "proposer" not in self.choices else 1

    def manifest(self) -> Manifest:
        """What to build.

        Raises:
            ConfigError: of the first socket that nothing can serve as asked.
        """
        return Manifest(
            model_path=str(self.files.path),
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            config=self.config,
            attention_need=self.attention_need,
            components={socket: choice.get() for socket, choice in self.choices.items()},
            logits_rules=self.logits_rules.get(),
            quantization_config=self.quantization_config,
            linear_kernels=self.linear_kernels.get(),
            adapter_resolvers=self.adapter_resolvers.get(),
            draft_model=None if self.draft_model is None else self.draft_model.manifest(),
        )


def select(config: EngineConfig, device: str | None = None, weights: bool = True) -> Selection:
    """Find the model and ask every candidate of every socket.

    Args:
        device: what to choose for, when it is not a device of this machine.
        weights: False does not fetch them, as in `resolve_model`: an engine cannot be built then.

    Raises:
        ModelNotFoundError, CheckpointError: the model is not there or not readable.
        ConfigError: a setting is wrong. That a component cannot serve is kept in its Choice.
    """
    registry = default_registry(config.plugins)
    files = open_model(registry, config.model, config.revision, weights)
    model_config = files.model_config
    device = device or resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    max_model_len = _max_model_len(config, model_config)
    need = AttentionNeed(
        device=device,
        dtype=dtype,
        features=model_config.attention_features(max_model_len) | _CACHE_FEATURES[config.kv_cache_dtype],
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        sliding_window=model_config.sliding_window,
        logit_softcap=model_config.attn_logit_softcapping,
        kv_cache_dtype=config.kv_cache_dtype,
    )
    prefill, decode = choose_attention(registry, need, config.attention.wishes)
    quantized = quantization_config(registry, model_config.quantization, files.checkpoint.tensor_headers())
    needs: dict[str, tuple[Need, ComponentConfig]] = {
        "model": (ModelNeed(device=device, dtype=dtype, architecture=model_config.architecture), ComponentConfig()),
        "quantization": (quantization_need(quantized, device, dtype), config.quantization),
        "kernels": (Need(device=device, dtype=dtype), config.kernels),
        "scheduler": (Need(), config.scheduler),
        "executor": (ExecutorNeed(device=device, num_devices=config.tensor_parallel_size), config.executor),
    }
    if config.proposer.name != "none":
        needs["proposer"] = (Need(device=device, dtype=dtype), config.proposer)
    choices = {kind: registry.choose(kind, each, wish.name, wish.options) for kind, (each, wish) in needs.items()}
    plain = registry.choose("quantization", QuantizationNeed(device=device, dtype=dtype, format="none"))
    if plain.component != choices["quantization"].component:
        choices["quantization.plain"] = plain
    if config.enable_lora:
        wish = config.lora
        choices["lora"] = registry.choose("lora", Need(device=device, dtype=dtype), wish.name, wish.options)
    choices["model"] = _without_its_own_code(choices["model"], files.checkpoint)
    return Selection(
        registry=registry,
        config=config,
        files=files,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        attention_need=need,
        choices={"checkpoint": files.choice, **choices, "attention.prefill": prefill, "attention.decode": decode},
        logits_rules=registry.choose_several(
            "logits_rule",
            Need(device=device),
            lambda spec: isinstance(spec, LogitsRuleSpec) and spec.always,
            [(wish.name, wish.options) for wish in config.logits_rules],
        ),
        quantization_config=quantized,
        linear_kernels=_choose_linear_kernels(
            registry, choices["quantization"], config.linear_kernel, needs["quantization"][0]
        ),
        adapter_resolvers=registry.choose_several(
            "adapter_resolver",
            Need(),
            lambda _: False,
            [*_resolver_of_root(registry, config.lora_root)]
            + [(wish.name, wish.options) for wish in config.adapter_resolvers],
        ),
        draft_model=_select_draft_model(registry, config, choices.get("proposer"), device, max_model_len, weights),
    )


def open_model(registry: Registry, model: str, revision: str | None = None, weights: bool = True) -> ModelFiles:
    """Find a model's files and open them with the checkpoint format that reads them.

    Raises:
        ModelNotFoundError, CheckpointError: the model is not there or not readable.
        UnavailableComponentError: no installed checkpoint format reads it.
    """
    path = resolve_model(model, revision, weights)
    choice = choose_checkpoint(registry, path)
    checkpoint: Checkpoint = choice.get().build(str(path))
    model_config = ModelConfig.from_dict(checkpoint.config(), checkpoint.generation_config())
    return ModelFiles(path=path, choice=choice, checkpoint=checkpoint, model_config=model_config)


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """A model's files, of whatever format an installed plugin reads, for who makes something else of them.

    Args:
        model: as EngineConfig.model.

    Raises: as `open_model`.
    """
    return open_model(default_registry(), model, revision).checkpoint


def choose_checkpoint(registry: Registry, path: Path) -> Choice:
    """Which checkpoint format reads this folder or file."""
    filenames = tuple(sorted(entry.name for entry in path.iterdir())) if path.is_dir() else (path.name,)
    return registry.choose("checkpoint", CheckpointNeed(path=str(path), filenames=filenames))


def _without_its_own_code(choice: Choice, checkpoint: Checkpoint) -> Choice:
    """The choice of a model; where there is none, say that the checkpoint's own code is not a way out."""
    if choice.error is None or "auto_map" not in checkpoint.config():
        return choice
    error = type(choice.error)(
        f"{choice.error}\nThe checkpoint names Python code of its own for it (auto_map in config.json). Such code is "
        "never run: a plugin that you install is the way to bring code."
    )
    error.__cause__ = choice.error.__cause__
    return replace(choice, error=error)


def _choose_linear_kernels(registry: Registry, method: Choice, wish: ComponentConfig, need: Need) -> Choices:
    """Every kernel that can multiply with the method's weights, or only the one that was named."""
    specs = [one.spec for one in method.candidates if one.chosen]
    form = next((spec.weight_form for spec in specs if isinstance(spec, QuantizationSpec)), "")
    if not form:
        return Choices(kind="linear_kernel", candidates=())
    named = [] if wish.name == "auto" else [(wish.name, wish.options)]
    return registry.choose_several(
        "linear_kernel",
        LinearKernelNeed(device=need.device, dtype=need.dtype, form=form),
        lambda _: not named,
        named,
    )


def _resolver_of_root(registry: Registry, root: str | None) -> Iterator[tuple[str, dict[str, object]]]:
    """Who finds adapters in the folders below a root, and its options; nobody where no root is given."""
    if root is None:
        return
    for candidate in registry.candidates("adapter_resolver"):
        if isinstance(candidate.spec, AdapterResolverSpec) and candidate.spec.serves_root:
            yield candidate.full_name, {"root": root}
            return
    raise ConfigError(f"No installed plugin finds adapters in lora_root={root!r}: install octavo-lora.")


def _max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    longest = model_config.longest_context
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={config.max_model_len} was asked for, but the model's positions end at {longest}. "
            f"Set max_model_len to at most {longest}."
        )
    return config.max_model_len or model_config.max_position_embeddings


def _select_draft_model(
    registry: Registry, config: EngineConfig, proposer: Choice | None, device: str, max_model_len: int, weights: bool
) -> Selection | None:
    """With the engine's settings, but for those about one model alone; the proposer's options go before both."""
    specs = [one.spec for one in proposer.candidates if one.chosen] if proposer is not None else []
    if proposer is None or not any(isinstance(spec, ProposerSpec) and spec.draft_model for spec in specs):
        return None
    about_one = (
        *("tokenizer", "revision", "quantization", "linear_kernel"),
        *("kv_cache_memory_bytes", "logits_rules", "proposer"),
        *("enable_lora", "lora_modules", "lora_root", "adapter_resolvers"),
    )
    settings = {name: value for name, value in config.model_dump().items() if name not in about_one}
    options = proposer.get().options
    settings |= {name: options[name] for name in EngineConfig.model_fields if options.get(name) is not None}
    files = open_model(registry, str(settings["model"]), settings.get("revision"), weights)
    settings["max_model_len"] = min(max_model_len, files.model_config.longest_context)
    return select(EngineConfig.create(**settings), device, weights)
