"""EngineConfig: everything a user can set, one frozen model, each field with its unit. No torch here."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from octavo.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ComponentConfig(BaseModel):
    """A component by name, with its own options: "torch" or {"name": "triton", "num_kv_splits": 8}."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class AttentionConfig(ComponentConfig):
    """One backend for all, or one for prefill and another for decode: {"prefill": "flash", "decode": "paged"}.

    A side that is not named falls to `name`, with the options beside it.
    """

    prefill: ComponentConfig | None = None
    decode: ComponentConfig | None = None

    @property
    def wishes(self) -> tuple[ComponentConfig, ComponentConfig]:
        """For (prefill, decode)."""
        both = ComponentConfig(name=self.name, **self.options)
        return self.prefill or both, self.decode or both

    @field_validator("prefill", "decode", mode="before")
    @classmethod
    def _name_is_short_for_component(cls, value: object) -> object:
        return _component(value)


class PluginsConfig(BaseModel):
    """Which plugins may load. A list is also read from a text with commas, as in OCTAVO_PLUGINS."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    allow: tuple[str, ...] | None = None
    """the plugins that may load, by name; without it all, and [] is the built-ins alone"""
    deny: tuple[str, ...] = ()
    """patterns of the plugins that may not load; they are not even imported"""
    strict: bool = False
    """refuse to start when a plugin did not load"""

    @field_validator("allow", "deny", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


class EngineConfig(BaseModel):
    """How to build an engine. Fields that vLLM users know keep vLLM's name; each field's own line is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = "demo"
    """a Hugging Face id, a folder, a GGUF file, or "demo" for the demo model"""
    tokenizer: str | None = None
    """where the tokenizer comes from when it is not the model"""
    revision: str | None = None
    """branch, tag or commit of a Hugging Face id"""
    device: Device = "auto"
    """cpu, cuda, or auto: CUDA when there is one"""
    dtype: Dtype = "auto"
    """of activations and plain weights: float32, bfloat16, float16, or auto: the checkpoint's if fast on the device"""
    max_model_len: int | None = Field(default=None, ge=1)
    """tokens of one request, prompt and output; without it the model's own limit"""
    block_size: int = Field(default=16, ge=1)
    """tokens in a KV block"""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """bytes for the KV cache; without it, sized from the memory that is free"""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """of the KV cache: auto, the same as dtype; fp8, one byte an element and a scale for each token's head"""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """share of a GPU's memory that the engine may take, for all it does; on a CPU it has no effect"""
    max_num_seqs: int = Field(default=256, ge=1)
    """requests in one step, at most"""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """tokens in one step, at most; longer prompts are computed in chunks"""
    enable_prefix_caching: bool = True
    """share the KV blocks of equal prefixes"""
    max_steps_in_flight: int | None = Field(default=None, ge=1)
    """steps submitted before the first is collected; without it 2 on a GPU, 1 on a CPU or with a proposer"""
    enforce_eager: bool = False
    """launch every kernel of every step anew: no CUDA graphs"""
    seed: int = 0
    """makes requests that bring no seed repeatable"""
    generation_config: Literal["auto", "none"] = "auto"
    """sampling parameters when a caller gives none: auto, as the model's generation_config.json recommends, or none"""
    max_logprobs: int = Field(default=20, ge=-1)
    """most logprobs and prompt_logprobs a request may ask for; -1 is the whole vocabulary"""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """devices that share each layer"""
    attention: AttentionConfig = AttentionConfig()
    """attention backend by name; auto takes the best that can serve"""
    quantization: ComponentConfig = ComponentConfig()
    """quantization method by name; auto takes the one that reads the checkpoint"""
    linear_kernel: ComponentConfig = ComponentConfig()
    """what multiplies with quantized weights, by name; auto asks the best first, for each linear"""
    kernels: ComponentConfig = ComponentConfig()
    """norms, activations and sampling by name; auto takes the best that can serve"""
    scheduler: ComponentConfig = ComponentConfig()
    """scheduler policy by name"""
    executor: ComponentConfig = ComponentConfig()
    """executor by name"""
    proposer: ComponentConfig = ComponentConfig(name="none")
    """guesses tokens ahead for the model to verify (speculative decoding), by name; none does not"""
    num_speculative_tokens: int = Field(default=4, ge=1)
    """tokens a proposer may guess at once"""
    logits_rules: tuple[ComponentConfig, ...] = ()
    """logits rules by name, beside those that always apply"""
    enable_lora: bool = False
    """serve LoRA adapters, an adapter for each request"""
    max_loras: int = Field(default=8, ge=1)
    """device positions for adapters: so many different ones in one step, at most"""
    max_lora_rank: int = Field(default=16, ge=1)
    """largest rank of an adapter; memory for max_loras of this rank is taken at start"""
    max_cpu_loras: int | None = Field(default=None, ge=1)
    """adapters kept in the host's memory, at least max_loras; without it four times max_loras"""
    lora_modules_to_save: bool = False
    """serve adapters that bring a whole embedding or head of their own; takes memory for max_loras of them"""
    lora_modules: Mapping[str, str] = Field(default_factory=dict)
    """adapters to load at start: paths or Hugging Face ids by name"""
    lora_root: str | None = None
    """folder whose sub-folders are adapters by name, loaded when a request first names them"""
    lora: ComponentConfig = ComponentConfig()
    """LoRA backend by name; auto takes the best that can serve"""
    adapter_resolvers: tuple[ComponentConfig, ...] = ()
    """who is asked, in this order, where an adapter lies that a request names first"""
    plugins: PluginsConfig = PluginsConfig()
    """which plugins may load"""

    @property
    def num_cpu_loras(self) -> int:
        """Adapters kept in the host's memory."""
        return 4 * self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras

    @classmethod
    def create(cls, *, _sources: Mapping[str, str] | None = None, **settings: Any) -> EngineConfig:
        """Build from keyword arguments; `_sources` says of a setting where it is from, for the error's text.

        Raises:
            ConfigError: unknown settings (the nearest name is given) and wrong values, all together.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            raise ConfigError("; ".join(_fault(fault, _sources or {}) for fault in error.errors())) from error

    @field_validator("proposer")
    @classmethod
    def _none_has_no_options(cls, proposer: ComponentConfig) -> ComponentConfig:
        if proposer.name == "none" and proposer.options:
            raise ValueError(f"{', '.join(proposer.options)} was given, but no proposer; name the one it is for.")
        return proposer

    @model_validator(mode="after")
    def _adapters_can_be_served(self) -> EngineConfig:
        if self.num_cpu_loras < self.max_loras:
            raise ValueError(
                f"max_cpu_loras={self.max_cpu_loras} is less than max_loras={self.max_loras}: adapters at device "
                "positions are kept in the host's memory too."
            )
        asked = [name for name in ("lora_modules", "lora_root", "adapter_resolvers") if getattr(self, name)]
        if asked and not self.enable_lora:
            raise ValueError(f"{' and '.join(asked)} was given, but no adapters are served: set enable_lora=True.")
        return self

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _adapters_by_name(cls, value: object) -> object:
        """Also "sql=path" as in a flag, {"name": "sql", "path": ...} as vLLM has it, and a list of these."""
        words = value.split() if isinstance(value, str) else value
        if not isinstance(words, (list, tuple)):
            return value
        named = [_named_path(word) for word in words]
        twice = sorted({name for name, _ in named if [other for other, _ in named].count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is given twice; adapters have names of their own.")
        return dict(named)

    @field_validator("logits_rules", "adapter_resolvers", mode="before")
    @classmethod
    def _names_are_short_for_components(cls, value: object) -> object:
        if isinstance(value, str):
            value = [word.strip() for word in value.split(",") if word.strip()]
        if isinstance(value, Mapping):
            value = [value]
        return [_component(one) for one in value] if isinstance(value, (list, tuple)) else value

    @field_validator(
        "attention",
        "quantization",
        "linear_kernel",
        "kernels",
        "scheduler",
        "executor",
        "proposer",
        "lora",
        mode="before",
    )
    @classmethod
    def _name_is_short_for_component(cls, value: object, info: ValidationInfo) -> object:
        return cls.model_fields[str(info.field_name)].default if value is None else _component(value)


def _component(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _named_path(word: object) -> tuple[str, str]:
    """An adapter's name and path from "name=path", a mapping of both, or that mapping as JSON."""
    if isinstance(word, str) and not word.startswith("{"):
        name, _, path = word.partition("=")
        found: object = {"name": name, "path": path}
    else:
        found = json.loads(word) if isinstance(word, str) else word  # its error is a ValueError that says where
    match found:
        case {"name": str(name), "path": str(path), **others} if name and path and not others:
            return name, path
    raise ValueError(f'{word!r} names no adapter: write name=path, or {{"name": ..., "path": ...}} with no other keys.')


def _fault(fault: Any, sources: Mapping[str, str]) -> str:
    """One of pydantic's faults as a sentence."""
    if not fault["loc"]:  # of several settings together
        return str(fault["msg"]).removeprefix("Value error, ")
    *outer, key = (str(part) for part in fault["loc"])
    name = ".".join([*outer, key])
    source = sources.get(fault["loc"][0], "argument")
    place = "" if source == "argument" else f" ({source})"
    if fault["type"] == "extra_forbidden":
        fields = PluginsConfig.model_fields if outer == ["plugins"] else EngineConfig.model_fields
        known = [".".join([*outer, one]) for one in fields]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"There is no setting {name!r}{place}.{hint} Settings: {', '.join(known)}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{name}={fault['input']!r}{place}: {message}"
